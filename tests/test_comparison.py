"""Two models' answers compared: intervals against naive resampling and against theory; rows that changed; predictions of another set."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from interlace.errors import InputError
from interlace.inference import comparison
from interlace.inference.comparison import compare, matched, mean_interval
from tests.test_scripts import run


def row(number: int, prediction: str, reference: str = "a", dataset: str = "x", **metadata: Any) -> dict[str, Any]:
    return {"id": str(number), "prediction": prediction, "reference": reference, "metadata": {"dataset": dataset, "num_images": 1 + number % 2, **metadata}}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_the_interval_is_that_of_drawing_rows_one_by_one() -> None:
    random = np.random.default_rng(7)
    for values in (random.choice([-1.0, 0.0, 1.0], 37, p=[0.1, 0.5, 0.4]), random.uniform(-1, 1, 60)):
        naive = [float(np.mean([values[i] for i in random.integers(0, len(values), len(values))])) for _ in range(10_000)]
        assert mean_interval(values) == pytest.approx(np.quantile(naive, [0.025, 0.975]), abs=0.02)


def test_the_interval_of_many_rows_is_the_normal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.repeat([0.0, 1.0], [7_000, 3_000])
    half = 1.96 * np.sqrt(0.3 * 0.7 / 10_000)
    assert mean_interval(values) == pytest.approx((0.3 - half, 0.3 + half), abs=5e-4)
    monkeypatch.setattr(comparison, "_FEW_VALUES", 1)  # drawn row by row: another stream, the same distribution
    assert mean_interval(values) == pytest.approx((0.3 - half, 0.3 + half), abs=5e-4)


def test_intervals_are_seeded_and_none_for_one_row() -> None:
    values = np.array([0.0, 1.0, 0.5, -1.0])
    assert mean_interval(values, 3) == mean_interval(values, 3)
    assert mean_interval(values, 3) != mean_interval(np.array([0.0, 0.9, 0.4, -1.0]), 3)
    assert mean_interval(np.array([1.0])) is None and mean_interval(np.array([])) is None
    assert mean_interval(np.ones(5)) == (1.0, 1.0)


def test_the_interval_is_of_pairs() -> None:
    """Two models that differ in one row of a hundred: their scores vary widely over resamples, their difference does not."""
    before = [row(i, "a" if i % 2 else "b") for i in range(100)]
    after = copy.deepcopy(before)
    after[0]["prediction"] = "a"
    low, high = compare(before, after)["overall"]["interval"]
    assert (low, high) == pytest.approx((0.0, 0.03), abs=0.011)


def test_changes_by_hand() -> None:
    before = [row(0, "b"), row(1, "a"), row(2, "b"), row(3, "a", dataset="y"), row(4, "b", dataset="y")]
    after = [row(0, "a"), row(1, "b"), row(2, "c"), row(3, "a", dataset="y"), row(4, "a", dataset="y")]
    found = compare(before, after)
    counts = ("count", "before", "after", "gained", "lost", "both_right", "both_wrong")
    assert [found["overall"][name] for name in counts] == [5, 0.4, 0.6, 2, 1, 1, 1]
    assert [found["datasets"]["x"][name] for name in counts] == [3, 1 / 3, 1 / 3, 1, 1, 0, 1]
    assert found["datasets"]["y"]["difference"] == 0.5
    assert [found["num_images"][name]["count"] for name in ("1", "2")] == [3, 2]
    assert {kind: [example["id"] for example in rows] for kind, rows in found["rows"].items()} == {"gained": ["0", "4"], "lost": ["1"], "both_wrong": ["2"]}
    assert found["rows"]["lost"][0] == dict(id="1", dataset="x", reference="a", before="a", after="b", score_before=1.0, score_after=0.0)


def test_rows_that_a_rule_leaves_out_are_left_out() -> None:
    before, after = ([row(0, text), row(1, text, reference="", question_type="open-ended")] for text in ("b", "a"))
    assert compare(before, after)["overall"]["count"] == 1


def test_rows_are_matched_by_id_and_scored_alike() -> None:
    earlier = [row(0, "1"), row(1, "2", dataset="y"), row(5, "3")]
    found = matched(earlier, [{**earlier[i], "prediction": "", "metadata": {"metric": "anls"}} for i in (2, 0, 1)])
    assert [(old["prediction"], old["metadata"]) for old in found] == [(text, {"metric": "anls"}) for text in ("3", "1", "2")]


def test_predictions_of_another_set_are_refused_with_all_problems() -> None:
    earlier = [row(i, "a") for i in range(30)]
    rows = [row(0, "a", reference="other"), *(row(i, "a") for i in range(1, 10)), row(77, "a")]
    with pytest.raises(InputError) as caught:
        matched(earlier, rows)
    message = str(caught.value)
    assert "no earlier prediction for 1 row (77)" in message
    assert "no row for 20 earlier predictions (10, 11, 12, 13, 14, and 15 more)" in message
    assert "another reference in 1 row (0)" in message


def test_two_files_are_compared_without_a_model(tmp_path: Path) -> None:
    before = write(tmp_path / "before" / "predictions.jsonl", [row(i, "a" if i % 3 else "b") for i in range(30)])
    after = write(tmp_path / "after.jsonl", [row(i, "a" if i % 4 else "b") for i in range(30)])
    done = run("evaluate_model.py", "--predictions", after, "--compare-with", before.parent, "--output-dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())["overall"]
    assert (found["gained"], found["lost"]) == (7, 5)
    assert "+6.7%" in done.stdout and str(tmp_path / "out" / "evaluation.html") in done.stdout
    assert not (tmp_path / "out" / "diagnostics.json").exists()


@pytest.mark.parametrize(
    ("rows", "words", "expected"),
    [
        ([row(1, "a")], [], "no earlier prediction for 1 row (0)"),
        ([row(0, "a", reference="z")], [], "another reference in 1 row (0)"),
        ([row(0, "a")], ["--diagnose"], "do not go with --predictions"),
        ([row(0, "a")], ["--report-rows", "-1"], "expected at least 0"),
        (None, [], "cannot be read"),
    ],
)
def test_wrong_input_writes_nothing(tmp_path: Path, rows: list[dict[str, Any]] | None, words: list[str], expected: str) -> None:
    after = write(tmp_path / "after.jsonl", [row(0, "a")])
    if rows is not None:
        write(tmp_path / "before.jsonl", rows)
    done = run("evaluate_model.py", "--predictions", after, "--compare-with", tmp_path / "before.jsonl", "--output-dir", tmp_path / "out", *words)
    assert (done.returncode, expected in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr
    assert not (tmp_path / "out").exists()


def test_the_earlier_predictions_are_never_overwritten(tmp_path: Path) -> None:
    before = write(tmp_path / "out" / "predictions.jsonl", [row(0, "a")])
    text = before.read_text()
    done = run("evaluate_model.py", "--model-path", "demo", "--data-files", "demo", "--compare-with", tmp_path / "out", "--output-dir", tmp_path / "out")
    assert done.returncode == 2 and "would overwrite" in done.stderr
    assert before.read_text() == text


def test_ids_are_held_against_the_data_before_anything_is_generated(tmp_path: Path) -> None:
    before = write(tmp_path / "before.jsonl", [row(0, "a")])
    words = ["--model-path", "demo", "--data-files", "demo", "--split", "validation", "--max-new-tokens", "100000", "--batch-size", "1"]
    done = run("evaluate_model.py", *words, "--compare-with", before, "--output-dir", tmp_path / "out")
    assert done.returncode == 2 and "no earlier prediction for 1,400 rows" in done.stderr and "generating" not in done.stderr
    assert not (tmp_path / "out").exists()
