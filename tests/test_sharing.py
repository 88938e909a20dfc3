"""Rows that begin with the same images and text: computed once, with the losses and gradients of rows that stand alone."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from interlace.arguments import SCHEMA_PATH
from interlace.data.batch import Collator, NumberedRows, PackedBatch
from interlace.data.dataset import Rows, load_rows
from interlace.data.sources import read_entries
from interlace.errors import InputError
from interlace.model.costs import shape_of, step_costs
from interlace.model.forward import model_inputs
from interlace.model.loading import load_model, load_processing
from interlace.model.tuning import tune
from interlace.training.forecast import micro_shapes
from interlace.training.outline import empty_model
from interlace.training.parts import row_reader, training_arguments
from interlace.training.planning import columns_of, tokens_of, training_plan
from interlace.training.supervised import finetune
from tests.conftest import IMAGE_TOKENS
from tests.test_equivalence import SETUPS, backward, score, tuned_model
from tests.test_families import make_model
from tests.test_training import losses

Make = Callable[..., dict[str, Any]]


def write_pictures(folder: Path, count: int) -> list[str]:
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for i in range(count):
        PIL.Image.fromarray(np.random.RandomState(i).randint(0, 255, (24, 20 + i, 3), np.uint8)).save(folder / "pictures" / f"{i}.png")
    return [f"pictures/{i}.png" for i in range(count)]


def row(images: Sequence[str], *texts: str) -> dict[str, Any]:
    turns = [{"from": "human" if i % 2 == 0 else "gpt", "value": text} for i, text in enumerate(texts)]
    return {"image": list(images), "conversations": turns}


def awkward_rows(folder: Path) -> list[dict[str, Any]]:
    """Three rows of one scene; the same question with two answers; images in other order; an image after the first answer; a row alone; no image."""
    a, b, c, d = write_pictures(folder, 4)
    scene = "<image>\n<image>\nWhere "
    return [
        row([a, b], scene + "is it?", "left"),
        row([a, b], scene + "was it seen last, and by whom?", "right of the door"),
        row([c], "<image>\nWhich digit?", "digit 3"),
        row([a, b], scene + "is it?", "behind the table"),
        row([b, a], scene + "is it?", "left"),
        row([], "Which digit is the largest?", "digit 9"),
        row([a, b, c], scene + "is it?", "left", "And here? <image>", "up"),
        row([a, b, d], scene + "is it?", "left", "And here? <image>", "up"),
        row([d], "Look: <image> Which digit?", "digit 1"),
        row([c], "<image>\n<b>", "digit 3"),
    ]


def read_rows(folder: Path, model_dir: Path, rows: list[dict[str, Any]]) -> Rows:
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    spec = json.loads(SCHEMA_PATH.read_text())["properties"]
    arguments = {name: key.get("default") for name, key in spec.items()} | {"max_length": 4096, "too_long": "error"}
    return load_rows(read_entries([{"data_files": str(path)}], 0), row_reader(arguments, load_processing(str(model_dir))), arguments, False)[0]


def pack(model_dir: Path, rows: Rows, numbers: Sequence[int], share_prefix: bool) -> PackedBatch:
    processing = load_processing(str(model_dir))
    numbered = NumberedRows(rows)
    return Collator(processing.process_images, processing.config.image_token_id, share_prefix).pack([numbered[number] for number in numbers])


def by_row(batch: PackedBatch, values: torch.Tensor) -> dict[int, list[float]]:
    return {number: values[batch.sequence_index == i].tolist() for i, number in enumerate(batch.row_numbers)}


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_shared_rows_score_and_learn_as_they_do_alone(tiny_dir: Path, tmp_path: Path, setup: str) -> None:
    rows = read_rows(tmp_path, tiny_dir, awkward_rows(tmp_path))
    numbers = [3, 0, 2, 6, 1, 8, 9, 4, 5, 7]
    tuned = tuned_model(tiny_dir, **SETUPS[setup])
    alone = [pack(tiny_dir, rows, [number], share_prefix=False) for number in numbers]
    together = pack(tiny_dir, rows, numbers, share_prefix=True)
    assert len([segment for segment in together.segments if segment.parent >= 0]) == 5 + 2  # the scene, and the picture with two questions
    assert together.num_tokens < sum(batch.num_tokens for batch in alone)
    with torch.no_grad():
        found = by_row(together, score(tuned, together).log_probs)
        for number, batch in zip(numbers, alone, strict=True):
            torch.testing.assert_close(torch.tensor(found[number]), score(tuned, batch).log_probs, rtol=1e-5, atol=1e-5)
    loss, gradients = backward(tuned, [together])
    expected, separate = backward(tuned, alone)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert set(gradients) == set(separate)
    whole = torch.stack([gradient.norm() for gradient in separate.values()]).norm()
    for name, gradient in separate.items():  # some are zero but for rounding: a bias of keys moves no attention
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7 * whole, name


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_shared_images_that_are_cut_into_tiles(tmp_path: Path, family: str) -> None:
    (tmp_path / "model").mkdir()
    model_dir = make_model(family, tmp_path / "model")
    rows = read_rows(tmp_path, model_dir, awkward_rows(tmp_path))
    tuned = tune(load_model(str(model_dir), torch.float32), ["projector", "language_model"], None, None)
    together, alone = pack(model_dir, rows, range(10), share_prefix=True), [pack(model_dir, rows, [number], share_prefix=False) for number in range(10)]
    with torch.no_grad():
        found = by_row(together, tuned.packed(**model_inputs(together, tuned.tower)).log_probs)
        for number, batch in enumerate(alone):
            expected = tuned.packed(**model_inputs(batch, tuned.tower)).log_probs
            torch.testing.assert_close(torch.tensor(found[number]), expected, rtol=1e-5, atol=1e-5)


def test_the_trunk_ends_before_what_differs_and_before_any_answer(tiny_dir: Path, tmp_path: Path) -> None:
    rows = read_rows(tmp_path, tiny_dir, awkward_rows(tmp_path))
    same_question = pack(tiny_dir, rows, [0, 3], share_prefix=True)
    trunk, *leaves = same_question.segments
    alone = pack(tiny_dir, rows, [0], share_prefix=False)
    assert trunk.end == int(alone.rows[0]) + 1  # the whole prompt, whose last token says the first one of both answers
    assert same_question.rows[same_question.row_index].tolist().count(trunk.end - 1) == 2 and same_question.rows.tolist().count(trunk.end - 1) == 1
    assert [leaf.parent for leaf in leaves] == [0, 0]
    assert same_question.position_ids[0, leaves[1].start] == trunk.end
    other_question = pack(tiny_dir, rows, [0, 1], share_prefix=True)
    ids = [pack(tiny_dir, rows, [number], share_prefix=False).input_ids[0].tolist() for number in (0, 1)]
    assert other_question.segments[0].end == next(i for i, (first, second) in enumerate(zip(*ids, strict=False)) if first != second)
    assert len(pack(tiny_dir, rows, [0, 4], share_prefix=True).segments) == 2  # the same images in another order are another prefix
    filler = pack(tiny_dir, rows, [0, ~0], share_prefix=True)
    assert filler.weights[filler.sequence_index == 1].sum() == 0 < filler.weights[filler.sequence_index == 0].sum()


def test_the_forecast_sees_the_shapes_that_are_trained(make_arguments: Make, tiny_dir: Path, tmp_path: Path) -> None:
    """Tokens, pairs, images and supervised tokens of every planned micro-batch. Where questions begin alike, the trunk is longer than was planned."""
    scenes = write_pictures(tmp_path, 12)
    written = [row(scenes[3 * s : 3 * s + 3], "<image><image><image>" + "ABCDEFGHIJ"[q] + " where?", f"at {q}") for s in range(4) for q in range(10)]
    rows = read_rows(tmp_path, tiny_dir, written)
    arguments = make_arguments(tmp_path / "rows.json", share_prefix=True, max_rows_per_prefix=5)
    config = load_processing(str(tiny_dir)).config
    plan = training_plan(rows, config, step_costs(empty_model(config, arguments)), arguments, training_arguments(arguments))
    batches = [batch for step in plan.steps(0) for batch in step]
    shapes = micro_shapes(batches, columns_of(rows, config), plan.prefixes)
    packed = [pack(tiny_dir, rows, batch, share_prefix=True) for batch in batches]
    assert [shape.shape() for shape in shapes] == [shape_of(batch) for batch in packed]
    assert sum(batch.num_tokens for batch in packed) == tokens_of(plan) < rows.lengths.sum()


def test_forty_questions_about_sixteen_frames_cost_a_seventh_of_the_tokens(make_arguments: Make, tiny_dir: Path, tmp_path: Path) -> None:
    """Like ScanQA, at 8 rows per prefix: tokens of all planned batches as they are collated, an image token of the tiny model standing for its share of 729."""
    frames, randomness = write_pictures(tmp_path, 48), random.Random(0)
    questions = [("".join(randomness.choices("abcdefgh", k=randomness.randint(4, 9))), "".join(randomness.choices("ij", k=3))) for _ in range(40)]
    written = [row(frames[16 * s : 16 * s + 16], "<image>" * 16 + f"{question}?", answer) for s in range(3) for question, answer in questions]
    rows = read_rows(tmp_path, tiny_dir, written)
    arguments = make_arguments(tmp_path / "rows.json", share_prefix=True)
    config = load_processing(str(tiny_dir)).config
    plan = training_plan(rows, config, step_costs(empty_model(config, arguments)), arguments, training_arguments(arguments))
    batches = [batch for step in plan.steps(0) for batch in step]

    def real_tokens(batch: PackedBatch) -> float:
        return batch.num_tokens + len(batch.image_positions) * (729 / IMAGE_TOKENS - 1)

    together = sum(real_tokens(pack(tiny_dir, rows, batch, share_prefix=True)) for batch in batches)
    assert sum(real_tokens(pack(tiny_dir, rows, [number], share_prefix=False)) for number in range(len(rows))) / together >= 7
    assert max(sum(other // 40 == number // 40 for other in batch) for batch in batches for number in batch) == 8


def test_a_run_that_shares_learns_what_one_that_does_not_learns(make_arguments: Make, tmp_path: Path) -> None:
    """All rows in every step, however they are packed: losses of three steps."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(awkward_rows(tmp_path) * 2))
    whole = {"max_tokens_per_batch": 4000, "max_steps": 3, "lr_scheduler_type": "constant"}
    plain = make_arguments(path, **whole, output_dir=str(tmp_path / "plain"))
    shared = make_arguments(path, **whole, share_prefix=True, output_dir=str(tmp_path / "shared"))
    finetune(plain)
    finetune(shared)
    assert losses(shared["output_dir"]) == pytest.approx(losses(plain["output_dir"]), rel=1e-5)


def test_it_is_said_what_is_shared_and_that_nothing_is(make_arguments: Make, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(awkward_rows(tmp_path)))
    finetune(make_arguments(path, share_prefix=True, max_steps=1))
    assert "shared prefixes: " in capsys.readouterr().out
    path.write_text(json.dumps(awkward_rows(tmp_path)[2:7:2]))
    finetune(make_arguments(path, share_prefix=True, max_steps=1, output_dir=str(tmp_path / "alone")))
    assert "share_prefix: no two rows begin with the same images and text" in capsys.readouterr().out


def test_a_budget_below_the_longest_row_is_refused_with_the_row(make_arguments: Make, rows_file: Path) -> None:
    with pytest.raises(InputError, match=r"max_tokens_per_batch: 20 is less than .*rows\.json: row \d+ with \d+ tokens; set it to \d+ at least"):
        finetune(make_arguments(rows_file, max_tokens_per_batch=20))
