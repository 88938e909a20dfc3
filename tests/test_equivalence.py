"""The packed forward pass against separate sequences, plain Hugging Face, naive masks: tiny model, float32 on the CPU."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft.optimizers import create_loraplus_optimizer
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

from interlace.arguments import SCHEMA_PATH
from interlace.data.batch import Collator, PackedBatch, Segment
from interlace.data.dataset import load_rows
from interlace.data.reading import Row
from interlace.data.sources import read_entries
from interlace.model.forward import PackedModel, RowScores, model_inputs
from interlace.model.loading import load_model, load_processing
from interlace.model.losses import supervised_loss
from interlace.model.tuning import Lora, TunedModel, parameter_groups, tune
from interlace.training.parts import row_reader
from tests.conftest import write_rows

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def rows(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Rows with 0, 1, 2 and 3 images, twice."""
    path = write_rows(tmp_path_factory.mktemp("data"), 8)
    spec = json.loads(SCHEMA_PATH.read_text())["properties"]
    arguments = {name: key.get("default") for name, key in spec.items()} | {"max_length": 512, "too_long": "error"}
    sources = read_entries([{"data_files": str(path)}], 0)
    return list(load_rows(sources, row_reader(arguments, load_processing(str(tiny_dir))), arguments, False)[0])


def collate(tiny_dir: Path, rows: Sequence[Row], share_prefix: bool = False) -> PackedBatch:
    processing = load_processing(str(tiny_dir))
    return Collator(processing.process_images, processing.config.image_token_id, share_prefix).pack(list(enumerate(rows)))


def tuned_model(tiny_dir: Path, parts: Sequence[str] = ("projector", "language_model"), lora: Lora | None = None, seed: int = 0) -> TunedModel:
    torch.manual_seed(seed)
    tuned = tune(load_model(str(tiny_dir), torch.float32), parts, lora, None)
    for name, parameter in tuned.packed.named_parameters():
        if "lora_B" in name:  # starts at zero: an adapter that does nothing proves nothing
            parameter.data.normal_(std=0.3)
    return tuned


def score(tuned: TunedModel, batch: PackedBatch) -> RowScores:
    return tuned.packed(**model_inputs(batch, tuned.tower))


def gradients(tuned: TunedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in tuned.packed.named_parameters() if parameter.grad is not None}


def backward(tuned: TunedModel, batches: Sequence[PackedBatch]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one optimizer step over some micro-batches."""
    tuned.packed.zero_grad()
    total = sum(batch.weights.sum() for batch in batches)
    loss = 0.0
    for batch in batches:
        part = supervised_loss(score(tuned, batch).log_probs, batch.weights, total)
        part.backward()
        loss += part.item()
    return loss, gradients(tuned)


def assert_same_gradients(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert set(first) == set(second)
    assert first
    for name, gradient in first.items():
        torch.testing.assert_close(second[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def assert_packing_and_checkpointing_change_nothing(
    tuned: TunedModel, together: PackedBatch, alone: Sequence[PackedBatch], assert_same: Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], None]
) -> None:
    """Loss and gradients of some rows in one batch are those of the rows one by one, and of the batch with activations recomputed."""
    packed, separate = backward(tuned, [together]), backward(tuned, alone)
    tuned.packed.train()
    tuned.packed.activation_checkpointing_enable({"use_reentrant": False})
    tuned.packed.checkpoint_tower()
    for loss, found in (separate, backward(tuned, [together])):
        assert loss == pytest.approx(packed[0], rel=1e-5)
        assert_same(packed[1], found)


LORA = Lora(4, 8, 0.0, None)
SETUPS = {"full": {}, "lora": {"lora": LORA}, "with tower": {"parts": ("vision_tower", "projector", "language_model")}}


# --- against plain Hugging Face ---


def hugging_face_log_probs(model: LlavaForConditionalGeneration, batch: PackedBatch) -> torch.Tensor:
    """Full logits of one row by the model's own forward."""
    pixels = None if batch.pixel_values is None else batch.pixel_values[batch.image_index]
    logits = model(input_ids=batch.input_ids, attention_mask=torch.ones_like(batch.input_ids), pixel_values=pixels).logits[0]
    return F.log_softmax(logits.float(), -1)[batch.rows[batch.row_index], batch.targets]


@pytest.mark.parametrize("index", range(4))
def test_rows_only_log_probs_equal_full_logits_of_hugging_face(tiny_dir: Path, rows: list[Row], index: int) -> None:
    batch = collate(tiny_dir, [rows[index]])
    with torch.no_grad():
        expected = hugging_face_log_probs(load_model(str(tiny_dir), torch.float32).eval(), batch)
        scores = score(tuned_model(tiny_dir), batch)
    torch.testing.assert_close(scores.log_probs, expected, **TOLERANCE)
    assert len(expected) == rows[index].supervised_tokens


def test_loss_and_gradients_equal_hugging_face_on_separate_rows(tiny_dir: Path, rows: list[Row]) -> None:
    model = load_model(str(tiny_dir), torch.float32)
    model.model.vision_tower.requires_grad_(False)
    batches = [collate(tiny_dir, [row]) for row in rows]
    total = sum(batch.weights.sum() for batch in batches)
    expected = sum(-hugging_face_log_probs(model, batch).sum() / total for batch in batches)
    expected.backward()
    tuned = tuned_model(tiny_dir)
    loss, found = backward(tuned, [collate(tiny_dir, rows)])
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    reference = {f"model.{name}": parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert_same_gradients(reference, found)


# --- packed = separate, accumulation, checkpointing ---


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_packed_equals_separate_equals_accumulated(tiny_dir: Path, rows: list[Row], setup: str) -> None:
    tuned = tuned_model(tiny_dir, **SETUPS[setup])
    packed = backward(tuned, [collate(tiny_dir, rows)])
    for split in ([[row] for row in rows], [rows[:3], rows[3:]]):
        loss, found = backward(tuned, [collate(tiny_dir, part) for part in split])
        assert loss == pytest.approx(packed[0], rel=1e-5)
        assert_same_gradients(packed[1], found)


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_checkpointing_changes_nothing_and_never_recomputes_a_frozen_tower(tiny_dir: Path, rows: list[Row], setup: str) -> None:
    batch = collate(tiny_dir, rows)
    plain = backward(tuned_model(tiny_dir, **SETUPS[setup]), [batch])
    tuned = tuned_model(tiny_dir, **SETUPS[setup])
    tuned.packed.train()
    tuned.packed.activation_checkpointing_enable({"use_reentrant": False})
    tuned.packed.checkpoint_tower()
    calls = []
    tower = tuned.tower.module if tuned.tower else tuned.packed.tower
    assert tower is not None
    tower.encoder.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    layers = []
    tuned.base.model.language_model.layers[0].self_attn.register_forward_hook(lambda *_: layers.append(1))
    loss, found = backward(tuned, [batch])
    assert len(layers) == 2, "the language model is recomputed in the backward pass"
    assert len(calls) == (2 if setup == "with tower" else 1)
    assert loss == pytest.approx(plain[0], rel=1e-6)
    assert_same_gradients(plain[1], found)


def test_a_frozen_tower_sees_each_distinct_image_once_and_stays_out_of_the_graph(tiny_dir: Path, rows: list[Row]) -> None:
    tuned, batch = tuned_model(tiny_dir), collate(tiny_dir, rows * 2)
    seen = []
    assert tuned.tower is not None
    tuned.tower.module.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].shape[0], output.last_hidden_state.requires_grad)))
    score(tuned, batch)
    distinct = len({path for row in rows for path in row.images})
    assert seen == [(distinct, False)]
    assert batch.num_images == 2 * sum(len(row.images) for row in rows) > distinct
    assert not any("vision_tower" in name for name, _ in tuned.packed.named_parameters())


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_text_only_batches_give_every_parameter_a_gradient_and_change_no_value(tiny_dir: Path, rows: list[Row], setup: str) -> None:
    tuned = tuned_model(tiny_dir, **SETUPS[setup])
    text = [row for row in rows if not row.images]
    loss, found = backward(tuned, [collate(tiny_dir, text)])
    trained = {name for name, parameter in tuned.packed.named_parameters() if parameter.requires_grad}
    assert set(found) == trained
    for name, gradient in found.items():
        if "projector" in name or "vision_tower" in name:
            assert not gradient.any(), name
    with torch.no_grad():
        model = load_model(str(tiny_dir), torch.float32).eval()
        batches = [collate(tiny_dir, [row]) for row in text]
        expected = torch.cat([hugging_face_log_probs(model, batch) for batch in batches])
    if setup != "lora":
        assert loss == pytest.approx(-expected.mean().item(), rel=1e-5)


# --- isolation ---


def test_perturbing_one_sample_leaves_the_others_bitwise_alone(tiny_dir: Path, rows: list[Row]) -> None:
    tuned, batch = tuned_model(tiny_dir), collate(tiny_dir, rows[:4])
    with torch.no_grad():
        before = score(tuned, batch).log_probs
        for victim, segment in enumerate(batch.segments):
            changed = batch.input_ids.clone()
            place = segment.end - 4  # text at the end of the answer
            changed[0, place] = (changed[0, place] + 1) % 200
            after = tuned.packed(**{**model_inputs(batch, tuned.tower), "input_ids": changed}).log_probs
            others = batch.sequence_index != victim
            assert torch.equal(before[others], after[others])
            assert not torch.equal(before[~others], after[~others])


def test_swapping_an_image_moves_only_rows_that_show_it(tiny_dir: Path, rows: list[Row]) -> None:
    tuned, batch = tuned_model(tiny_dir), collate(tiny_dir, rows[:4])
    pixels = batch.pixel_values
    assert pixels is not None
    with torch.no_grad():
        before = score(tuned, batch).log_probs
        inputs = model_inputs(batch, tuned.tower)
        inputs["image_features"] = inputs["image_features"].clone()
        inputs["image_features"][0] += 1
        after = tuned.packed(**inputs).log_probs
    paths = [row.images for row in rows[:4]]
    first = next(path for group in paths for path in group)
    shows = torch.tensor([first in group for group in paths])[batch.sequence_index]
    assert torch.equal(before[~shows], after[~shows])
    assert not torch.equal(before[shows], after[shows])


# --- trunks and leaves ---


def test_a_trunk_with_two_leaves_equals_two_sequences(tiny_dir: Path, rows: list[Row]) -> None:
    """The forest of segments through the whole model: shared images and prompt, two endings."""
    tuned, row = tuned_model(tiny_dir), rows[2]
    single = collate(tiny_dir, [row])
    ids = single.input_ids[0]
    trunk, leaf = ids[:-4], ids[-4:]
    other = leaf.flip(0)
    length, size = len(trunk), len(leaf)
    packed = {
        **model_inputs(single, tuned.tower),
        "input_ids": torch.cat([trunk, leaf, other])[None],
        "position_ids": torch.cat([torch.arange(length + size), torch.arange(length, length + size)])[None],
        "segments": (Segment(0, length), Segment(length, length + size, 0), Segment(length + size, length + 2 * size, 0)),
        "rows": torch.cat([torch.arange(length - 1, length + size - 1), torch.arange(length + size, length + 2 * size - 1)]),
        "row_index": torch.tensor([*range(size), 0, *range(size, 2 * size - 1)]),
        "targets": torch.cat([leaf, other]),
    }
    with torch.no_grad():
        shared = tuned.packed(**packed).log_probs
        for start, ending in ((0, leaf), (size, other)):
            alone = {**model_inputs(single, tuned.tower), "input_ids": torch.cat([trunk, ending])[None]}
            alone |= {"rows": torch.arange(length - 1, length + size - 1), "row_index": torch.arange(size), "targets": ending}
            torch.testing.assert_close(shared[start : start + size], tuned.packed(**alone).log_probs, **TOLERANCE)


# --- the batch itself ---


def test_packed_batch_is_what_its_rows_say(tiny_dir: Path, rows: list[Row], demo_tokenizer: PreTrainedTokenizerBase) -> None:
    batch = collate(tiny_dir, rows)
    assert batch.num_tokens == sum(row.length for row in rows) == batch.segments[-1].end
    assert [segment.end - segment.start for segment in batch.segments] == [row.length for row in rows]
    assert batch.position_ids[0, [segment.start for segment in batch.segments]].eq(0).all()
    assert torch.equal(batch.input_ids[0, batch.rows[batch.row_index] + 1], batch.targets)
    for number, row in enumerate(rows):
        mine = batch.sequence_index == number
        labels = torch.from_numpy(row.encoded.labels)
        assert batch.targets[mine].tolist() == labels[labels >= 0].tolist()
    image = demo_tokenizer.convert_tokens_to_ids("<image>")
    assert (batch.input_ids == image).sum() == len(batch.image_positions) == sum(sum(row.image_tokens) for row in rows)
    assert batch.pixel_values is not None
    assert len(batch.pixel_values) == len({path for row in rows for path in row.images})


def test_fillers_of_the_plan_weigh_nothing(tiny_dir: Path, rows: list[Row]) -> None:
    from interlace.data.batch import NumberedRows

    processing = load_processing(str(tiny_dir))
    batch = Collator(processing.process_images, processing.config.image_token_id).pack([NumberedRows(rows)[~1], NumberedRows(rows)[1]])
    assert batch.weights[batch.sequence_index == 0].eq(0).all()
    assert batch.weights[batch.sequence_index == 1].eq(1).all()


def test_packed_model_refuses_to_guess_masks(tiny_dir: Path) -> None:
    model: Any = PackedModel(load_model(str(tiny_dir), torch.float32))
    assert model.config.text_config._attn_implementation == "interlace_sdpa"
    assert model.config.vision_config._attn_implementation == "sdpa"


def test_lora_plus_rates_are_peft_s(tiny_dir: Path) -> None:
    """The second matrices learn faster (arXiv 2402.12354), the projector as it is told."""
    tuned = tune(load_model(str(tiny_dir), torch.float32), ["projector", "language_model"], Lora(4, 8, 0.0, None), None)
    rates = {"lora_B": 16 * 1e-3, "projector": 5e-4}
    ours = {id(parameter): group["lr"] for group in parameter_groups(tuned, lambda _: True, 0.0, 1e-3, rates) for parameter in group["params"]}  # type: ignore[attr-defined]
    theirs = create_loraplus_optimizer(model=tuned.peft, optimizer_cls=torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)  # type: ignore[arg-type]
    expected = {id(parameter): group["lr"] for group in theirs.param_groups for parameter in group["params"]}
    named = {name: parameter for name, parameter in tuned.packed.named_parameters() if parameter.requires_grad}
    assert {id(parameter) for parameter in named.values()} == set(ours)
    for name, parameter in named.items():
        assert ours[id(parameter)] == (expected[id(parameter)] if "lora_" in name else 5e-4), name
