"""The keys `deepspeed`, `fsdp` and PaddleMIX's `sharding`: what they mean, and what is refused before anything is imported or written."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from interlace.errors import InputError
from interlace.sharding_arguments import CONFIG_FOLDER, CONFIG_NAMES, STAGES, deepspeed_path
from interlace.training.forecast import Sharding, sharding_of
from interlace.training.sharding import check_compilable, deepspeed_settings
from tests.conftest import ROOT
from tests.test_arguments import GOOD, problems, read


def config(tmp_path: Path, stage: int = 2, **changes: Any) -> str:
    """A DeepSpeed file; a dotted key stands for `zero_optimization.key`, written with `__`."""
    zero = {"stage": stage} | {name.removeprefix("zero__"): value for name, value in changes.items() if name.startswith("zero__")}
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": zero} | {name: value for name, value in changes.items() if not name.startswith("zero__")}))
    return str(path)


def test_every_shipped_configuration_is_accepted_by_its_name_and_by_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    assert {path.stem for path in CONFIG_FOLDER.glob("*.json")} == set(CONFIG_NAMES)
    values = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0}
    for name in CONFIG_NAMES:
        assert read(tmp_path, monkeypatch, {**GOOD, "deepspeed": name})["deepspeed"] == name
        found = deepspeed_settings(name, "adamw_torch") | values | {"bf16": {"enabled": True}, "fp16": {"enabled": False}}
        assert "auto" not in json.dumps(found)
        parsed = DeepSpeedConfig(found)
        assert parsed.zero_optimization_stage == int(name[4])
        assert (parsed.zero_config.offload_optimizer is not None) == name.endswith(("offload", "nvme"))


def test_what_a_file_leaves_out_comes_from_the_arguments_and_not_from_deepspeed(tmp_path: Path) -> None:
    found = deepspeed_settings(config(tmp_path, bf16={}), "sgd")
    assert (found["gradient_clipping"], found["bf16"], found["train_batch_size"]) == ("auto", {"enabled": "auto"}, "auto")
    assert found["zero_force_ds_cpu_optimizer"] is False  # else descent would become Adam where its state is offloaded
    assert "zero_force_ds_cpu_optimizer" not in deepspeed_settings(config(tmp_path), "adamw_torch_fused")
    # the same step, resumed with another number of processes, has another accumulation
    found = deepspeed_settings(config(tmp_path, gradient_accumulation_steps=2, bf16={"enabled": True, "loss_scale": 1}), "adamw_torch")
    assert (found["gradient_accumulation_steps"], found["bf16"]) == ("auto", {"enabled": "auto", "loss_scale": 1})


def test_what_deepspeed_compiles_and_lacks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    plain: dict[str, Any] = {"zero_optimization": {"stage": 2}}
    on_disk: dict[str, Any] = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}
    monkeypatch.setenv("CXX", sys.executable)  # anything that can be found
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: False)
    check_compilable(plain, on_cpu=True)
    with pytest.raises(InputError, match="apt-get install libaio-dev"):
        check_compilable(on_disk, on_cpu=False)
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))  # where nothing was compiled earlier
    check_compilable(plain, on_cpu=False)
    for settings, on_cpu in ((plain, True), (on_disk, False)):
        with pytest.raises(InputError, match=r"no C\+\+ compiler no-such-compiler: apt-get install g\+\+"):
            check_compilable(settings, on_cpu)


def test_the_lock_of_a_compilation_that_was_killed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch waits for it for ever. One that is being worked under is left alone."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder, settings = tmp_path / "deepspeed_shm_comm", {"zero_optimization": {"stage": 2}}
    folder.mkdir()
    for name in ("lock", "shm.o"):
        (folder / name).touch()
        os.utime(folder / name, (0, 0))
    with pytest.raises(InputError, match=rf"{folder / 'lock'} was left by a compilation that has ended, .*: rm {folder / 'lock'}"):
        check_compilable(settings, on_cpu=True)
    check_compilable(settings, on_cpu=False)
    (folder / "shm.o").touch()
    check_compilable(settings, on_cpu=True)


def test_stages_in_the_words_of_paddlemix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for word, name in STAGES.items():
        arguments = read(tmp_path, monkeypatch, {**GOOD, "sharding": word})
        assert deepspeed_path(arguments["deepspeed"]) == CONFIG_FOLDER / f"{name}.json"
        assert "sharding is read as deepspeed" in capsys.readouterr().err
    assert sharding_of(read(tmp_path, monkeypatch, {**GOOD, "sharding": ""}), 4) == Sharding(4)
    assert "the same key" in problems(tmp_path, monkeypatch, {**GOOD, "sharding": "stage2", "deepspeed": "zero2"})


@pytest.mark.parametrize(
    ("file", "changes", "expected"),
    [
        ({"optimizer": {"type": "Adam"}}, {}, "optimizer: optim, learning_rate"),
        ({"scheduler": {"type": "WarmupLR"}}, {}, "scheduler: lr_scheduler_type"),
        ({"gradient_clipping": 0.5}, {}, "gradient_clipping is 0.5, but max_grad_norm is 1.0"),
        ({"gradient_accumulation_steps": 4}, {"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 4"),
        ({"train_micro_batch_size_per_gpu": 1}, {}, "but per_device_train_batch_size is 8"),
        ({"train_batch_size": 64}, {}, "train_batch_size is 64"),
        ({"bf16": {"enabled": True}}, {}, "bf16.enabled is True, but bf16 is False"),
        ({"fp16": {"enabled": True}}, {"bf16": True}, "fp16.enabled is True"),
        ({"stage": 0}, {}, "zero_optimization.stage: expected 1, 2 or 3, got 0"),
        ({"zero__offload_param": {"device": "cpu"}}, {}, "offload_param.device cpu: only with stage 3"),
        ({"stage": 3, "zero__offload_optimizer": {"device": "nvme"}}, {}, "nvme_path: missing"),
        ({"zero__zero_quantized_weights": True}, {}, "zero_quantized_weights: not supported"),
        ({}, {"optim": "adafactor"}, "optim adafactor cannot step slices"),
        ({"stage": 3}, {"lora": True, "load_in_4bit": True}, "quantised weights cannot be sliced"),
        ({"stage": 3}, {"lora": True, "use_dora": True}, "use_dora reads weights"),
        ({}, {"fsdp": True}, "deepspeed and fsdp: choose one"),
    ],
)
def test_contradictions_with_a_deepspeed_file_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: dict[str, Any], changes: dict[str, Any], expected: str
) -> None:
    assert expected in problems(tmp_path, monkeypatch, {**GOOD, **changes, "deepspeed": config(tmp_path, **file)})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"fsdp": "hybrid_shard"}, "fsdp: 'hybrid_shard' cannot be honoured"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "fsdp_config.version: expected 2"),
        ({"fsdp": True, "fsdp_config": {"fsdp_use_orig_params": True}}, "fsdp_config.fsdp_use_orig_params: cannot be honoured"),
        ({"fsdp": True, "fsdp_config": {"activation_checkpointing": True}}, "gradient_checkpointing does it"),
        ({"fsdp": True, "optim": "adamw_bnb_8bit"}, "fsdp: optim adamw_bnb_8bit"),
        ({"fsdp_config": {"version": 2}}, "fsdp_config needs fsdp: true"),
        ({"deepspeed": "zero4"}, "deepspeed: expected zero1, zero2, zero2_offload, zero3, zero3_offload, zero3_nvme, or the path of"),
        ({"deepspeed": "zero4.json"}, "zero4.json: no such file"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "deepspeed: expected null or string"),
    ],
)
def test_what_cannot_be_honoured_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], expected: str) -> None:
    assert expected in problems(tmp_path, monkeypatch, {**GOOD, **changes})


def test_keys_that_go_together_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"reshard_after_forward": False, "cpu_offload": True}
    assert read(tmp_path, monkeypatch, {**GOOD, "fsdp": "full_shard auto_wrap", "fsdp_config": settings})["fsdp"] == "full_shard auto_wrap"
    assert read(tmp_path, monkeypatch, {**GOOD, "fsdp": False})["fsdp"] is False
    path = config(tmp_path, gradient_clipping=1.0, bf16={"enabled": True}, train_micro_batch_size_per_gpu=8)
    assert read(tmp_path, monkeypatch, {**GOOD, "bf16": True, "deepspeed": path})["deepspeed"] == path


def test_the_forecast_shares_what_the_keys_share(tmp_path: Path) -> None:
    none = {"deepspeed": None, "fsdp": None, "fsdp_config": None}
    assert sharding_of(none, 8) == Sharding(8)
    assert sharding_of({**none, "deepspeed": "zero2_offload"}, 8) == Sharding(8, 2, True, False)
    assert sharding_of({**none, "deepspeed": "zero3_nvme"}, 8) == Sharding(8, 3, True, True)
    assert sharding_of({**none, "fsdp": True, "fsdp_config": {"cpu_offload": True}}, 8) == Sharding(8, 3, True, True)


@pytest.mark.parametrize("words", [["--fsdp", "true"], ["--deepspeed", "zero2", "--fsdp", "true"]])
def test_a_refusal_ends_with_code_2_and_nothing_written(tmp_path: Path, words: list[str]) -> None:
    command = [sys.executable, "train/supervised_finetune.py", "configs/lora_sft_argument.json", "--output_dir", str(tmp_path / "out"), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "fsdp" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
