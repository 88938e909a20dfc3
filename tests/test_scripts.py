"""The scripts as a user runs them: outputs, exit codes, messages."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from interlace.data.sample import media_of
from interlace.inference.chat import Dialogue, run_terminal
from interlace.inference.generation import load_generator
from interlace.inference.metrics import exact_match, score
from tests.conftest import DEMO_MODEL, ROOT, fast_first, write_rows


def run(script: str, *words: str | Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train" / script), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, input=text, cwd=ROOT, env=environment, timeout=300, check=False)


def config_file(folder: Path, **changes: Any) -> Path:
    config = {"model_name_or_path": "demo", "output_dir": str(folder / "run"), "dataset": {"train": [{"data_files": str(folder / "rows.json")}]}, **changes}
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def refused(done: subprocess.CompletedProcess[str], folder: Path) -> str:
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1
    assert not (folder / "run").exists()
    return done.stderr


def test_preview_gives_ids_labels_and_status_of_every_row(tmp_path: Path) -> None:
    rows = json.loads(write_rows(tmp_path, 5).read_text())
    rows[3]["image"] = ["pictures/0.png"]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    done = run("preview_data.py", config_file(tmp_path), "--json", tmp_path / "preview.jsonl")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "preview.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["trained"] * 3 + ["skipped", "trained"]
    assert [line["index"] for line in lines] == list(range(5))
    assert [line["num_images"] for line in lines] == [0, 1, 2, None, 0]
    assert set(lines[3]) == {"file", "index", "status", "reason", "length", "num_images"}
    assert "placeholder_mismatch" in lines[3]["reason"]
    image = json.loads((DEMO_MODEL / "config.json").read_text())["image_token_index"]
    for line in [*lines[:3], lines[4]]:
        assert line["length"] == len(line["input_ids"]) == len(line["labels"])
        assert line["input_ids"].count(image) == 4 * line["num_images"]
        assert all(label in (-100, token) for token, label in zip(line["input_ids"], line["labels"], strict=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rows", "expected"),
    fast_first(
        [
            ('[{"conversations": [["q", "a"]]},\n{"conversations"', "line 2"),
            ("", "empty"),
            ('[{"image": "gone.png", "conversations": [["<image>q", "a"]]}, {"conversations": [["<image>q", "a"]]}]', "row 1: placeholder_mismatch"),
            ('[{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss": false}]}]', "row 0: nothing_supervised"),
        ],
        1,
    ),
)
def test_bad_data_ends_with_two_and_one_message(tmp_path: Path, rows: str, expected: str) -> None:
    (tmp_path / "rows.json").write_text(rows)
    assert expected in refused(run("supervised_finetune.py", config_file(tmp_path)), tmp_path)


def test_evaluation_scores_and_rescoring_needs_no_model(tmp_path: Path) -> None:
    data = write_rows(tmp_path, 9)
    video = {"id": "9", "videos": ["pictures"], "conversations": [["<video>How many?", "2"]], "metadata": {"dataset": "video"}}  # a folder of eight frames
    data.write_text(json.dumps([*json.loads(data.read_text()), video]))
    words = ["--data-files", data, "--image-folder", tmp_path, "--max-new-tokens", "8", "--num-frames", "2"]
    done = run("evaluate_model.py", "--model-path", "demo", *words, "--output-dir", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    predictions = [json.loads(line) for line in (tmp_path / "one" / "predictions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in predictions] == [str(i) for i in range(10)]
    assert predictions[9]["metadata"]["num_images"] == 2
    assert all(set(row) == {"id", "prediction", "reference", "metadata"} for row in predictions)
    metrics = json.loads((tmp_path / "one" / "metrics.json").read_text())
    assert {name: value["count"] for name, value in metrics["datasets"].items()} == {"images_0": 3, "images_1": 2, "images_2": 2, "images_3": 2, "video": 1}
    again = run("evaluate_model.py", "--predictions", tmp_path / "one" / "predictions.jsonl", "--output-dir", tmp_path / "two")
    assert again.returncode == 0
    assert (tmp_path / "two" / "metrics.json").read_text() == (tmp_path / "one" / "metrics.json").read_text()


def test_answers_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    data = write_rows(tmp_path, 9)
    outputs = []
    for size in ("1", "9"):
        words = ["--data-files", data, "--max-new-tokens", "8", "--batch-size", size, "--output-dir", tmp_path / size]
        assert run("evaluate_model.py", "--model-path", "demo", *words).returncode == 0
        outputs.append((tmp_path / size / "predictions.jsonl").read_text())
    assert outputs[0] == outputs[1]


def test_scores_by_hand() -> None:
    assert exact_match(" 3 1\n", "3 1") == 1
    assert exact_match("3 1", "3 1 4") == 0
    rows = [
        {"prediction": "a", "reference": "a", "metadata": {"dataset": "x", "num_images": 1}},
        {"prediction": "b", "reference": "a", "metadata": {"dataset": "x", "num_images": 2}},
        {"prediction": "b", "reference": "b", "metadata": {"dataset": "y", "num_images": 2}},
    ]
    metrics = score(rows)
    assert metrics["overall"] == {"score": 2 / 3, "metric": "exact_match", "count": 3}
    assert metrics["datasets"]["x"] == {"score": 0.5, "metric": "exact_match", "count": 2}
    assert metrics["num_images"]["2"]["count"] == 2


def test_chat_sees_images_in_place_over_rounds(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path, 1)
    pictures = [str(tmp_path / "pictures" / f"{i}.png") for i in range(3)]
    dialogue = Dialogue(load_generator("demo"), 8)
    lines = iter(
        [
            f"/image {pictures[0]} {pictures[1]}",
            "Image A: <image>\nImage B: <image>\nRead all",
            "/image gone.png",
            f"/image {pictures[2]}",
            "<image><image>?",
            "And?",
            "",
        ]
    )
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    run_terminal(dialogue)
    shown = capsys.readouterr().out
    assert "gone.png: no such image" in shown
    assert "2 <image> in the question, 1 images attached" in shown
    assert [turn.role for turn in dialogue.turns] == ["user", "assistant", "user", "assistant"]
    assert [image.path for image in media_of(dialogue.turns)] == pictures
    ids = dialogue.generator.prompt(dialogue.turns[:-1]).input_ids
    assert ids.count(dialogue.generator.processing.config.image_token_id) == 12
    dialogue.clear()
    assert dialogue.turns == []


def test_predict_one_shot_and_end_of_input(tmp_path: Path) -> None:
    write_rows(tmp_path, 1)
    picture = tmp_path / "pictures" / "0.png"
    done = run("predict_multiround.py", "--model-path", "demo", "--image-file", picture, "--query", "What digit is this?")
    assert done.returncode == 0
    assert done.stdout.strip().isdigit()
    assert run("predict_multiround.py", "--model-path", "demo", text="What digit?\n").returncode == 0
    bad = run("predict_multiround.py", "--model-path", "demo", "--image-file", "gone.png", "--query", "x")
    assert (bad.returncode, "gone.png" in bad.stderr, "Traceback" in bad.stderr) == (2, True, False)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("merge_adapter.py", ["--adapter-path", "data", "--output-dir", "outputs/never"]),
        ("evaluate_model.py", ["--output-dir", "outputs/never"]),
        ("evaluate_model.py", ["--predictions", "gone.jsonl", "--output-dir", "outputs/never"]),
        ("evaluate_model.py", ["--model-path", "demo", "--data-files", "demo", "--num-frames", "0", "--output-dir", "outputs/never"]),
        ("predict_multiround.py", ["--model-path", "./gone", "--query", "x"]),
        ("preview_data.py", ["gone.json"]),
    ],
)
def test_wrong_paths_end_with_two(script: str, words: list[str]) -> None:
    done = run(script, *words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert not (ROOT / "outputs" / "never").exists()
