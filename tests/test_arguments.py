"""Arguments: strict, complete, quick."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from interlace import argument_schema
from interlace.argument_help import HUGGING_FACE_KEYS, REFUSED, RENAMED
from interlace.arguments import SCHEMA_PATH, read_command_line
from interlace.errors import InputError
from interlace.redaction import without_secrets

ROOT = Path(__file__).parents[1]
SCHEMA = json.loads(SCHEMA_PATH.read_text())
GOOD = {"model_name_or_path": "demo", "output_dir": "out", "dataset": {"train": [{"data_files": "demo"}]}}


def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Any, *words: str) -> dict[str, Any]:
    path = tmp_path / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    monkeypatch.setattr(sys, "argv", ["script", str(path), *words])
    return read_command_line("test")[0]


def problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Any, *words: str) -> str:
    with pytest.raises(InputError) as caught:
        read(tmp_path, monkeypatch, config, *words)
    return str(caught.value)


def test_schema_file_is_what_the_dataclasses_generate() -> None:
    assert argument_schema.build_schema() == SCHEMA, "run `make schema`"


def test_schema_is_valid_json_schema_and_accepts_every_shipped_config() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for path in sorted((ROOT / "configs").rglob("*_argument.json")):
        jsonschema.validate(json.loads(path.read_text()), SCHEMA)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*_argument.json")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_config_parses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["script", str(path)])
    assert read_command_line("test")[0]["output_dir"]


def test_every_hugging_face_key_has_help_and_the_tables_name_real_keys() -> None:
    keys = SCHEMA["properties"]
    assert set(HUGGING_FACE_KEYS) <= set(keys)
    assert set(REFUSED) <= set(keys)
    assert set(RENAMED.values()) <= set(keys)
    assert all(keys[name].get("description") for name in keys)


def test_all_problems_come_at_once_with_file_key_got_expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {
        "model_name_or_pth": "demo",
        "output_dir": "out",
        "dataset": {"train": [{"data_files": "demo", "image_foldr": "x"}]},
        "learning_rate": "2e-5",
        "bf16": "false",
        "lora_rank": 0,
        "max_steps": 5.0,
        "lr_scheduler_type": "cosin",
    }
    text = problems(tmp_path, monkeypatch, config, "--num_train_epochs", "-3")
    for expected in (
        "model_name_or_pth: unknown key; did you mean 'model_name_or_path'?",
        "image_foldr: unknown key; did you mean 'image_folder'?",
        'learning_rate: expected number, got string "2e-5"; write 2e-5 without quotes',
        'bf16: expected boolean, got string "false"',
        "lora_rank: expected at least 1, got 0",
        "max_steps: expected integer, got number 5.0",
        "did you mean 'cosine'?",
        "command line: num_train_epochs: expected more than 0, got -3",
        "model_name_or_path: missing",
    ):
        assert expected in text
    assert str(tmp_path / "config.json") in text


def test_duplicate_keys_and_nan_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = problems(tmp_path, monkeypatch, '{"output_dir": "a", "output_dir": "b", "learning_rate": NaN}')
    assert "duplicate key 'output_dir'" in text
    assert "NaN is no JSON number" in text


def test_json_that_ends_in_the_middle_names_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "line 2" in problems(tmp_path, monkeypatch, '{"output_dir": "a",\n "dataset": {')


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"bf16": True, "fp16": True}, "bf16 and fp16"),
        ({"eval_strategy": "steps"}, "needs dataset.eval"),
        ({"lora_path": "x"}, "lora_path needs lora"),
        ({"lora": True, "lora_path": "x", "lora_rank": 4}, "already decides it"),
        ({"max_bad_rows": 3}, "max_bad_rows needs bad_rows"),
        ({"resume_from_checkpoint": True, "overwrite_output_dir": True}, "choose one"),
        ({"load_in_4bit": True}, "need lora"),
        ({"label_smoothing_factor": 0.1}, "cannot be honoured"),
        ({"neftune_noise_alpha": 5}, "cannot be honoured"),
        ({"optim": "schedule_free_adamw"}, "optim: 'schedule_free_adamw' cannot be honoured: a checkpoint could not hold"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], expected: str) -> None:
    assert expected in problems(tmp_path, monkeypatch, {**GOOD, **changes})


def test_overrides_are_json_unless_the_key_is_a_string(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--learning_rate=1e-4", "--lora", "true", "--run_name", "12", "--output_dir", "7", "--lora_target_modules", '["q_proj"]')
    arguments = read(tmp_path, monkeypatch, GOOD, *words)
    assert arguments["learning_rate"] == 1e-4
    assert arguments["lora"] is True
    assert arguments["output_dir"] == "7"
    assert arguments["lora_target_modules"] == ["q_proj"]


@pytest.mark.parametrize("before", [True, False])
def test_launchers_local_rank_is_accepted_on_either_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(GOOD))
    words = ["--local_rank=3", str(path)] if before else [str(path), "--local_rank=3"]
    monkeypatch.setattr(sys, "argv", ["script", *words])
    assert read_command_line("test")[0]["output_dir"] == "out"


def test_names_from_other_tools_are_understood_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = read(tmp_path, monkeypatch, {**GOOD, "recompute": True, "mm_projector_lr": 1e-4})
    assert arguments["gradient_checkpointing"] is True
    assert arguments["projector_learning_rate"] == 1e-4
    assert "recompute is read as gradient_checkpointing" in capsys.readouterr().err


def one_edit(word: str, randomness: random.Random) -> str:
    place, letter = randomness.randrange(len(word)), randomness.choice("abcdefghijklmnopqrstuvwxyz_")
    kind = randomness.randrange(4)
    if kind == 0:
        return word[:place] + word[place + 1 :]
    if kind == 1:
        return word[:place] + letter + word[place:]
    if kind == 2:
        return word[:place] + letter + word[place + 1 :]
    place = min(place, len(word) - 2)
    return word[:place] + word[place + 1] + word[place] + word[place + 2 :]


def test_one_edit_typos_get_the_right_suggestion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    randomness, keys = random.Random(0), [key for key in SCHEMA["properties"] if key != "$schema"]
    right = total = 0
    while total < 200:
        key = randomness.choice(keys)
        typo = one_edit(key, randomness)
        if typo in SCHEMA["properties"] or typo in RENAMED:
            continue
        total += 1
        right += f"{typo}: unknown key; did you mean {key!r}?" in problems(tmp_path, monkeypatch, {**GOOD, typo: 1})
    assert right >= 190


def test_secrets_are_left_out() -> None:
    assert without_secrets({"hub_token": "hf_x", "seed": 1}) == {"seed": 1}


@pytest.mark.parametrize("words", [["--help"], ["missing.json"]])
def test_help_and_errors_answer_without_heavy_imports(words: list[str]) -> None:
    start = time.perf_counter()
    code = "import sys, runpy\nsys.argv = sys.argv[1:]\ntry:\n    runpy.run_path(sys.argv[0], run_name='__main__')\nfinally:\n    print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "train/supervised_finetune.py", *words], capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": "train"}
    )
    assert time.perf_counter() - start < 60  # a hang guard; the promise of 2 seconds rests on the line below
    assert done.stdout.strip().endswith("False")
    assert done.returncode == (0 if words == ["--help"] else 2)
    if words == ["--help"]:
        assert all(f"--{key} " in done.stdout for key in SCHEMA["properties"] if key != "$schema")
