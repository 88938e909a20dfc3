"""`report.html`: whole in itself, whatever the data says; never in the way of a finished run; held by W&B too."""

import json
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import evaluate_model
from interlace.data.ledger import Entry, Ledger
from interlace.training import story
from interlace.training.checkpoint import REPORT_FILE
from interlace.training.preference import finetune as prefer
from interlace.training.report import Peak, Story, commands, evaluations, page, panels, time_shares
from interlace.training.supervised import finetune
from tests.accidents import Accident, finish, run_ranks
from tests.page_reader import Browser

Make = Callable[..., dict[str, Any]]
LORA = {"lora": True, "lora_rank": 4, "lora_alpha": 8}
HOSTILE = "</script><script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">\u202e\u2028"


def embedded(path: Path) -> dict[str, Any]:
    """The data inside a page."""
    return json.loads(path.read_text().partition('<script type="application/json" id="data">')[2].partition("</script>")[0])  # type: ignore[no-any-return]


def test_a_run_ends_with_its_story(make_arguments: Make, rows_file: Path, capsys: pytest.CaptureFixture[str], browser: Browser) -> None:
    rows = json.loads(rows_file.read_text())
    rows[1]["conversations"][1]["value"] = rows[5]["conversations"][1]["value"] = HOSTILE
    rows[9] = {**rows[1], "conversations": [rows[1]["conversations"][0], {"from": "gpt", "value": "otherwise"}]}
    rows.append({"image": "gone.png", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]})
    rows_file.write_text(json.dumps(rows))
    dataset = {"train": [{"data_files": str(rows_file)}], "eval": [{"data_files": str(rows_file), "sampling_strategy": "first:6"}]}
    changes = {**LORA, "dataset": dataset, "eval_strategy": "epoch", "eval_on_start": True, "num_train_epochs": 2, "max_steps": -1}
    arguments = make_arguments(rows_file, **changes, bad_rows="skip", run_name=HOSTILE, hub_token="hf_secret", disable_tqdm=False)
    finetune(arguments)
    path = Path(arguments["output_dir"]) / "report.html"
    assert capsys.readouterr().out.rstrip().splitlines()[-1].endswith(str(path)), "the path is the last thing said"
    history = json.loads((path.parent / "trainer_state.json").read_text())["log_history"]
    found = embedded(path)
    losses = [[entry["step"], entry["loss"]] for entry in history if "loss" in entry]
    assert found["panels"][0]["series"][0] == {"name": "loss", "points": losses}
    scores = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert found["evaluations"][0] == {"name": "loss", "first": [0, scores[0]], "last": [losses[-1][0], scores[-1]]}
    assert found["ledger"]["counts"] == {"rows": 25, "trained": 24, "shortened": 0, "skipped": 1}
    assert found["peak"]["forecast"] is not None, found["peak"]
    assert sum(found["peak"]["forecast"].values()) > 200 << 20
    assert "hf_secret" not in path.read_text()
    browser.open(path)
    assert browser.errors == []
    assert [address for address in browser.requests if not address.startswith("data:")] == [path.resolve().as_uri()], "nothing is fetched"
    assert browser.ask("document.title") == f"The run's story: {path.parent}"
    browser.ask("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    shown = browser.ask("document.body.innerText")
    for words in ("missing_image", "gone.png", "conflicts with", "eval_on_start", f"--model-path {path.parent}", "merge_adapter", f"step {losses[-1][0]}"):
        assert words in shown, words
    assert browser.ask("document.querySelectorAll('.curve path').length") >= 5
    assert browser.ask("[...document.querySelectorAll('.suspect img')].every((image) => image.naturalWidth > 0)")
    assert browser.ask("document.querySelectorAll('.suspect img').length") > 0
    assert HOSTILE[:30] in shown
    for width in (1280, 390):
        browser.resize(width, 800)
        assert browser.ask("document.documentElement.scrollWidth") <= width


def test_a_page_that_cannot_be_written_is_one_line_and_the_run_is_finished(
    make_arguments: Make, rows_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Any) -> str:
        raise ZeroDivisionError("https://me:PLANTED@host/")

    monkeypatch.setattr(story, "page", fail)
    arguments = make_arguments(rows_file, **LORA)
    finetune(arguments)
    folder = Path(arguments["output_dir"])
    assert not (folder / "report.html").exists()
    assert (folder / "adapter_model.safetensors").is_file()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert said == ["warning: the model is whole, but the run's report could not be written: ZeroDivisionError: https://***@host/"]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    finetune({**arguments, "resume_from_checkpoint": True})
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def held_back(sign: Path, html: str) -> str:
    while not sign.exists():
        time.sleep(0.05)
    return html


def test_nobody_waits_for_the_page(make_arguments: Make, rows_file: Path, tmp_path: Path) -> None:
    """Others would wait for no longer than ddp_timeout, and a finished run would end as a failed one."""
    slow = Accident("interlace.training.story:page", change=partial(held_back, tmp_path / "go on"))
    main, other = run_ranks(make_arguments(rows_file, **LORA), tmp_path / "logs", 2, {0: [slow]})
    try:
        assert finish(other, 60) == 0
        assert main.is_alive()
        assert (tmp_path / "run" / "trainer_state.json").is_file()
        assert not (tmp_path / "run" / REPORT_FILE).exists()
    finally:
        (tmp_path / "go on").touch()
        code = finish(main)
    assert code == 0
    assert (tmp_path / "run" / REPORT_FILE).is_file()


def test_what_cannot_be_forecast_is_said(make_arguments: Make, rows_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise NotImplementedError("no fake kernel")

    monkeypatch.setattr(story, "forecast_run", fail)
    arguments = make_arguments(rows_file, **LORA)
    finetune(arguments)
    peak = embedded(Path(arguments["output_dir"]) / "report.html")["peak"]
    assert (peak["forecast"], peak["reason"]) == (None, "NotImplementedError: no fake kernel")
    assert peak["measured"] > 100 << 20


def test_wandb_holds_the_page(make_arguments: Make, rows_file: Path, wandb_folder: Path) -> None:
    arguments = make_arguments(rows_file, **LORA, report_to="wandb")
    finetune(arguments)
    (copy,) = wandb_folder.rglob("*.html")
    assert copy.read_text() == (Path(arguments["output_dir"]) / "report.html").read_text()


def test_pairs_have_a_story_without_rows(make_arguments: Make, tmp_path: Path) -> None:
    rows = [{"prompt": f"Which of {i}?", "chosen": f"one {i}", "rejected": f"two {i}"} for i in range(8)]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(rows))
    prefer(make_arguments(path, **LORA))
    found = embedded(tmp_path / "run" / "report.html")
    assert found["rows"] is None
    assert "Reward margin" in [panel["title"] for panel in found["panels"]]
    assert not list((tmp_path / "run").glob("row_*"))


# --- figures ---


def test_curves_are_thinned_but_keep_their_ends_and_leave_out_what_is_not_finite() -> None:
    history = [{"step": step, "loss": float(step % 7)} for step in range(5000)] + [{"step": 5000, "loss": float("nan")}]
    (panel,) = panels(history)
    points = panel["series"][0]["points"]
    assert len(points) == 400
    assert (points[0], points[-1]) == ([0, 0.0], [4999, 4999 % 7])
    assert np.mean([value for _, value in points]) == pytest.approx(3, abs=0.05)


def test_times_are_weighed_by_the_steps_that_a_log_speaks_of() -> None:
    history = [
        {"step": 10, "data_seconds": 1.0, "forward_seconds": 2.0},
        {"step": 12, "data_seconds": 7.0, "forward_seconds": 2.0},
        {"step": 12, "eval_loss": 1.0},
    ]
    assert time_shares(history) == [{"name": "data", "seconds": pytest.approx(2.0)}, {"name": "forward", "seconds": pytest.approx(2.0)}]
    assert evaluations(history) == [{"name": "loss", "first": (12, 1.0), "last": (12, 1.0)}]


def test_commands_hold_for_folders_with_spaces_and_quotes(tmp_path: Path) -> None:
    folder = tmp_path / "it's mine"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    dataset = {"train": [{"data_files": "my rows.json", "image_folder": "my pictures"}]}
    lines = [item["command"] for item in commands(folder, {"dataset": dataset})]
    quoted = "'" + str(folder).replace("'", "'\"'\"'") + "'"
    assert lines[0] == f"python train/predict_multiround.py --model-path {quoted}"
    assert "--data-files 'my rows.json' --image-folder 'my pictures'" in lines[1]
    assert lines[2].startswith(f"python train/merge_adapter.py --adapter-path {quoted} --output-dir ")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"data_files": ["a.json", "b.json"], "media_roots": [], "sampling_strategy": "all"}, "--data-files a.json b.json --output-dir"),
        ({"data_files": "demo", "split": "validation"}, "--data-files demo --split validation"),
        ({"data_files": "demo", "split": "pretrain"}, "no option for split pretrain"),
        ({"data_files": "owner/rows", "split": "test[:100]"}, "no data set from the hub"),
        ({"data_files": "owner/rows"}, "no data set from the hub"),
        ({"data_files": "a.json", "video_folder": "v", "media_roots": ["m"], "format": "llava"}, "no option for video_folder, media_roots, format"),
        ({"data_files": "a.json", "name": "chatml_dataset"}, "no option for name"),
        ({"data_files": "a.json", "sampling_strategy": "first:6"}, "no option for sampling_strategy"),
    ],
)
def test_only_what_can_be_evaluated_as_it_is_has_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: dict[str, Any], words: str) -> None:
    (found,) = (item for item in commands(tmp_path, {"dataset": {"train": [entry]}}) if item["title"] == "Evaluate it")
    assert words in found.get("command", found.get("note", ""))
    assert ("command" in found) is words.startswith("--data-files")
    if "command" in found:
        monkeypatch.setattr(sys, "argv", shlex.split(found["command"])[1:])
        assert evaluate_model.read_options().data_files == ([entry["data_files"]] if isinstance(entry["data_files"], str) else entry["data_files"])
    pairs = commands(tmp_path, {"dataset": {"train": [entry]}}, has_pairs=True)
    assert not any("evaluate_model" in item.get("command", "") for item in pairs)


def test_a_story_of_nothing_is_a_page(browser: Browser, tmp_path: Path) -> None:
    ledger = Ledger.of([Entry("a.json", 0, "skipped", "empty", HOSTILE), None])
    arguments = {"dataset": {"train": [{"data_files": ["a.json", "b.json"]}]}, "model_name_or_path": HOSTILE}
    empty = Story(tmp_path, arguments, ledger, [], 0, 0.0, 0, {}, Peak("cpu", 1, None, HOSTILE))
    (tmp_path / REPORT_FILE).write_text(page(empty), encoding="utf-8")
    browser.open(tmp_path / REPORT_FILE)
    assert browser.errors == []
    assert "Nothing was logged" in browser.ask("document.body.innerText")
