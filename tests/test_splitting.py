"""Micro-batches that do not fit into the memory: done in halves, with the same gradients."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from interlace.data.batch import Collator, PackedBatch, Segment
from interlace.data.splitting import split
from interlace.errors import RunError
from interlace.model.features import FeatureCache, FeatureStore
from interlace.model.forward import PackedModel
from interlace.model.loading import load_processing
from interlace.training.supervised import finetune
from tests.test_equivalence import SETUPS, backward, tuned_model
from tests.test_families import make_model
from tests.test_sharing import awkward_rows, pack, read_rows
from tests.test_training import history, losses, weights

Make = Callable[..., dict[str, Any]]
ORDER = [3, 0, 2, 6, 1, 8, 9, 4, 5, 7]


def pieces(batch: PackedBatch) -> list[PackedBatch]:
    """Split until nothing is left to split."""
    halves = split(batch)
    return [batch] if halves is None else [piece for half in halves for piece in pieces(half)]


@pytest.mark.parametrize("share_prefix", [False, True])
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_halves_add_up_to_the_whole(tiny_dir: Path, tmp_path: Path, setup: str, share_prefix: bool) -> None:
    """Once, and down to single rows: loss, gradients, every row and every image."""
    rows = read_rows(tmp_path, tiny_dir, awkward_rows(tmp_path))
    whole = pack(tiny_dir, rows, ORDER, share_prefix)
    halves = split(whole)
    assert halves is not None
    if not share_prefix:
        assert abs(halves[0].num_tokens - halves[1].num_tokens) <= max(rows.lengths)
        assert sum(half.num_tokens for half in halves) == whole.num_tokens
    tuned = tuned_model(tiny_dir, **SETUPS[setup])
    expected, gradients = backward(tuned, [whole])
    scale = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    for parts in (list(halves), pieces(whole)):
        assert [number for part in parts for number in part.row_numbers] == list(whole.row_numbers)
        loss, found = backward(tuned, parts)
        assert loss == pytest.approx(expected, rel=1e-5)
        for name, gradient in gradients.items():
            assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-6 * scale, name
    assert len(pieces(whole)) == 10


def test_a_single_row_is_what_it_would_be_if_it_were_packed_alone(tiny_dir: Path, tmp_path: Path) -> None:
    rows = read_rows(tmp_path, tiny_dir, awkward_rows(tmp_path))
    for piece in pieces(pack(tiny_dir, rows, ORDER, share_prefix=False)):
        alone = pack(tiny_dir, rows, list(piece.row_numbers), share_prefix=False)
        for item in dataclasses.fields(PackedBatch):
            found, expected = getattr(piece, item.name), getattr(alone, item.name)
            if item.name == "pixel_values" and expected is not None:  # in the order of the whole batch
                assert len(found) == len(expected)
                torch.testing.assert_close(found[piece.image_index], expected[alone.image_index])
            elif item.name == "image_index":
                assert len(found) == len(expected)
            elif isinstance(expected, torch.Tensor):
                assert torch.equal(found, expected), item.name
            else:
                assert found == expected or item.name in ("image_sizes", "image_tokens"), item.name


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_halves_of_images_that_are_cut_into_tiles(tmp_path: Path, family: str) -> None:
    (tmp_path / "model").mkdir()
    model_dir = make_model(family, tmp_path / "model")
    rows = read_rows(tmp_path, model_dir, awkward_rows(tmp_path))
    tuned = tuned_model(model_dir)
    whole = pack(model_dir, rows, ORDER, share_prefix=False)
    expected, _ = backward(tuned, [whole])
    assert backward(tuned, pieces(whole))[0] == pytest.approx(expected, rel=1e-5)


def test_halves_of_features_some_of_which_were_known(tiny_dir: Path, tmp_path: Path) -> None:
    rows, processing = read_rows(tmp_path, tiny_dir, awkward_rows(tmp_path)), load_processing(str(tiny_dir))
    tuned = tuned_model(tiny_dir)
    assert tuned.tower is not None
    (tmp_path / "features").mkdir()
    store = FeatureStore(tmp_path / "features")
    tuned.tower.cache = FeatureCache(store, 1 << 30, print)
    collate = Collator(processing.process_images, processing.config.image_token_id, features=store)
    backward(tuned, [collate.pack([(0, rows[0])])])
    tuned.tower.cache.flush()
    whole = collate.pack([(number, rows[number]) for number in ORDER])
    assert any(whole.is_cached) and not all(whole.is_cached)
    expected, _ = backward(tuned, [pack(tiny_dir, rows, ORDER, share_prefix=False)])
    assert backward(tuned, pieces(whole))[0] == pytest.approx(expected, rel=1e-5)


# --- in a run ---


class SmallMemory:
    """Lets no micro-batch of more than some tokens through: it fails in the forward pass, or in the middle of the backward pass."""

    def __init__(self, most_tokens: int, in_backward: bool, monkeypatch: pytest.MonkeyPatch):
        self.most_tokens, self.in_backward, self.failures = most_tokens, in_backward, 0
        original = PackedModel.forward

        def forward(packed: PackedModel, input_ids: torch.Tensor, **inputs: Any) -> Any:
            fits = input_ids.shape[1] <= self.most_tokens
            if not fits and not self.in_backward:
                self.fail()
            elif not fits:  # when the gradients of the layers behind the first are there already
                first = next(parameter for name, parameter in packed.named_parameters() if parameter.requires_grad and "layers.0" in name)
                self.hook = first.register_hook(lambda _: self.fail())
            return original(packed, input_ids=input_ids, **inputs)

        monkeypatch.setattr(PackedModel, "forward", forward)

    def fail(self) -> None:
        self.failures += 1
        if self.in_backward:
            self.hook.remove()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("in_backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("changes", [{"lora": True}, {}], ids=["lora", "full"])
def test_a_run_goes_on_in_halves_and_ends_where_it_would_have_ended(
    make_arguments: Make, rows_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], in_backward: bool
) -> None:
    """Two micro-batches a step: the gradients of the first are there when the second does not fit."""
    settings = {**changes, "max_tokens_per_batch": 400, "gradient_accumulation_steps": 2, "max_steps": 4, "weight_decay": 0.0, "optim": "sgd"}
    plain = make_arguments(rows_file, **settings)
    finetune(plain)
    memory = SmallMemory(260, in_backward, monkeypatch)
    small = make_arguments(rows_file, **settings, output_dir=plain["output_dir"] + "_small")
    finetune(small)
    assert memory.failures >= 1
    assert losses(small["output_dir"]) == pytest.approx(losses(plain["output_dir"]), rel=1e-4)
    for name in ("token_accuracy", "supervised_tokens"):
        assert [entry[name] for entry in history(small["output_dir"]) if "loss" in entry] == [
            entry[name] for entry in history(plain["output_dir"]) if "loss" in entry
        ]
    for name, tensor in weights(plain["output_dir"]).items():
        torch.testing.assert_close(weights(small["output_dir"])[name], tensor, rtol=1e-4, atol=1e-6)
    assert capsys.readouterr().err.count("does not fit into the memory; such ones are done in halves") <= 1


def test_a_row_that_does_not_fit_ends_the_run_with_its_name(make_arguments: Make, rows_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SmallMemory(20, False, monkeypatch)
    with pytest.raises(RunError, match=r"step 1: a micro-batch of \d+ tokens does not fit into the memory \(CUDA out of memory.*rows\.json: row \d+\. Lower"):
        finetune(make_arguments(rows_file, lora=True))


def test_other_errors_are_not_taken_for_it(make_arguments: Make, rows_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(PackedModel, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        finetune(make_arguments(rows_file, lora=True))


def test_grandchildren_keep_their_path(tiny_dir: Path, tmp_path: Path) -> None:
    rows = read_rows(tmp_path, tiny_dir, awkward_rows(tmp_path))
    batch = pack(tiny_dir, rows, [5], share_prefix=False)
    forest = (Segment(0, 4), Segment(4, 7, 0), Segment(7, 9, 1), Segment(9, 12, 0))
    given = dataclasses.replace(
        batch,
        input_ids=torch.arange(12)[None],
        position_ids=torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 4, 5, 6]]),
        segments=forest,
        rows=torch.tensor([6, 7, 3, 9]),
        row_index=torch.arange(4),
        targets=torch.tensor([7, 8, 9, 10]),
        weights=torch.ones(4),
        sequence_index=torch.tensor([0, 0, 1, 1]),
        row_numbers=(0, 1),
    )
    halves = split(given)
    assert halves is not None
    first, second = halves
    assert first.segments == (Segment(0, 4), Segment(4, 7, 0), Segment(7, 9, 1)) and first.input_ids.tolist() == [list(range(9))]
    assert second.segments == (Segment(0, 4), Segment(4, 7, 0)) and second.input_ids.tolist() == [[0, 1, 2, 3, 9, 10, 11]]
    assert (first.rows.tolist(), second.rows.tolist()) == ([6, 7], [3, 4])
