"""Sliding windows: layers that attend to the last tokens only, against transformers' own masks and forward passes. Tiny models, float32 on the CPU."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModelForImageTextToText,
    Gemma2Config,
    LlavaForConditionalGeneration,
    MistralConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    SiglipImageProcessorPil,
)
from transformers.masking_utils import create_sliding_window_causal_mask

from interlace.data.batch import PackedBatch, Segment
from interlace.data.reading import Row
from interlace.data.sample import Text, Turn
from interlace.data.template import ChatTemplate
from interlace.errors import InputError
from interlace.inference.generation import load_generator
from interlace.model import attention_kernels
from interlace.model.attention import Backend, Forest, dense_mask, interface, window_of
from interlace.model.attention_kernels import BACKENDS, choose, flash_segments, flex_segments, problem
from interlace.model.costs import attended_pairs, path_pairs, shape_of, step_costs
from interlace.model.forward import PackedModel
from interlace.model.loading import load_model
from interlace.model.processing import Processing
from interlace.model.saving import save_model, save_processing
from interlace.training.forecast import MicroShape
from interlace.training.planning import Columns
from tests.conftest import tiny_config
from tests.test_attention import CPU, FORESTS, FUNCTIONS, draw, naive_flash_attn
from tests.test_equivalence import (
    LORA,
    TOLERANCE,
    assert_packing_and_checkpointing_change_nothing,
    assert_same_gradients,
    backward,
    collate,
    hugging_face_log_probs,
    rows,  # noqa: F401
    score,
    tuned_model,
)

WINDOW = 8
TEXT: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
KINDS: dict[str, tuple[Any, dict[str, Any], list[int | None]]] = {
    "mistral": (MistralConfig, {"sliding_window": WINDOW, "num_hidden_layers": 2}, [WINDOW, WINDOW]),
    "mistral without": (MistralConfig, {"sliding_window": None, "num_hidden_layers": 2}, [None, None]),
    "qwen2": (Qwen2Config, {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "num_hidden_layers": 3}, [None, WINDOW, WINDOW]),
    "qwen2, first layers": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": WINDOW, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
        [WINDOW, None],
    ),
    "qwen2, switched off": (Qwen2Config, {"use_sliding_window": False, "sliding_window": WINDOW, "num_hidden_layers": 2}, [None, None]),
}
CUT = [name for name, (_, _, windows) in KINDS.items() if WINDOW in windows]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, demo_tokenizer: PreTrainedTokenizerBase) -> dict[str, Path]:
    """Random tiny LLaVAs on these language models."""
    found = {}
    for name, (kind, settings, _) in KINDS.items():
        config = tiny_config(demo_tokenizer)
        ids = {key: getattr(config.text_config, key) for key in ("vocab_size", "eos_token_id", "pad_token_id", "tie_word_embeddings")}
        config.text_config = kind(**TEXT, **settings, **ids)
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
        for parameter in model.parameters():
            parameter.data.mul_(3)
        found[name] = folder = tmp_path_factory.mktemp("windows")
        save_model(model, folder)
        images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
        save_processing(Processing(demo_tokenizer, images, ChatTemplate(demo_tokenizer, config.image_token_id), config), folder)
    return found


# --- the rule ---


def test_the_window_counts_the_token_itself_along_its_path_by_hand() -> None:
    """A trunk of 3, a leaf of 2 and one of 1, a window of 2: the first token of a leaf sees the trunk's last."""
    mask = dense_mask([Segment(0, 3), Segment(3, 5, 0), Segment(5, 6, 0)], 6, 2).int().tolist()
    assert mask == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 1, 0, 0, 1]]


@pytest.mark.parametrize("window", [1, 3, 8, 19, 20])
def test_the_window_of_one_row_is_transformers(window: int) -> None:
    config = MistralConfig(sliding_window=window)
    config._attn_implementation = "eager"
    mask = create_sliding_window_causal_mask(config, torch.zeros(1, 20, 4), torch.ones(1, 20), None, None)
    assert isinstance(mask, torch.Tensor)
    assert torch.equal(dense_mask([Segment(0, 20)], 20, window), mask[0, 0] == 0)


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    wide_k, wide_v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return ((q @ wide_k.transpose(2, 3) * 0.3).masked_fill(~mask, float("-inf")).softmax(-1) @ wide_v).transpose(1, 2)


@pytest.mark.parametrize("backend", FUNCTIONS)
@pytest.mark.parametrize("name", FORESTS)
@pytest.mark.parametrize("window", [1, 2, 4, 7, 100])
def test_backends_equal_the_naive_mask_of_the_window(backend: str, name: str, window: int) -> None:
    segments = FORESTS[name]
    q, k, v = draw(4, 2, segments[-1].end, 8)
    forest = Forest(segments, CPU)
    out, _ = interface(FUNCTIONS[backend])(torch.nn.Identity(), q, k, v, None, scaling=0.3, segments=forest, sliding_window=window)
    expected = naive(q, k, v, dense_mask(segments, segments[-1].end, window))
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    direction = torch.randn_like(expected)
    for one, other in zip(torch.autograd.grad(out, (q, k, v), direction), torch.autograd.grad(expected, (q, k, v), direction), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FORESTS)
@pytest.mark.parametrize("window", [1, 4, 7])
def test_flex_attention_equals_the_naive_mask_of_the_window(name: str, window: int) -> None:
    segments = FORESTS[name]
    q, k, v = (tensor.detach().float() for tensor in draw(4, 2, segments[-1].end, 16))
    out = flex_segments(q, k, v, Forest(segments, CPU).within(window), 0.3)
    torch.testing.assert_close(out, naive(q, k, v, dense_mask(segments, segments[-1].end, window)), rtol=1e-5, atol=1e-5)


def test_nothing_changes_where_no_path_is_longer_than_the_window() -> None:
    """So that every backend will do for rows that fit: the forest is the same object, its kernels are told of no window."""
    forest = Forest([Segment(0, 10), Segment(10, 15, 0), Segment(15, 17, 1), Segment(17, 30)], CPU)
    assert forest.longest_path == 17
    assert forest.within(None) is forest.within(17) is forest
    narrow = forest.within(16)
    assert narrow is not forest and narrow is forest.within(16) and narrow.window == narrow.own.window == 16
    assert forest.own.window is None


# --- which backend ---


def test_a_kernel_that_knows_no_windows_is_found_out_only_where_it_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*args: Any, window_size: Any = None, **options: Any) -> torch.Tensor:
        return naive_flash_attn(*args, **options)

    def refuses(*args: Any, softmax_scale: float, causal: bool) -> torch.Tensor:
        return naive_flash_attn(*args, softmax_scale=softmax_scale, causal=causal)

    shape = (CPU, torch.float32, 4, 2, 16)
    backends: dict[str, Backend] = {"flash_attention_2": functools.partial(flash_segments, function=naive_flash_attn), "sdpa": FUNCTIONS["sdpa"]}
    monkeypatch.setattr(attention_kernels, "BACKENDS", {name: lambda backend=backend: backend for name, backend in backends.items()})
    assert choose("flash_attention_2", *shape, has_windows=True) == "flash_attention_2"
    for function, reason in ((without, r"its results are \d+\.\d\d% off on this device"), (refuses, "TypeError: .*window_size")):
        monkeypatch.setitem(attention_kernels.BACKENDS, "flash_attention_2", lambda f=function: functools.partial(flash_segments, function=f))
        assert problem("flash_attention_2", *shape) is None
        assert choose("flash_attention_2", *shape) == "flash_attention_2"
        with pytest.raises(InputError, match=f"flash_attention_2 cannot be used on cpu with float32: with the model's sliding window, {reason}.*: auto, sdpa"):
            choose("flash_attention_2", *shape, has_windows=True)


def test_sdpa_and_the_kernels_logic_pass_the_trial_with_a_window() -> None:
    assert BACKENDS["sdpa"]() is FUNCTIONS["sdpa"]
    assert problem("sdpa", CPU, torch.float32, 4, 2, 16, attention_kernels.TRIAL_WINDOW) is None


# --- whole models ---


@pytest.mark.parametrize("name", KINDS)
def test_layers_and_their_windows(folders: dict[str, Path], name: str) -> None:
    """The window that is told from outside is the one that the module hands to the attention function."""
    seen: list[int | None] = []

    def note(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any) -> tuple[torch.Tensor, None]:
        seen.append(options.get("sliding_window"))
        return torch.zeros_like(query.transpose(1, 2)), None

    model: Any = load_model(str(folders[name]), torch.float32)
    expected = KINDS[name][2]
    layers = model.model.language_model.layers
    assert [window_of(layer.self_attn) for layer in layers] == expected
    AttentionInterface.register("noted", note)
    model.set_attn_implementation({"text_config": "noted", "vision_config": "sdpa"})
    model.model.language_model(inputs_embeds=torch.zeros(1, 3, 32))
    assert seen == expected
    assert tuned_model(folders[name]).packed.window == next((window for window in expected if window), None)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("share_prefix", [False, True], ids=["packed", "shared"])
def test_log_probs_and_gradients_are_those_of_transformers_on_separate_rows(
    folders: dict[str, Path],
    rows: list[Row],  # noqa: F811
    name: str,
    share_prefix: bool,
) -> None:
    """Rows longer than the window. Shared: the first two rows with images and a twin of each that goes on in another way."""
    folder = folders[name]
    if share_prefix:
        rows = [row for row in rows if row.images][:2]
        rows = [rows[0], rows[1], *(_other_answer(row) for row in rows)]
    batch = collate(folder, rows, share_prefix)
    assert min(row.length for row in rows) > WINDOW
    assert any(segment.parent >= 0 for segment in batch.segments) == share_prefix
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    tuned = tuned_model(folder)
    found = score(tuned, batch).log_probs
    total = torch.zeros(())
    for number, row_number in enumerate(batch.row_numbers):
        expected = hugging_face_log_probs(model, collate(folder, [rows[row_number]]))
        torch.testing.assert_close(found[batch.sequence_index == number], expected, **TOLERANCE)
        total = total - expected.sum() / len(found)
    total.backward()
    learning = {name for name, parameter in tuned.packed.named_parameters() if parameter.requires_grad}
    reference = {f"model.{name}": parameter.grad for name, parameter in model.named_parameters() if f"model.{name}" in learning}
    assert_same_gradients(reference, backward(tuned, [batch])[1])


def _other_answer(row: Row) -> Row:
    """The row with the ids of its answer reversed."""
    encoded = row.encoded
    ids, labels = encoded.input_ids.copy(), encoded.labels.copy()
    ids[encoded.labels >= 0] = ids[encoded.labels >= 0][::-1]
    labels[labels >= 0] = labels[labels >= 0][::-1]
    return dataclasses.replace(row, encoded=dataclasses.replace(encoded, input_ids=ids, labels=labels))


@pytest.mark.parametrize("name", CUT)
def test_windows_are_no_matter_of_form(folders: dict[str, Path], rows: list[Row], name: str) -> None:  # noqa: F811
    """Without the window the same weights say something else, so the tests above compare what differs."""
    batch = collate(folders[name], rows)
    tuned = tuned_model(folders[name])
    with torch.no_grad():
        found = score(tuned, batch).log_probs
        config: Any = tuned.base.config.get_text_config()
        config.sliding_window = None
        for layer in tuned.base.model.language_model.layers:
            layer.self_attn.sliding_window = None
        assert (score(tuned, batch).log_probs - found).abs().max() > 1e-2


@pytest.mark.parametrize("setup", [{}, {"lora": LORA}], ids=["full", "lora"])
@pytest.mark.parametrize("name", CUT)
def test_packed_equals_separate_and_checkpointing_changes_nothing(
    folders: dict[str, Path],
    rows: list[Row],  # noqa: F811
    name: str,
    setup: dict[str, Any],
) -> None:
    folder = folders[name]
    tuned = tuned_model(folder, **setup)
    assert tuned.packed.is_trimmed
    alone = [collate(folder, [row]) for row in rows]
    assert_packing_and_checkpointing_change_nothing(tuned, collate(folder, rows), alone, assert_same_gradients)


@pytest.mark.parametrize("name", CUT)
def test_answers_of_prompts_with_one_trunk_are_those_of_each_alone(folders: dict[str, Path], name: str) -> None:
    """Padding that stands behind a trunk must not use up the window."""
    generator = load_generator(str(folders[name]), "float32")
    prompts = [generator.prompt([Turn("user", (Text(f"one two three {text}"),))]) for text in ("four", "five six seven eight nine ten", "six seven")]
    trunk = next(i for i, ids in enumerate(zip(*(prompt.input_ids for prompt in prompts), strict=False)) if len(set(ids)) > 1)
    assert trunk > WINDOW / 2
    shared = [dataclasses.replace(prompt, trunk_length=trunk) for prompt in prompts]
    assert generator.answer(shared, 8) == [generator.answer([prompt], 8)[0] for prompt in prompts]


def test_capped_scores_are_refused(demo_tokenizer: PreTrainedTokenizerBase) -> None:
    """Gemma 2 in a LLaVA: its windows would be honoured, but not what it does to the scores."""
    config = tiny_config(demo_tokenizer)
    config.text_config = Gemma2Config(**TEXT, num_hidden_layers=2, head_dim=8, vocab_size=len(demo_tokenizer), attn_logit_softcapping=50.0)
    with pytest.raises(InputError, match=r"attn_logit_softcapping: .* packed attention does not do"):
        PackedModel(LlavaForConditionalGeneration(config))


# --- costs ---


@pytest.mark.parametrize("window", [1, 6, 13, 24, 30])
def test_pairs_within_a_window_are_the_ones_of_the_dense_mask(window: int) -> None:
    segments = [Segment(0, 20), Segment(20, 27), Segment(27, 40, 0), Segment(40, 45, 0), Segment(45, 50, 2)]
    assert attended_pairs(segments, window) == dense_mask(segments, 50, window).sum()


def test_costs_count_a_layers_pairs_within_its_window(folders: dict[str, Path], rows: list[Row]) -> None:  # noqa: F811
    """Three layers of 4 heads of 8: one sees all pairs, two those of the window; 4 FLOPs per number of a head forward, twice as much backward."""
    batch: PackedBatch = collate(folders["qwen2"], rows)
    tuned = tuned_model(folders["qwen2"])
    costs = step_costs(tuned)
    assert costs.window == WINDOW
    mask, near = (dense_mask(batch.segments, batch.num_tokens, window).sum().item() for window in (None, WINDOW))
    assert near < mask / 2
    cost = costs.parts(shape_of(batch, costs.window))["attention"]
    assert (cost.forward, cost.backward) == (4 * 32 * (mask + 2 * near), 8 * 32 * (mask + 2 * near))
    lengths = [segment.end - segment.start for segment in batch.segments]
    assert MicroShape(tuple(lengths), 0, 0).shape(WINDOW).num_near_pairs == near
    planned = Columns(torch.tensor(lengths).numpy(), torch.zeros(8).numpy(), torch.zeros(8).numpy()).flops(costs)
    linear = costs.language_model.required * batch.num_tokens
    assert planned.sum() == pytest.approx(linear + cost.required)
    assert path_pairs(5, 2) == 1 + 2 + 2 + 2 + 2
