"""Answers to evaluation rows during training: what is asked, scored, kept and shown."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import wandb

from interlace.arguments import SCHEMA_PATH, resolve
from interlace.errors import InputError
from interlace.inference.evaluation import predict, read_questions
from interlace.inference.generation import load_generator
from interlace.inference.metrics import score
from interlace.training.checkpoint import Checkpoint
from interlace.training.resume import begin_branch
from interlace.training.supervised import finetune
from interlace.training.weights_and_biases import STRIP_HEIGHT, side_by_side
from tests.conftest import fast_first, write_rows

Make = Callable[..., dict[str, Any]]


def history(folder: str) -> list[dict[str, float]]:
    entries: list[dict[str, float]] = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    return entries


def count_images(path: Path) -> None:
    """Gives the rows in `path` answers that can be learned: how many images there are."""
    rows = json.loads(path.read_text())
    for row in rows:
        row["conversations"] = [row["conversations"][0], {"from": "gpt", "value": f"digit {len(row.get('image', []))}"}]
    path.write_text(json.dumps(rows))


@pytest.mark.parametrize(
    "changes",
    fast_first(
        [
            {"lora": True, "lora_rank": 4},
            {"tunable_parts": "vision_tower,projector,language_model"},
            # 16 bits round otherwise in training than afterwards: answers are the same once the model has made up its mind
            {"lora": True, "bf16": True, "gradient_checkpointing": True, "max_steps": 60, "eval_steps": 30},
        ],
        1,
    ),
)
def test_a_run_answers_as_its_result_does_afterwards_and_trains_as_it_would_without(
    rows_file: Path, tmp_path: Path, make_arguments: Make, changes: dict[str, Any]
) -> None:
    test_rows = write_rows(tmp_path / "test", 10, seed=1)
    count_images(rows_file)
    count_images(test_rows)
    dataset = {"train": [{"data_files": str(rows_file)}], "eval": [{"data_files": str(test_rows)}]}
    asks = {"eval_generate": True, "eval_generate_rows": 6, "eval_generate_max_new_tokens": 6, "eval_on_start": True, "per_device_eval_batch_size": 4}
    given = {"dataset": dataset, "eval_strategy": "steps", "eval_steps": 2, **changes}
    every = given["eval_steps"]
    losses = []
    for name, more in (("asked", asks), ("silent", {})):
        arguments = make_arguments(rows_file, **given, **more, output_dir=str(tmp_path / name))
        finetune(arguments)
        losses.append([entry["loss"] for entry in history(arguments["output_dir"]) if "loss" in entry])
    assert losses[0] == losses[1]
    written = [
        [json.loads(line) for line in (tmp_path / "asked" / "eval_answers" / f"step-{step}.jsonl").read_text().splitlines()] for step in (0, every, 2 * every)
    ]
    logged = [entry for entry in history(str(tmp_path / "asked")) if "eval_score" in entry]
    assert [entry["eval_score"] for entry in logged] == [score(rows)["overall"]["score"] for rows in written]
    assert {name for name in logged[-1] if name.startswith("eval_score/")} == {f"eval_score/{name}" for name in score(written[-1])["datasets"]}
    assert [row["id"] for row in written[0]] == ["0", "1", "3", "5", "7", "9"]
    assert logged[-1]["eval_score"] == 1 or not changes.get("bf16")
    generator = load_generator(str(tmp_path / "asked"), "bfloat16" if changes.get("bf16") else None)
    outcomes = read_questions({"data_files": str(test_rows)}, generator)
    expected = [row for row in predict(generator, outcomes, 4, 6) if row["id"] in {row["id"] for row in written[-1]}]
    assert [{**row, "metadata": None} for row in written[-1]] == [{**row, "metadata": None} for row in expected]
    assert not (tmp_path / "silent" / "eval_answers").exists()


def test_the_best_checkpoint_may_be_chosen_by_the_score(rows_file: Path, tmp_path: Path, make_arguments: Make) -> None:
    dataset = {"train": [{"data_files": str(rows_file)}], "eval": [{"data_files": str(rows_file)}]}
    chooses = {"load_best_model_at_end": True, "metric_for_best_model": "eval_score", "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    asks = {"eval_generate": True, "eval_generate_rows": 12, "eval_generate_max_new_tokens": 6, "eval_strategy": "steps", "eval_steps": 2}
    arguments = make_arguments(rows_file, dataset=dataset, max_steps=20, **asks, **chooses)
    finetune(arguments)
    state = json.loads((Path(arguments["output_dir"]) / "trainer_state.json").read_text())
    scores = {entry["step"]: entry["eval_score"] for entry in state["log_history"] if "eval_score" in entry}
    assert state["best_metric"] == max(scores.values()) > 0
    assert scores[state["best_global_step"]] == state["best_metric"]


def test_the_best_checkpoint_may_be_chosen_by_the_score_of_the_only_data_set(rows_file: Path, tmp_path: Path, make_arguments: Make) -> None:
    rows_file.write_text(json.dumps([{**row, "metadata": {}} for row in json.loads(rows_file.read_text())]))
    dataset = {"train": [{"data_files": str(rows_file)}], "eval": [{"data_files": str(rows_file), "name": "digits"}]}
    asks = {"eval_generate": True, "eval_generate_rows": 4, "eval_generate_max_new_tokens": 4, "eval_strategy": "steps", "eval_steps": 2}
    chooses = {**asks, "dataset": dataset, "load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2}
    with pytest.raises(InputError, match=r"no question is of a data set 'digit'; did you mean 'digits'\?; expected eval_score, or .* digits "):
        finetune(make_arguments(rows_file, **chooses, metric_for_best_model="eval_score/digit"))
    assert not (tmp_path / "run").exists()
    finetune(make_arguments(rows_file, **chooses, metric_for_best_model="eval_score/digits"))
    scores = [(entry["eval_score/digits"], entry["eval_score"]) for entry in history(str(tmp_path / "run")) if "eval_score" in entry]
    assert len(scores) == 2 and all(one == whole for one, whole in scores)
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["best_metric"] == max(scores)[0]


def test_answers_that_cannot_be_written_do_not_end_the_run(rows_file: Path, tmp_path: Path, make_arguments: Make, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = {"train": [{"data_files": str(rows_file)}], "eval": [{"data_files": str(rows_file)}]}
    asks = {"eval_generate": True, "eval_generate_rows": 4, "eval_generate_max_new_tokens": 4, "eval_strategy": "steps", "eval_steps": 2}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "eval_answers").touch()  # no folder can be made there
    finetune(make_arguments(rows_file, dataset=dataset, **asks))
    assert [entry["step"] for entry in history(str(tmp_path / "run")) if "eval_score" in entry] == [2, 4]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert [line.partition(" could not be written: ")[0] for line in said] == [f"warning: the answers of step {step}" for step in (2, 4)]


def test_answers_go_with_their_run(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "run", tmp_path / "other"
    answers = folder / "eval_answers"

    def left_by(begin: Callable[[], object]) -> set[str]:
        answers.mkdir(parents=True, exist_ok=True)
        for step in (0, 4, 12):
            (answers / f"step-{step}.jsonl").touch()
        begin()
        return {path.name for path in answers.glob("*")}

    assert left_by(lambda: begin_branch(folder, Checkpoint(folder / "checkpoint-4", 4, {}), False)) == {"step-0.jsonl", "step-4.jsonl"}
    assert left_by(lambda: begin_branch(folder, Checkpoint(elsewhere / "checkpoint-4", 4, {}), False)) == set()
    assert left_by(lambda: begin_branch(folder, None, False)) == {"step-0.jsonl", "step-4.jsonl", "step-12.jsonl"}
    assert left_by(lambda: begin_branch(folder, None, True)) == set()
    assert not answers.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "eval_generate needs eval_strategy"),
        ({"eval_generate": False, "eval_strategy": "epoch", "metric_for_best_model": "eval_score"}, "metric_for_best_model: expected eval_loss"),
        ({"eval_strategy": "epoch", "metric_for_best_model": "eval_scores"}, "or eval_score or"),
        ({"eval_strategy": "epoch", "eval_generate_rows": 0}, "eval_generate_rows: expected at least 1"),
    ],
)
def test_what_cannot_be_asked_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    dataset = {"train": [{"data_files": "demo"}], "eval": [{"data_files": "demo"}]}
    config = {"model_name_or_path": "demo", "output_dir": str(tmp_path), "dataset": dataset, "eval_generate": True, **changes}
    problems = resolve(config, json.loads(SCHEMA_PATH.read_text())["properties"], dict.fromkeys(config, "test"))[1]
    assert any(message in problem for problem in problems), problems


def test_images_stand_side_by_side() -> None:
    images = [PIL.Image.new("RGB", size, color) for size, color in (((10, 20), "red"), ((2000, 1000), "blue"), ((3, 900), "lime"))]
    strip = side_by_side(images)
    assert strip.size == (10 + 4 + 2 * STRIP_HEIGHT + 4 + 1, STRIP_HEIGHT)
    assert strip.getpixel((9, 19)) == (255, 0, 0) and strip.getpixel((9, 20)) == (255, 255, 255)
    assert strip.getpixel((14, STRIP_HEIGHT - 1)) == (0, 0, 255) and strip.getpixel((strip.width - 1, 0)) == (0, 255, 0)


def test_wandb_shows_answers_with_their_images(
    rows_file: Path, tmp_path: Path, wandb_folder: Path, make_arguments: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[Any, ...]] = []
    add = wandb.Table.add_data
    monkeypatch.setattr(wandb.Table, "add_data", lambda table, *row: (shown.append(row), add(table, *row))[1])
    dataset = {"train": [{"data_files": str(rows_file)}], "eval": [{"data_files": str(rows_file)}]}
    asks = {"eval_generate": True, "eval_generate_rows": 4, "eval_generate_max_new_tokens": 4, "eval_strategy": "steps", "eval_steps": 2}
    finetune(make_arguments(rows_file, dataset=dataset, report_to="wandb", **asks))
    assert len(shown) == 8 and len(list(wandb_folder.rglob("eval/answers*.table.json"))) == 2
    for rows, step in ((shown[:4], 2), (shown[4:], 4)):
        answers = [json.loads(line) for line in (tmp_path / "run" / "eval_answers" / f"step-{step}.jsonl").read_text().splitlines()]
        assert [row[:2] for row in rows] == [(step, row["id"]) for row in answers]
        assert [row[4:] for row in rows] == [(row["prediction"], row["reference"]) for row in answers]
        assert [row[2].image.height > 1 for row in rows] == [row["metadata"]["num_images"] > 0 for row in answers]
