"""Arguments: strict, complete, quick."""

import json
import random
import subprocess
import sys
import time
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from interlace import argument_schema
from interlace.argument_help import HUGGING_FACE_KEYS, REFUSED
from interlace.arguments import SCHEMA_PATH, read_command_line, resolve
from interlace.errors import InputError
from interlace.foreign_arguments import INSTEAD, RENAMED, WITHOUT_EFFECT
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


def test_every_shipped_config_writes_into_a_folder_of_its_own() -> None:
    folders = [json.loads(path.read_text())["output_dir"] for path in (ROOT / "configs").rglob("*_argument.json")]
    assert len(folders) > 30 and len(set(folders)) == len(folders)


def test_a_row_with_any_image_of_llava_1_6_fits_into_its_configs() -> None:
    """The most that an image comes to: the whole image and four tiles of 24 x 24, a newline behind each of their rows."""
    paths = sorted((ROOT / "configs" / "llava_v1_6").glob("*.json"))
    lengths = {json.loads(path.read_text())["max_length"] for path in paths}
    assert len(paths) == 8 and lengths == {4096} and min(lengths) > 24 * 24 + 48 * (48 + 1) + 1000


def test_pre_training_never_begins_with_a_projector_that_has_learned() -> None:
    for path in (ROOT / "configs").glob("llava_*/*_pretrain_argument.json"):
        assert json.loads(path.read_text())["model_name_or_path"].endswith("-with-tower"), path.name


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
        ({"lora_init": "pissa"}, "lora_init needs lora"),
        ({"lora": True, "lora_init": "pizza"}, "lora_init: expected pissa, or pissa_niter_N"),
        ({"lora": True, "lora_init": "pissa_niter_0"}, "lora_init: expected pissa, or pissa_niter_N"),
        ({"lora": True, "lora_init": "pissa"}, "set lora_dropout: 0"),
        ({"lora": True, "lora_init": "pissa", "load_in_8bit": True}, "lora_init: what the adapter takes over is taken out of the weights, and quantised"),
        ({"lora": True, "lora_init": "pissa", "lora_dtype": "bfloat16"}, "would round its steps away"),
        ({"lora": True, "lora_init": "pissa", "lora_path": "x"}, "lora_init: the adapter in lora_path already decides it"),
        ({"lora": True, "pissa": True}, "pissa: write lora_init: pissa"),
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


PADDLEMIX: dict[str, Any] = {  # every key of the seven files in its config/llava, but for paths
    "mixtoken": False,
    "overwrite_output_dir": True,
    "recompute": True,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "per_device_eval_batch_size": 1,
    "eval_accumulation_steps": 16,
    "group_by_modality_length": False,
    "num_train_epochs": 1,
    "learning_rate": 2e-04,
    "mm_projector_lr": 2e-5,
    "weight_decay": 0.0,
    "warmup_ratio": 0.03,
    "lr_scheduler_type": "cosine",
    "logging_steps": 1,
    "save_steps": 100,
    "evaluation_strategy": "epoch",
    "save_strategy": "epoch",
    "max_length": 2048,
    "bf16": False,
    "fp16": False,
    "fp16_opt_level": "O1",
    "do_train": True,
    "do_eval": False,
    "disable_tqdm": True,
    "load_best_model_at_end": False,
    "eval_with_do_generation": False,
    "skip_memory_metrics": False,
    "benchmark": False,
    "save_total_limit": 1,
    "sharding": "stage2",
    "tensor_parallel_degree": 1,
    "sharding_parallel_degree": 8,
    "version": "plain",
    "lora": True,
    "lora_rank": 128,
    "lora_alpha": 256,
    "lora_dropout": 0.0,
    "lora_target_modules": ["llama.layer.*q_proj.*", "llama.layer.*o_proj.*"],
}


def test_paddlemix_s_keys_are_read_and_what_has_no_effect_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    entry = {"name": "chatml_dataset", "data_files": "rows.json"}
    dataset = {"train": [entry], "eval": [entry]}
    arguments = read(tmp_path, monkeypatch, {**GOOD, "dataset": dataset, **PADDLEMIX})
    expected = {"packing": False, "eval_strategy": "epoch", "warmup_steps": 0.03, "prompt_style": "plain", "deepspeed": "stage2", "lora_rank": 128}
    assert {name: arguments[name] for name in expected} == expected
    said = capsys.readouterr().err.splitlines()
    left_out = ("fp16_opt_level", "group_by_modality_length", "eval_with_do_generation", "benchmark", "tensor_parallel_degree", "sharding_parallel_degree")
    assert sum(any(f": {name} is left out" in line for line in said) for name in left_out) == len(left_out)
    assert [line for line in said if line.startswith("warning")] == [
        f"warning: {tmp_path / 'config.json'}: sharding_parallel_degree is 8, and this run has 1 process"
    ]
    for name in ("recompute", "evaluation_strategy", "warmup_ratio", "mm_projector_lr", "sharding", "mixtoken", "version"):
        assert sum(f": {name} is read as {RENAMED[name]}" in line for line in said) == 1


def test_llava_next_s_keys_and_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {"mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter, mm_language_model", "mm_vision_tower_lr": 2e-6, "model_max_length": 32768}
    theirs |= {"version": "qwen_1_5", "frames_upbound": 32, "attn_implementation": "sdpa", "lazy_preprocess": True, "mm_projector_type": "mlp2x_gelu"}
    arguments = read(tmp_path, monkeypatch, {**GOOD, **theirs})
    expected = {"tunable_parts": ["vision_tower", "projector", "language_model"], "vision_tower_learning_rate": 2e-6, "max_length": 32768}
    expected |= {"prompt_style": "chatml", "num_frames": 32, "attention": "sdpa"}
    assert {name: arguments[name] for name in expected} == expected
    assert read(tmp_path, monkeypatch, {**GOOD, "lora_enable": True, "lora_r": 4})["lora_rank"] == 4


def test_what_other_tools_mean_otherwise_is_refused_with_what_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = problems(tmp_path, monkeypatch, {**GOOD, "fp16_opt_level": "O2", "tensor_parallel_degree": 2, "data_path": "rows.json", "bits": 4})
    for line in (
        "fp16_opt_level: 'O2' cannot be honoured",
        "tensor_parallel_degree: 2 cannot be honoured",
        "data_path: write dataset:",
        "bits: write load_in_4bit",
    ):
        assert line in text


def test_the_tables_of_other_tools_are_disjoint_and_hold_no_key_of_ours() -> None:
    tables = [set(RENAMED), set(WITHOUT_EFFECT), set(INSTEAD), set(SCHEMA["properties"])]
    assert sum(map(len, tables)) == len(set.union(*tables))


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
        if typo in {*SCHEMA["properties"], *RENAMED, *WITHOUT_EFFECT, *INSTEAD}:
            continue
        total += 1
        right += f"{typo}: unknown key; did you mean {key!r}?" in problems(tmp_path, monkeypatch, {**GOOD, typo: 1})
    assert right >= 190


def test_secrets_are_left_out() -> None:
    assert without_secrets({"hub_token": "hf_x", "seed": 1}) == {"seed": 1}


@pytest.mark.parametrize("script", ["supervised_finetune.py", "preference_finetune.py"])
@pytest.mark.parametrize("words", [["--help"], ["missing.json"]])
def test_help_and_errors_answer_without_heavy_imports(words: list[str], script: str) -> None:
    start = time.perf_counter()
    code = "import sys, runpy\nsys.argv = sys.argv[1:]\ntry:\n    runpy.run_path(sys.argv[0], run_name='__main__')\nfinally:\n    print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, f"train/{script}", *words], capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": "train"})
    assert time.perf_counter() - start < 60  # a hang guard; the promise of 2 seconds rests on the line below
    assert done.stdout.strip().endswith("False")
    assert done.returncode == (0 if words == ["--help"] else 2)
    if words == ["--help"]:
        shown = {key for key in SCHEMA["properties"] if f"--{key} " in done.stdout}
        pairs = {key for key, spec in SCHEMA["properties"].items() if spec.get("group") == "Preference tuning"}
        assert shown == set(SCHEMA["properties"]) - {"$schema"} - (pairs if script.startswith("supervised") else set())


# --- preference tuning ---


def resolved(kind: Any, **changes: Any) -> tuple[dict[str, Any], list[str]]:
    config = {"model_name_or_path": "demo", "output_dir": "out", "dataset": {"train": [{"data_files": "demo"}]}, **changes}
    return resolve(config, SCHEMA["properties"], dict.fromkeys(config, "config.json"), kind)


def test_defaults_of_preference_tuning_are_those_of_trl() -> None:
    from trl import DPOConfig

    theirs = {item.name: item.default if item.default is not MISSING else item.default_factory() for item in fields(DPOConfig)}
    pairs = {key for key, spec in SCHEMA["properties"].items() if spec.get("group") == "Preference tuning"} - {"reference_dir", "ablation_pairs"}
    ours, problems = resolved("preference")
    assert not problems
    for key in (*pairs, "learning_rate"):
        assert ours[key] == theirs[key], key
    assert resolved("supervised")[0]["learning_rate"] == 5e-5
    known = set(SCHEMA["properties"]) | set(RENAMED) | set(WITHOUT_EFFECT)
    assert {item.name for item in fields(DPOConfig)} <= known  # every key of TRL's is taken, or answered


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"beta": 0}, "beta: expected more than 0"),
        ({"loss_type": "sigmoyd"}, "did you mean 'sigmoid'?"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "1 weights for 2 of loss_type"),
        ({"loss_type": ["robust"], "label_smoothing": 0.5}, "label_smoothing: expected less than 0.5"),
        ({"loss_type": ["exo_pair"]}, "label_smoothing: expected between 0 and 1"),
        ({"loss_type": ["exo_pair"], "label_smoothing": 1.0}, "label_smoothing: expected between 0 and 1"),
        ({"label_smoothing": 0.1}, "label_smoothing: does nothing with loss_type sigmoid"),
        ({"loss_type": ["aot"], "f_divergence_type": "forward_kl"}, "f_divergence_type goes with"),
        ({"loss_type": ["aot"], "use_weighting": True}, "use_weighting"),
        ({"fsdp": True, "lora": False}, "fsdp: the reference of a fully tuned model is a second one"),
        ({"deepspeed": "zero3", "lora": True, "lora_path": "somewhere"}, "lora_path: the reference is this adapter as it was"),
        ({"deepspeed": "zero3", "lora": True, "lora_init": "pissa", "lora_dropout": 0.0}, "lora_init: the reference is this adapter as it was"),
        ({"reference_dir": "x"}, "reference_dir needs precompute_ref_log_probs"),
        ({"share_prefix": True}, "share_prefix: both answers of a pair share"),
        ({"sync_ref_model": True}, "sync_ref_model: True cannot be honoured"),
        ({"padding_free": True}, "padding_free: True cannot be honoured"),
        ({"truncation_mode": "keep_end"}, "truncation_mode: 'keep_end' cannot be honoured"),
    ],
)
def test_what_trl_would_refuse_or_leave_out_is_refused(changes: dict[str, Any], expected: str) -> None:
    assert any(expected in problem for problem in resolved("preference", **changes)[1])


def test_pair_keys_are_refused_where_they_would_do_nothing_and_llava_next_weights_are_read() -> None:
    assert any("beta: of preference tuning" in problem for problem in resolved("supervised", beta=0.2)[1])
    best = {"load_best_model_at_end": True, "eval_strategy": "epoch", "metric_for_best_model": "eval_rewards/margins"}
    best |= {"dataset": {"train": [{"data_files": "demo"}], "eval": [{"data_files": "demo"}]}}
    assert not resolved("preference", **best)[1]
    assert any("metric_for_best_model: expected eval_loss or eval_token_accuracy; got" in problem for problem in resolved("supervised", **best)[1])
    assert not resolved("supervised", beta=0.1)[1]  # as in the arguments.json of every run
    arguments, problems = resolved("preference", dpo_alpha=0.5, gamma=0.1)
    assert not problems
    assert (arguments["loss_type"], arguments["loss_weights"]) == (["sigmoid", "sft"], [0.5, 0.1])
    assert resolved("preference", dpo_alpha=1.0, gamma=0)[0]["loss_type"] == ["sigmoid"]
