"""FLOPs against torch's counter, bytes against torch's profiler, parameters against the published model."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig

from interlace.data.batch import PackedBatch, Segment
from interlace.model.attention import dense_mask
from interlace.model.costs import BatchShape, attended_pairs, shape_of, step_costs
from interlace.model.forward import model_inputs
from interlace.model.losses import supervised_loss
from interlace.model.reference import FrozenCopy
from interlace.model.tuning import Lora, TunedModel, tune
from interlace.training.outline import empty_model
from interlace.training.rehearsal import Rehearsal, rehearse

LENGTHS, NUM_IMAGES, NUM_ROWS = (40, 30, 30), 2, 25
PARTS = {"frozen tower": ["projector", "language_model"], "trainable tower": ["vision_tower", "projector", "language_model"]}
LORA = Lora(8, 16, 0.0, None)


def small_config(tower: str = "siglip", tied: bool = True, width: int = 64) -> LlavaConfig:
    """Three layers each, grouped queries, 16 patches; CLIP takes the last layer but one, without the class token."""
    shared = {"hidden_size": width, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 56, "patch_size": 14}
    vision = CLIPVisionConfig(**shared) if tower == "clip" else SiglipVisionConfig(**shared, vision_use_head=False)
    text = Qwen2Config(
        vocab_size=500,
        hidden_size=width,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2 if tied else 4,
        tie_word_embeddings=tied,
    )
    layer, strategy = (-2, "default") if tower == "clip" else (-1, "full")
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=7,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=tied,
    )


def small_model(config: LlavaConfig, parts: Iterable[str], lora: Lora | None, checkpointing: bool = False) -> TunedModel:
    torch.manual_seed(0)
    tuned = tune(LlavaForConditionalGeneration(config), list(parts), lora, None)
    if checkpointing:
        tuned.packed.activation_checkpointing_enable()
        tuned.packed.checkpoint_tower()
    tuned.packed.train()
    return tuned


def small_batch(lengths: tuple[int, ...] = LENGTHS) -> PackedBatch:
    """Random ids in which the images fill the first places."""
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    rows = torch.arange(NUM_ROWS)
    return PackedBatch(
        input_ids=torch.randint(10, 400, (1, ends[-1])),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        segments=tuple(Segment(end - length, end) for end, length in zip(ends, lengths, strict=True)),
        rows=rows,
        row_index=rows,
        targets=rows,
        weights=torch.ones(NUM_ROWS),
        sequence_index=rows,
        row_numbers=(0, 1, 2),
        pixel_values=torch.randn(NUM_IMAGES, 3, 56, 56),
        image_index=torch.arange(NUM_IMAGES),
        image_positions=torch.arange(NUM_IMAGES * 16),
    )


def run_step(tuned: TunedModel, batch: PackedBatch) -> None:
    scores = tuned.packed(**model_inputs(batch, tuned.tower))
    supervised_loss(scores.log_probs, batch.weights, batch.weights.sum()).backward()


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("tower", ["siglip", "clip"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_flops_are_what_torchs_counter_counts(parts: str, lora: Lora | None, tower: str, checkpointing: bool) -> None:
    """Within 2%, forward and backward. The counter sees attention in the MATH backend only, which computes the whole square of every segment."""
    tuned, batch = small_model(small_config(tower, tied=tower == "siglip"), PARTS[parts], lora, checkpointing), small_batch()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run_step(tuned, batch)
    whole_square = BatchShape(sum(LENGTHS), sum(length**2 for length in LENGTHS), NUM_IMAGES, NUM_ROWS)
    cost = step_costs(tuned, checkpointing, checkpointing).total(whole_square)
    assert cost.executed == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert (cost.recompute > 0) == checkpointing


@pytest.mark.parametrize("parts", [["projector"], ["language_model"], ["vision_tower"]])
@pytest.mark.parametrize("targets", [None, ["q_proj", "v_proj"]])
def test_flops_where_gradients_end_early(parts: list[str], targets: list[str] | None) -> None:
    """Whatever stays frozen at the bottom: no gradient is counted that does not flow."""
    tuned, batch = small_model(small_config(), parts, Lora(4, 8, 0.0, targets) if "language_model" in parts else None), small_batch()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run_step(tuned, batch)
    whole_square = BatchShape(sum(LENGTHS), sum(length**2 for length in LENGTHS), NUM_IMAGES, NUM_ROWS)
    assert step_costs(tuned).total(whole_square).required == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_attended_pairs_are_the_ones_of_the_dense_mask() -> None:
    """A trunk with two leaves, one of which has a leaf of its own, beside an ordinary row."""
    segments = [Segment(0, 20), Segment(20, 27), Segment(27, 40, 0), Segment(40, 45, 0), Segment(45, 50, 2)]
    assert attended_pairs(segments) == dense_mask(segments, 50).sum()
    shape = shape_of(small_batch())
    assert shape == BatchShape(100, sum(n * (n + 1) // 2 for n in LENGTHS), NUM_IMAGES, NUM_ROWS)


def interleave_05b() -> LlavaConfig:
    vision = SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=26, num_attention_heads=16, image_size=384, patch_size=14, vision_use_head=False
    )
    text = Qwen2Config(
        vocab_size=152_000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=True,
    )
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=151_646, vision_feature_layer=-1, vision_feature_select_strategy="full", tie_word_embeddings=True
    )


ARGUMENTS: dict[str, Any] = {
    "bf16": True,
    "fp16": False,
    "lora": True,
    "lora_path": None,
    "lora_rank": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_target_modules": None,
    "lora_dtype": "float32",
    "use_dora": False,
    "use_rslora": False,
    "tunable_parts": "language_model",
    "freeze_include": [],
    "freeze_exclude": [],
    "gradient_checkpointing": False,
    "activation_checkpointing": None,
    "vision_gradient_checkpointing": None,
}


def test_the_published_half_billion_model_has_its_parameters_and_flops() -> None:
    """864,031,264 parameters; LoRA of rank 16 by hand; per image 0.642 TFLOP of vision and per token 0.62 GFLOP forward (PERFORMANCE's figures)."""
    tuned = empty_model(interleave_05b(), ARGUMENTS)
    counts = {name: (total, trainable) for name, total, trainable in tuned.part_table()}
    adapter = 24 * 16 * (4 * 2 * 1024 + 3 * (1024 + 2816))
    assert counts.pop("adapter") == (adapter, adapter)
    assert sum(total for total, _ in counts.values()) == 864_031_264
    assert all(trainable == 0 for _, trainable in counts.values())
    costs = step_costs(tuned)
    assert costs.vision_tower.required == pytest.approx(0.642e12, rel=2e-3)
    assert costs.language_model.forward + costs.last_layer.forward - 2 * adapter == 2 * 24 * (4 * 1024**2 + 3 * 1024 * 2816)
    assert costs.last_layer.forward == 2 * (2 * 1024**2 + 3 * 1024 * 2816 + 16 * (4 * 1024 + 3 * (1024 + 2816)))  # all but the keys and values of one layer
    assert costs.lm_head.forward == 2 * 152_000 * 1024


def profiled_peak(tuned: TunedModel, batch: PackedBatch) -> int:
    """The most bytes that torch's CPU allocator had given out at once during a step, by the profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run_step(tuned, batch)
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    living = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        living += event.nbytes()
        most = max(most, living)
    return most


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_rehearsal_counts_the_bytes_that_the_allocator_gives_out(parts: str, lora: Lora | None, checkpointing: bool) -> None:
    """Within 10% of a real step's peak, and to the byte the same gradients."""
    batch, config = small_batch((400, 300, 300)), small_config(width=128)
    real = small_model(config, PARTS[parts], lora, checkpointing)
    run_step(real, batch)  # what is made once, at the first step, does not count
    real.packed.zero_grad()
    batch_bytes = sum(value.nbytes for value in vars(batch).values() if isinstance(value, torch.Tensor))
    with torch.device("meta"):
        empty = small_model(config, PARTS[parts], lora, checkpointing)
    rehearsal = rehearse(empty, (Segment(0, 400), Segment(400, 700), Segment(700, 1000)), NUM_IMAGES, NUM_ROWS, torch.float32)
    assert sum(rehearsal.peak().values()) - batch_bytes == pytest.approx(profiled_peak(real, batch), rel=0.1)
    assert rehearsal.living[-1][2] == sum(parameter.grad.nbytes for parameter in real.packed.parameters() if parameter.grad is not None)


def test_the_fullest_moment_depends_on_what_is_shared() -> None:
    """Three moments by hand: activations, logits, gradients."""
    living = [(100, 0, 0), (60, 30, 20), (0, 0, 80)]
    rehearsal = Rehearsal(torch.tensor(living).numpy())
    assert rehearsal.peak() == {"activations": 60, "logits": 30, "gradients": 20}
    assert rehearsal.peak(gradient_share=0.25) == {"activations": 100, "logits": 0, "gradients": 0}
    assert rehearsal.peak(gradients_kept=80) == {"activations": 100, "logits": 0, "gradients": 80}


@pytest.mark.parametrize("parts", PARTS)
def test_a_reference_costs_one_more_forward_pass_and_sees_for_itself_where_the_tower_learns(parts: str) -> None:
    """A frozen copy asked without a gradient, as preference tuning asks it; what a frozen tower made is there already."""
    tuned, batch = small_model(small_config(), PARTS[parts], None), small_batch()
    reference = FrozenCopy(tuned.packed, torch.float32, is_rounded=False)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        values = model_inputs(batch, tuned.tower)
        reference.log_probs(tuned.packed, values, batch, "train")
        supervised_loss(tuned.packed(**values).log_probs, batch.weights, batch.weights.sum()).backward()
    whole_square = BatchShape(sum(LENGTHS), sum(length**2 for length in LENGTHS), NUM_IMAGES, NUM_ROWS)
    assert step_costs(tuned).with_reference().total(whole_square).required == pytest.approx(counter.get_total_flops(), rel=0.02)
