"""A run that cannot be lost: killed, cut short, damaged, filled up, stopped, and resumed as if nothing had happened."""

import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from interlace.arguments import SCHEMA_PATH, resolve
from interlace.errors import InputError
from interlace.training.checkpoint import Saver, checkpoint_folders, damage, step_of
from interlace.training.resume import find_checkpoint
from interlace.training.supervised import finetune
from tests.accidents import DISK_FULL, Accident, finish, run_in_process, run_ranks
from tests.conftest import NEEDS_COMPILER, fast_first, write_rows

STEPS = 8
STEPS_PER_EPOCH = 4
CHECKPOINT = "interlace.training.checkpoint:"


def arguments_for(model: Path, data: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    """A short run with dropout that saves every second step, evaluates every third, and resumes by itself."""
    config = {
        "model_name_or_path": str(model),
        "output_dir": str(output_dir),
        "dataset": {"train": [{"data_files": str(data)}], "eval": [{"data_files": str(data), "sampling_strategy": "first:6"}]},
        **{"lora": True, "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.1, "gradient_checkpointing": False},
        **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "max_steps": STEPS},
        **{"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "eval_strategy": "steps", "eval_steps": 3, "logging_steps": 1},
        **{"dataloader_num_workers": 0, "use_cpu": True, "disable_tqdm": True, "report_to": "none", "ddp_timeout": 60, "resume_from_checkpoint": True},
        **changes,
    }
    arguments, problems = resolve(config, json.loads(SCHEMA_PATH.read_text())["properties"], dict.fromkeys(config, "test"))
    assert not problems
    return arguments


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data"), 24)


@pytest.fixture(scope="module")
def undisturbed(tiny_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    finetune(arguments_for(tiny_dir, data, folder))
    return folder


@pytest.fixture
def arguments(tiny_dir: Path, data: Path, tmp_path: Path) -> dict[str, Any]:
    return arguments_for(tiny_dir, data, tmp_path / "run")


def logged(folder: Path, name: str = "loss") -> dict[int, float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry[name] for entry in history if name in entry}


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "checkpoint-latest" / "manifest.json").read_text())  # type: ignore[no-any-return]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*model.safetensors")))


def loss_windows(folder: Path) -> list[list[float]]:
    progress = json.loads((folder / "checkpoint-latest" / "progress.json").read_text())
    return [share["loss_window"] for share in progress["ranks"]]


def assert_same_end(first: Path, second: Path) -> None:
    """The same losses at every step, what is known of them for finding spikes, and the same weights, to the last bit."""
    assert logged(first) == logged(second)
    assert loss_windows(first) == loss_windows(second)
    one, two = weights(first), weights(second)
    assert set(one) == set(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


def assert_safe(folder: Path) -> None:
    """Every folder with the name of a checkpoint is whole, and so is the one that `checkpoint-latest` names."""
    assert [damage(path) for path in checkpoint_folders(folder)] == [None] * len(checkpoint_folders(folder))
    latest = folder / "checkpoint-latest"
    assert not latest.is_symlink() or damage(latest) is None


def succeeds(arguments: dict[str, Any], log: Path) -> None:
    assert finish(run_in_process(arguments, log)) == 0, log.read_text()


# --- kill -9 ---

PHASES = {
    "before the folder is made": Accident(CHECKPOINT + "_free_bytes", 2),
    "before the optimizer's file": Accident("interlace.training.durable:write_fragments", 2),
    "before the weights": Accident("interlace.training.durable:save_weights", 2),
    "between weights and processor": Accident("interlace.training.weights:save_processing", 2),
    "after the weights": Accident("interlace.training.durable:save_weights", 2, "after"),
    "while files are brought to the disk": Accident(CHECKPOINT + "_checksum", 18),
    "before this rank says that it is done": Accident(CHECKPOINT + "write_whole", 3),
    "before the manifest": Accident(CHECKPOINT + "write_whole", 4),
    "after the manifest": Accident(CHECKPOINT + "write_whole", 4, "after"),
    "before the checkpoint gets its name": Accident(CHECKPOINT + "_sync_folder", 3, "after"),
    "after the checkpoint got its name": Accident(CHECKPOINT + "_sync_folder", 4),
    "before checkpoint-latest moves": Accident(CHECKPOINT + "point_latest", 3),
    "before the oldest goes": Accident(CHECKPOINT + "Saver._drop_oldest", 3),
    "while the oldest goes": Accident(CHECKPOINT + "Path.rename", 4, "after"),
    "in a step": Accident("interlace.training.trainer:supervised_loss", 9),
    "in an evaluation": Accident("interlace.training.durable:DurableTrainer.check_stop", 2),
    "while the result is written": Accident("interlace.training.weights:save_processing", 1 + STEPS // 2),
    "before the run is called finished": Accident("interlace.training.run:draw_curves", 1, "after"),
}


@pytest.mark.parametrize("accident", fast_first(PHASES.values(), 5, PHASES))
def test_killed_in_any_phase_it_resumes_to_the_same_end(arguments: dict[str, Any], undisturbed: Path, tmp_path: Path, accident: Accident) -> None:
    folder = tmp_path / "run"
    assert finish(run_in_process(arguments, tmp_path / "log", [accident])) == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert_safe(folder)
    workers = int(accident.function.endswith("supervised_loss"))  # a worker changes nothing, and takes seconds to start
    succeeds({**arguments, "dataloader_num_workers": workers}, tmp_path / "log")
    assert_safe(folder)
    assert_same_end(undisturbed, folder)
    assert len(checkpoint_folders(folder)) == 2
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")], "nothing half written is left"


@pytest.mark.slow
def test_killed_forty_times_at_random_it_resumes_to_the_same_end(arguments: dict[str, Any], undisturbed: Path, tmp_path: Path) -> None:
    """Planning, steps, saves, evaluations: wherever the moment falls."""
    kills, ends, randomness = 0, 0, random.Random(0)
    start = time.monotonic()
    succeeds({**arguments, "output_dir": str(tmp_path / "timed")}, tmp_path / "log")
    longest = time.monotonic() - start
    while kills < 40 or not ends:
        folder = tmp_path / f"run_{ends}"
        process = run_in_process({**arguments, "output_dir": str(folder)}, tmp_path / "log")
        process.join(randomness.uniform(0.2, longest))
        process.kill()
        code = finish(process)
        assert code in (0, -signal.SIGKILL), (tmp_path / "log").read_text()
        kills += code != 0
        assert_safe(folder)
        if code == 0:
            assert_same_end(undisturbed, folder)
            ends += 1
    assert ends


@pytest.mark.parametrize("limit", [1, 3, 6, 10, None])
def test_the_oldest_go_beyond_the_limit_and_never_the_best(tmp_path: Path, limit: int | None) -> None:
    saver = Saver(tmp_path, 0, 1, {}, limit)

    def write(folder: Path) -> list[str]:
        (folder / "trainer_state.json").write_text("{}")
        return ["trainer_state.json"]

    best = tmp_path / "checkpoint-2"
    for step in range(1, 9):
        saver.begin(step, write, 100)
        assert saver.problem() is None
        saver.commit(best if step >= 2 else None)
        others = [other for other in range(1, step + 1) if other not in (2, step)]
        room = max(0, (limit or 100) - len({min(2, step), step}))
        kept = sorted({min(2, step), step, *(others[-room:] if room else [])})
        assert [int(path.name.split("-")[1]) for path in checkpoint_folders(tmp_path)] == kept
        assert (tmp_path / "checkpoint-latest").readlink() == Path(f"checkpoint-{step}")


# --- damage ---


def spoilt(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "a bit flips":
        at = len(content) // 2
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    elif how == "cut short":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["a bit flips", "cut short", "missing"])
def test_whatever_file_is_damaged_the_checkpoint_before_is_taken(arguments: dict[str, Any], undisturbed: Path, tmp_path: Path, how: str) -> None:
    names = [path.name for path in (undisturbed / f"checkpoint-{STEPS}").iterdir()]
    assert {"manifest.json", "trainer_state.json", "scheduler.json", "ledger.json", "optimizer-00000-of-00001.safetensors", "adapter_model.safetensors"} <= set(
        names
    )
    for name in names:
        folder, said = tmp_path / name, list[str]()
        shutil.copytree(undisturbed, folder, symlinks=True)
        spoilt(folder / f"checkpoint-{STEPS}" / name, how)
        found = find_checkpoint(folder, arguments, said.append)
        assert found is not None
        assert found.step == STEPS - 2
        assert (folder / f"damaged-checkpoint-{STEPS}").is_dir()
        assert (folder / "checkpoint-latest").readlink() == Path(f"checkpoint-{STEPS - 2}")
        assert len(said) == 1 and f"checkpoint-{STEPS}" in said[0] and name in said[0]


def test_with_every_checkpoint_damaged_nothing_starts_afresh_in_silence(arguments: dict[str, Any], undisturbed: Path, tmp_path: Path) -> None:
    folder = Path(arguments["output_dir"])
    shutil.copytree(undisturbed, folder, symlinks=True)
    (folder / "trainer_state.json").unlink()
    for path in checkpoint_folders(folder):
        spoilt(path / "scheduler.json", "missing")
    assert finish(run_in_process(arguments, tmp_path / "log")) == 2
    assert "no whole checkpoint is left" in (tmp_path / "log").read_text()
    aside = folder / f"damaged-checkpoint-{STEPS - 2}"
    named = {**arguments, "resume_from_checkpoint": str(aside)}
    assert finish(run_in_process(named, tmp_path / "log")) == 2
    assert "scheduler.json is missing" in (tmp_path / "log").read_text()
    succeeds({**named, "allow_partial_resume": True}, tmp_path / "log")
    assert logged(folder)[STEPS] > 0


def test_a_changed_checkpoint_is_taken_only_by_a_user_who_trusts_it(arguments: dict[str, Any], undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "theirs" / "checkpoint-6"
    shutil.copytree(undisturbed / "checkpoint-6", folder)
    (folder / "manifest.json").unlink()
    named = {**arguments, "resume_from_checkpoint": str(folder)}
    assert finish(run_in_process(named, tmp_path / "log")) == 2
    assert "it has no manifest.json" in (tmp_path / "log").read_text()
    succeeds({**named, "trust_checkpoint": True}, tmp_path / "log")
    assert_same_end(undisturbed, Path(arguments["output_dir"]))


class Poison:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def test_code_in_a_checkpoint_is_never_run(arguments: dict[str, Any], undisturbed: Path, tmp_path: Path) -> None:
    """Under all names that Hugging Face and DeepSpeed unpickle."""
    folder, marker = tmp_path / "theirs" / "checkpoint-6", tmp_path / "marker"
    shutil.copytree(undisturbed / "checkpoint-6", folder)
    (folder / "global_step6").mkdir()
    for name in (
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "training_args.bin",
        "scaler.pt",
        "pytorch_model.bin",
        "global_step6/mp_rank_00_model_states.pt",
    ):
        (folder / name).write_bytes(pickle.dumps(Poison(marker)))
    (folder / "latest").write_text("global_step6")
    succeeds({**arguments, "resume_from_checkpoint": str(folder), "trust_checkpoint": True}, tmp_path / "log")
    assert_same_end(undisturbed, Path(arguments["output_dir"]))
    assert not marker.exists()


# --- a full disk ---


@pytest.mark.parametrize("where", ["interlace.training.durable:save_weights", CHECKPOINT + "_checksum", CHECKPOINT + "write_whole"])
def test_a_full_disk_leaves_the_checkpoint_before_and_stops_or_goes_on(arguments: dict[str, Any], undisturbed: Path, tmp_path: Path, where: str) -> None:
    count = {"interlace.training.durable:save_weights": 2, CHECKPOINT + "_checksum": 18, CHECKPOINT + "write_whole": 4}[where]  # in the second save
    full, folder = Accident(where, count, error=DISK_FULL), Path(arguments["output_dir"])
    assert finish(run_in_process(arguments, tmp_path / "log", [full])) == 1
    said = (tmp_path / "log").read_text()
    assert "checkpoint-4 could not be written" in said and "No space left" in said and str(folder) in said and "Traceback" not in said
    assert [path.name for path in checkpoint_folders(folder)] == ["checkpoint-2"]
    succeeds(arguments, tmp_path / "log")
    assert_same_end(undisturbed, folder)
    other = {**arguments, "output_dir": str(tmp_path / "goes_on"), "on_save_error": "continue"}
    assert finish(run_in_process(other, tmp_path / "log", [full])) == 0
    assert "going on without it" in (tmp_path / "log").read_text()
    assert [path.name for path in checkpoint_folders(tmp_path / "goes_on")] == ["checkpoint-6", "checkpoint-8"]
    assert_same_end(undisturbed, tmp_path / "goes_on")


def test_a_run_that_fails_leaves_no_process_behind(arguments: dict[str, Any], tmp_path: Path) -> None:
    """A process that reads data ignores signals, and nobody may wait for it."""
    full = Accident("interlace.training.durable:save_weights", 2, error=DISK_FULL)
    assert finish(run_in_process({**arguments, "dataloader_num_workers": 1}, tmp_path / "log", [full]), 60) == 1
    assert "checkpoint-4 could not be written" in (tmp_path / "log").read_text()
    broken = Accident("interlace.training.trainer:random_seed", 5, change=broken_program)
    run = run_in_process({**arguments, "dataloader_num_workers": 1, "output_dir": str(tmp_path / "other")}, tmp_path / "log", [broken])
    assert finish(run, 60) == 1
    assert "ZeroDivisionError" in (tmp_path / "log").read_text()


def broken_program(result: int) -> float:
    return result / 0


def take_long(result: Any) -> Any:
    time.sleep(60)
    return result


def test_two_runs_never_write_into_one_folder(arguments: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(arguments["output_dir"])
    slow = Accident("interlace.training.trainer:supervised_loss", 7, change=take_long)
    first = run_in_process(arguments, tmp_path / "log", [slow])
    while not (folder / "checkpoint-latest").exists() and first.is_alive():
        time.sleep(0.05)
    assert finish(run_in_process(arguments, tmp_path / "second")) == 2
    assert f"output_dir: another run is writing into {folder}" in (tmp_path / "second").read_text()
    first.kill()
    assert finish(first) == -signal.SIGKILL
    succeeds(arguments, tmp_path / "log")


def test_a_file_that_the_system_refuses_to_grow_ends_the_run_with_its_reason(arguments: dict[str, Any], tmp_path: Path) -> None:
    assert finish(run_in_process(arguments, tmp_path / "log", largest_file=20_000)) == 1
    assert "checkpoint-2 could not be written" in (tmp_path / "log").read_text()
    assert not checkpoint_folders(Path(arguments["output_dir"]))
    assert not list(Path(arguments["output_dir"]).glob(".*"))


def test_a_disk_without_room_is_seen_before_anything_is_written(arguments: dict[str, Any], tmp_path: Path) -> None:
    small = Accident(CHECKPOINT + "_free_bytes", 1, change=no_room)
    assert finish(run_in_process(arguments, tmp_path / "log", [small])) == 1
    assert "GB are free" in (tmp_path / "log").read_text()


def no_room(_: int) -> int:
    return 1000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 700 KiB: room for the run's records and a few checkpoints, not for all."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", folder], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_really_is_full(tiny_dir: Path, data: Path, small_disk: Path, tmp_path: Path) -> None:
    arguments = arguments_for(tiny_dir, data, small_disk / "run", save_total_limit=None, save_steps=1, cache_dir=str(tmp_path / "cache"))
    assert finish(run_in_process(arguments, tmp_path / "log")) == 1
    assert "could not be written" in (tmp_path / "log").read_text()
    whole = checkpoint_folders(small_disk / "run")
    assert whole, "those before it stand"
    assert_safe(small_disk / "run")


def test_a_result_that_cannot_be_written_is_no_traceback_and_is_written_later(arguments: dict[str, Any], undisturbed: Path, tmp_path: Path) -> None:
    full = Accident("interlace.training.run:draw_curves", error=DISK_FULL)
    assert finish(run_in_process(arguments, tmp_path / "log", [full])) == 1
    said = (tmp_path / "log").read_text()
    assert "the result could not be written" in said and "No space left" in said and "Traceback" not in said
    succeeds(arguments, tmp_path / "log")
    assert_same_end(undisturbed, Path(arguments["output_dir"]))


# --- being asked to stop ---


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)])
def test_asked_to_stop_it_saves_the_step_and_says_so_by_its_exit_code(
    arguments: dict[str, Any], undisturbed: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    folder = Path(arguments["output_dir"])
    asked = Accident("interlace.training.trainer:supervised_loss", 5, change=Ask(number))  # in the third step: no checkpoint would be due
    assert finish(run_in_process(arguments, tmp_path / "log", [asked])) == code, (tmp_path / "log").read_text()
    (newest,) = [path for path in checkpoint_folders(folder) if path.name not in ("checkpoint-2",)]
    assert newest.name in ("checkpoint-3", "checkpoint-4"), "one step later at most"
    assert_safe(folder)
    assert not (folder / "trainer_state.json").exists()
    succeeds(arguments, tmp_path / "log")
    assert_same_end(undisturbed, folder)


class Ask:
    """Sends this process a signal."""

    def __init__(self, number: signal.Signals):
        self.number = number

    def __call__(self, result: Any) -> Any:
        os.kill(os.getpid(), self.number)
        return result


def test_a_second_ctrl_c_quits_at_once(arguments: dict[str, Any], tmp_path: Path) -> None:
    first = Accident("interlace.training.trainer:supervised_loss", 5, change=Ask(signal.SIGINT))
    twice = [first, Accident("interlace.training.durable:save_weights", 2, change=Ask(signal.SIGINT))]
    assert finish(run_in_process(arguments, tmp_path / "log", twice)) == 130
    assert_safe(Path(arguments["output_dir"]))


def test_asked_to_stop_in_an_evaluation_it_does_not_finish_it(arguments: dict[str, Any], undisturbed: Path, tmp_path: Path) -> None:
    arguments["per_device_eval_batch_size"] = 1
    asked = Accident("interlace.training.durable:DurableTrainer.check_stop", 1, change=Ask(signal.SIGTERM))
    assert finish(run_in_process(arguments, tmp_path / "log", [asked])) == 143
    assert "eval_loss" not in (tmp_path / "log").read_text()
    assert (Path(arguments["output_dir"]) / "checkpoint-3").is_dir()
    succeeds(arguments, tmp_path / "log")
    assert_same_end(undisturbed, Path(arguments["output_dir"]))


@pytest.mark.parametrize(
    ("schedule", "asked_at", "stops_at"),
    [("steps", 3, 3), ("steps", STEPS, STEPS), ("epoch", STEPS_PER_EPOCH, STEPS_PER_EPOCH), ("epoch", STEPS_PER_EPOCH - 1, STEPS_PER_EPOCH)],
    ids=["in the step of an evaluation", "in the last step", "in the last step of an epoch", "in the step before"],
)
def test_a_stop_costs_no_evaluation_and_no_best_checkpoint(arguments: dict[str, Any], tmp_path: Path, schedule: str, asked_at: int, stops_at: int) -> None:
    """The last step is the worst one here, so that it is seen which one the result is."""
    arguments |= {"save_strategy": schedule, "eval_strategy": schedule, "save_steps": 1, "eval_steps": 1, "save_total_limit": 1}
    arguments |= {"load_best_model_at_end": True, "greater_is_better": True, "metric_for_best_model": "eval_loss"}
    whole, folder = {**arguments, "output_dir": str(tmp_path / "whole")}, Path(arguments["output_dir"])
    succeeds(whole, tmp_path / "log")
    asked = Accident("interlace.training.trainer:supervised_loss", 2 * asked_at, change=Ask(signal.SIGTERM))
    assert finish(run_in_process(arguments, tmp_path / "log", [asked])) == 143, (tmp_path / "log").read_text()
    assert damage(folder / "checkpoint-latest") is None
    assert step_of((folder / "checkpoint-latest").resolve()) == stops_at, "the newest one, not the best one"
    succeeds(arguments, tmp_path / "log")
    assert_same_end(tmp_path / "whole", folder)
    assert logged(folder, "eval_loss") == logged(tmp_path / "whole", "eval_loss")
    assert list(logged(folder, "eval_loss")) == (list(range(1, STEPS + 1)) if schedule == "steps" else [STEPS_PER_EPOCH, STEPS])


@pytest.mark.parametrize("change", [Ask(signal.SIGTERM), None], ids=["stopped", "killed"])
def test_an_evaluation_at_the_end_of_an_epoch_is_owed_though_its_step_was_saved(arguments: dict[str, Any], tmp_path: Path, change: Ask | None) -> None:
    arguments |= {"save_steps": 1, "eval_strategy": "epoch"}
    accident = Accident("interlace.training.durable:DurableTrainer.check_stop", 1, change=change)
    assert finish(run_in_process(arguments, tmp_path / "log", [accident])) == (143 if change else -signal.SIGKILL)
    succeeds(arguments, tmp_path / "log")
    assert list(logged(Path(arguments["output_dir"]), "eval_loss")) == [STEPS_PER_EPOCH, STEPS]


def test_a_run_that_moved_keeps_its_best_checkpoint(arguments: dict[str, Any], tmp_path: Path) -> None:
    """The first one is the best here."""
    arguments |= {"save_steps": 1, "eval_steps": 1, "save_total_limit": 1}
    arguments |= {"load_best_model_at_end": True, "greater_is_better": True, "metric_for_best_model": "eval_loss"}
    succeeds({**arguments, "output_dir": str(tmp_path / "whole")}, tmp_path / "log")
    asked = Accident("interlace.training.trainer:supervised_loss", 6, change=Ask(signal.SIGTERM))
    assert finish(run_in_process(arguments, tmp_path / "log", [asked])) == 143
    Path(arguments["output_dir"]).rename(tmp_path / "moved")
    succeeds({**arguments, "output_dir": str(tmp_path / "moved")}, tmp_path / "log")
    assert_same_end(tmp_path / "whole", tmp_path / "moved")
    assert {step_of(path) for path in checkpoint_folders(tmp_path / "moved")} == {1, STEPS}


def test_a_stop_that_could_not_be_saved_does_not_say_that_it_was(arguments: dict[str, Any], tmp_path: Path) -> None:
    arguments |= {"save_steps": 2, "on_save_error": "continue"}
    full = Accident("interlace.training.durable:write_fragments", 2, error=DISK_FULL)
    asked = Accident("interlace.training.trainer:supervised_loss", 5, change=Ask(signal.SIGTERM))
    assert finish(run_in_process(arguments, tmp_path / "log", [full, asked])) == 1
    assert "which could not be saved; the same command with --resume_from_checkpoint true goes on from step 2" in (tmp_path / "log").read_text()
    succeeds(arguments, tmp_path / "log")


def test_a_checkpoint_of_another_format_is_refused(arguments: dict[str, Any], undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, arguments["output_dir"], symlinks=True)
    (Path(arguments["output_dir"]) / "trainer_state.json").unlink()
    path = (Path(arguments["output_dir"]) / "checkpoint-latest").resolve() / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))
    with pytest.raises(InputError, match="written by another version of Interlace"):
        finetune(arguments)


def test_killed_before_the_end_was_noted_it_makes_no_step_more(arguments: dict[str, Any], tmp_path: Path) -> None:
    """The last step is inside an epoch."""
    arguments["max_steps"] = STEPS - 1
    killed = Accident("interlace.training.run:draw_curves", 1, "after")
    assert finish(run_in_process(arguments, tmp_path / "log", [killed])) == -signal.SIGKILL
    folder = Path(arguments["output_dir"])
    before = weights(folder)
    succeeds(arguments, tmp_path / "log")
    assert max(logged(folder)) == STEPS - 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(folder).items())


# --- several ranks ---


@pytest.fixture(scope="module")
def undisturbed_pair(tiny_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two ranks with one micro-batch each per step: the same plan as `undisturbed`."""
    folder = tmp_path_factory.mktemp("pair")
    ranks = run_ranks(arguments_for(tiny_dir, data, folder / "run", gradient_accumulation_steps=1), folder / "logs", 2)
    assert [finish(rank) for rank in ranks] == [0, 0], (folder / "logs" / "0").read_text()
    return folder / "run"


def assert_close_end(first: Path, second: Path) -> None:
    one, two = logged(first), logged(second)
    assert set(one) == set(two)
    assert [two[step] for step in one] == pytest.approx(list(one.values()), abs=1e-6, rel=1e-6)


def test_two_ranks_make_the_steps_of_one_dropout_and_all(undisturbed: Path, undisturbed_pair: Path) -> None:
    assert manifest(undisturbed)["engine"] == "PackedModel" and manifest(undisturbed_pair)["engine"] == "DistributedDataParallel"
    assert_close_end(undisturbed, undisturbed_pair)


@pytest.mark.parametrize("asked", [(0,), (1,), (0, 1)], ids=["rank 0", "rank 1", "both"])
def test_all_ranks_stop_at_one_step_whichever_was_asked(arguments: dict[str, Any], undisturbed_pair: Path, tmp_path: Path, asked: tuple[int, ...]) -> None:
    arguments = {**arguments, "gradient_accumulation_steps": 1}
    accidents = {rank: [Accident("interlace.training.trainer:supervised_loss", 3 + rank, change=Ask(signal.SIGTERM))] for rank in asked}
    assert [finish(rank) for rank in run_ranks(arguments, tmp_path / "logs", 2, accidents)] == [143, 143], (tmp_path / "logs" / "0").read_text()
    folder = Path(arguments["output_dir"])
    assert_safe(folder)
    assert 3 <= json.loads((folder / "checkpoint-latest" / "trainer_state.json").read_text())["global_step"] <= 5
    assert len(list((folder / "checkpoint-latest").glob("optimizer-*-of-00002.safetensors"))) == 2
    assert [finish(rank) for rank in run_ranks(arguments, tmp_path / "logs", 2)] == [0, 0]
    assert_same_end(undisturbed_pair, folder)


@pytest.mark.slow
def test_ten_signals_at_random_moments_leave_one_consistent_checkpoint_each(arguments: dict[str, Any], undisturbed_pair: Path, tmp_path: Path) -> None:
    """To either rank or both, up to half a second apart, in steps, saves and evaluations; a signal before training begins ends the process at once."""
    arguments, randomness, stops, ends = {**arguments, "gradient_accumulation_steps": 1}, random.Random(1), 0, 0
    while stops < 10 or not ends:
        folder, logs = tmp_path / f"run_{ends}", tmp_path / f"logs_{ends}_{stops}"  # a log of its own: an older one already tells of losses
        ranks = run_ranks({**arguments, "output_dir": str(folder)}, logs, 2)
        log = logs / "0"
        while "'loss'" not in (log.read_text() if log.exists() else "") and ranks[0].is_alive():
            time.sleep(0.01)
        time.sleep(randomness.uniform(0, 0.3))
        asked = randomness.choice([(0,), (1,), (0, 1)])
        for rank in asked:
            if ranks[rank].is_alive():  # a machine that was busy with something else may find the run at its end
                os.kill(ranks[rank].pid or 0, randomness.choice([signal.SIGTERM, signal.SIGUSR1]))
            time.sleep(randomness.uniform(0, 0.5) if len(asked) > 1 else 0)
        codes = [finish(rank) for rank in ranks]
        assert codes in ([143, 143], [0, 0]), log.read_text()[-3000:]
        assert_safe(folder)
        if codes == [0, 0]:
            assert_same_end(undisturbed_pair, folder)
            ends += 1
        else:
            stops += 1
            assert (folder / "checkpoint-latest").is_symlink()


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_ranks_shares_the_same_plan(arguments: dict[str, Any], undisturbed: Path, tmp_path: Path, before: int, after: int) -> None:
    first = {**arguments, "gradient_accumulation_steps": 2 // before}
    stop = {0: [Accident("interlace.training.trainer:supervised_loss", 3 * 2 // before, change=Ask(signal.SIGTERM))]}
    assert {finish(rank) for rank in run_ranks(first, tmp_path / "logs", before, stop)} == {143}
    assert [finish(rank) for rank in run_ranks(first, tmp_path / "logs", after)] == [0] * after, (tmp_path / "logs" / "0").read_text()
    assert f"gradient_accumulation_steps {2 // before} -> {2 // after}" in (tmp_path / "logs" / "0").read_text()
    assert_close_end(undisturbed, Path(arguments["output_dir"]))


ENGINES = {"zero1": {"deepspeed": "zero1"}, "zero2": {"deepspeed": "zero2"}, "zero3": {"deepspeed": "zero3"}, "fsdp": {"fsdp": True}}


@NEEDS_COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_under_every_engine_a_stop_and_a_resume_change_nothing_and_broken_numbers_stop_all(
    arguments: dict[str, Any], tmp_path: Path, engine: str, precision: str
) -> None:
    full = {"lora": False, "gradient_accumulation_steps": 1, "bf16": precision == "bfloat16", "load_best_model_at_end": True}
    arguments = {**arguments, **full, **ENGINES[engine], "save_steps": 3, "metric_for_best_model": "eval_loss", "greater_is_better": False}

    def run(name: str, accident: Accident | None = None) -> list[int]:
        accidents = {1: [accident]} if accident else None
        return [finish(rank, 400) for rank in run_ranks({**arguments, "output_dir": str(tmp_path / name)}, tmp_path / "logs", 2, accidents)]

    def said() -> str:
        return (tmp_path / "logs" / "0").read_text()[-3000:]

    assert run("straight") == [0, 0], said()
    assert manifest(tmp_path / "straight")["engine"] == ("FSDPPackedModel" if engine == "fsdp" else f"DeepSpeedEngine, ZeRO stage {engine[-1]}")
    assert run("stopped", Accident("interlace.training.trainer:supervised_loss", 4, change=Ask(signal.SIGUSR1))) == [143, 143], said()
    assert_safe(tmp_path / "stopped")
    assert run("stopped") == [0, 0], said()
    assert_same_end(tmp_path / "straight", tmp_path / "stopped")
    assert run("broken", Accident("interlace.training.trainer:supervised_loss", 5, change=Spoil("loss"))) == [1, 1], said()
    assert "step 5: the loss is not finite" in said()
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "broken" / "checkpoint-3").values())
    assert run("broken") == [0, 0], said()
    assert_same_end(tmp_path / "straight", tmp_path / "broken")


@NEEDS_COMPILER
@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [("zero2", "zero3"), ("zero3", "ddp"), ("ddp", "zero1")])
def test_a_run_goes_on_under_another_engine_and_with_another_number_of_ranks(
    arguments: dict[str, Any], undisturbed: Path, tmp_path: Path, before: str, after: str
) -> None:
    """Two ranks before, one after: no conversion in between."""
    stop = {0: [Accident("interlace.training.trainer:supervised_loss", 3, change=Ask(signal.SIGTERM))]}
    first = {**arguments, **ENGINES.get(before, {}), "gradient_accumulation_steps": 1}
    assert [finish(rank, 400) for rank in run_ranks(first, tmp_path / "logs", 2, stop)] == [143, 143], (tmp_path / "logs" / "0").read_text()
    second = {**arguments, **ENGINES.get(after, {}), "gradient_accumulation_steps": 1}
    assert [finish(rank, 400) for rank in run_ranks(second, tmp_path / "logs", 1)] == [0], (tmp_path / "logs" / "0").read_text()
    assert_close_end(undisturbed, Path(arguments["output_dir"]))


def test_a_rank_that_dies_ends_the_others_with_its_name(arguments: dict[str, Any], undisturbed_pair: Path, tmp_path: Path) -> None:
    arguments = {**arguments, "gradient_accumulation_steps": 1}
    ranks = run_ranks(arguments, tmp_path / "logs", 2, {1: [Accident("interlace.training.trainer:supervised_loss", 6)]})
    assert finish(ranks[1]) == -signal.SIGKILL
    assert finish(ranks[0], 60) == 1
    said = (tmp_path / "logs" / "0").read_text()
    assert "rank 0 on" in said and "gone: rank 1 on" in said and "The checkpoints stand" in said and "Traceback" not in said
    assert_safe(Path(arguments["output_dir"]))
    assert [finish(rank) for rank in run_ranks(arguments, tmp_path / "logs", 2)] == [0, 0]
    assert_same_end(undisturbed_pair, Path(arguments["output_dir"]))


class Freeze:
    """Stops this process where it is, as a host that is cut off would seem to."""

    def __call__(self, result: Any) -> Any:
        time.sleep(5)  # a step long enough to be told
        os.kill(os.getpid(), signal.SIGSTOP)
        return result


def test_a_stuck_collective_is_reported_with_step_and_rows_and_ends_with_the_culprits_name(arguments: dict[str, Any], tmp_path: Path) -> None:
    arguments = {**arguments, "gradient_accumulation_steps": 1, "ddp_timeout": 12}
    frozen = Accident("interlace.training.trainer:supervised_loss", 5, change=Freeze())
    ranks = run_ranks(arguments, tmp_path / "logs", 2, {1: [frozen]})
    try:
        assert finish(ranks[0], 60) == 1
        said = (tmp_path / "logs" / "0").read_text()
        assert "no progress for" in said and "rank 0 on" in said and "it waits in:" in said
        assert "is at step 5, training, rows in flight: " in said and "rows.json: row" in said
        assert "gone: rank 1 on" in said
        os.kill(ranks[1].pid or 0, signal.SIGCONT)
        assert finish(ranks[1], 60) == 1, "back again, it finds that nobody is there"
    finally:
        ranks[1].kill()
    assert_safe(Path(arguments["output_dir"]))


@pytest.mark.parametrize("call", [1, 3], ids=["in the first step", "later"])
def test_a_broken_image_on_one_rank_ends_both_with_one_message(tiny_dir: Path, tmp_path: Path, call: int) -> None:
    """Whole when it was checked, broken when it is opened."""
    rows = write_rows(tmp_path / "data", 8)
    arguments = arguments_for(tiny_dir, rows, tmp_path / "run", dataset={"train": [{"data_files": str(rows)}]}, eval_strategy="no")
    broken = Accident("interlace.data.batch:open_images", call, change=break_image)
    codes = [finish(rank) for rank in run_ranks(arguments, tmp_path / "logs", 2, {1: [broken]})]
    assert codes == [2, 2]
    assert "its header was whole when the run began" in (tmp_path / "logs" / "0").read_text()


def break_image(images: Any) -> Any:
    from interlace.data.sample import BadRow

    raise BadRow("broken_image", "pictures/1.png: cut short")


# --- numbers ---


class Spoil:
    """Makes a batch's pixels, or the gradient of its log-probs, not finite."""

    def __init__(self, what: str):
        self.what = what

    def __call__(self, result: Any) -> Any:
        if self.what == "loss":
            return result * float("nan")
        result.register_hook(lambda gradient: gradient * float("inf"))
        return result


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_on_broken_numbers_is_never_made(arguments: dict[str, Any], undisturbed: Path, tmp_path: Path, what: str) -> None:
    broken, folder = Accident("interlace.training.trainer:supervised_loss", 10, change=Spoil(what)), Path(arguments["output_dir"])
    assert finish(run_in_process(arguments, tmp_path / "log", [broken])) == 1
    said = (tmp_path / "log").read_text()
    assert f"step 5: the {what} is not finite; rows of the micro-batch: " in said and "rows.json: row" in said and "Traceback" not in said
    assert "The weights are those of step 4" in said
    succeeds(arguments, tmp_path / "log")  # from step 4, as if nothing had happened
    assert_same_end(undisturbed, folder)
    skips = {**arguments, "output_dir": str(tmp_path / "skips"), "on_non_finite": "skip"}
    assert finish(run_in_process(skips, tmp_path / "log", [broken])) == 0
    assert logged(tmp_path / "skips", "skipped_steps")[STEPS] == 1
    assert [step for step, loss in logged(tmp_path / "skips").items() if not math.isfinite(loss)] == ([5] if what == "loss" else [])
    assert math.isfinite(json.loads((tmp_path / "skips" / "train_results.json").read_text())["train_loss"])
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "skips").values())
    before, after = (weights(tmp_path / "skips" / "checkpoint-6"), weights(undisturbed / "checkpoint-6"))
    assert not all(torch.equal(before[name], after[name]) for name in before)


def test_a_skipped_step_leaves_the_weights_as_they_were(tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    arguments = arguments_for(tiny_dir, data, tmp_path / "run", save_steps=1, save_total_limit=None, max_steps=3, on_non_finite="skip")
    broken = Accident("interlace.training.trainer:supervised_loss", 3, change=Spoil("gradient"))
    assert finish(run_in_process(arguments, tmp_path / "log", [broken])) == 0
    first, second, third = (weights(tmp_path / "run" / f"checkpoint-{step}") for step in (1, 2, 3))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(second[name], third[name]) for name in first)


def test_a_nan_on_one_rank_stops_both_at_the_same_step(arguments: dict[str, Any], tmp_path: Path) -> None:
    arguments = {**arguments, "gradient_accumulation_steps": 1}
    broken = Accident("interlace.training.trainer:supervised_loss", 5, change=Spoil("loss"))
    assert [finish(rank) for rank in run_ranks(arguments, tmp_path / "logs", 2, {1: [broken]})] == [1, 1]
    assert "step 5: the loss is not finite" in (tmp_path / "logs" / "0").read_text()
    assert all(tensor.isfinite().all() for tensor in weights(Path(arguments["output_dir"]) / "checkpoint-4").values())


# --- what may change between runs ---


def resumed(arguments: dict[str, Any], undisturbed: Path, **changes: Any) -> dict[str, Any]:
    """Arguments that go on from a copy of step 6 of the undisturbed run."""
    folder = Path(arguments["output_dir"])
    if not folder.exists():
        folder.mkdir()
        shutil.copytree(undisturbed / "checkpoint-6", folder / "checkpoint-6")
        for name in ("arguments.json", "ledger.json"):
            shutil.copy(undisturbed / name, folder)
    return {**arguments, **changes}


@pytest.mark.parametrize("change", ["dropped", "reordered", "edited"])
def test_changed_rows_are_refused_unless_the_user_accepts_them(arguments: dict[str, Any], undisturbed: Path, tmp_path: Path, change: str) -> None:
    rows = write_rows(tmp_path / "data", 24)
    values = json.loads(rows.read_text())
    changed = {"dropped": values[:-1], "reordered": values[::-1], "edited": [*values[:-1], {**values[-1], "conversations": values[0]["conversations"]}]}[change]
    if change == "edited":
        changed[-1].pop("image", None)
    rows.write_text(json.dumps(changed))
    arguments = resumed(arguments, undisturbed, dataset={**arguments["dataset"], "train": [{"data_files": str(rows)}]})
    with pytest.raises(InputError, match="not those that the run began with"):
        finetune(arguments)
    finetune({**arguments, "accept_data_change": True})


def test_the_same_rows_in_another_folder_are_the_same_rows(arguments: dict[str, Any], undisturbed: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "moved", 24)
    finetune(resumed(arguments, undisturbed, dataset={"train": [{"data_files": str(rows)}]}, eval_strategy="no"))
    assert_same_end(undisturbed, Path(arguments["output_dir"]))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"seed": 7}, "seed: was 42, is 7"),
        ({"lora_rank": 8}, "lora_rank: was 4, is 8"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps: 1 with 1 processes"),
        ({"max_length": 100}, "max_length: was 4096, is 100"),
    ],
)
def test_settings_that_decide_the_training_are_refused(arguments: dict[str, Any], undisturbed: Path, change: dict[str, Any], expected: str) -> None:
    arguments = resumed(arguments, undisturbed, **change)
    before = {path: path.stat().st_mtime_ns for path in Path(arguments["output_dir"]).rglob("*")}
    with pytest.raises(InputError, match=expected):
        finetune(arguments)
    assert {path: path.stat().st_mtime_ns for path in Path(arguments["output_dir"]).rglob("*")} == before


def test_another_learning_rate_is_said_and_taken(arguments: dict[str, Any], undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finetune(resumed(arguments, undisturbed, learning_rate=5e-3, eval_strategy="no"))
    assert "learning_rate: was 0.01, is 0.005" in capsys.readouterr().out
    before, after = logged(undisturbed, "learning_rate"), logged(Path(arguments["output_dir"]), "learning_rate")
    assert after[7] == pytest.approx(before[7] / 2)
    assert after[6] == before[6]


def test_another_save_interval_is_taken(arguments: dict[str, Any], undisturbed: Path) -> None:
    finetune(resumed(arguments, undisturbed, save_steps=1))
    assert [path.name for path in checkpoint_folders(Path(arguments["output_dir"]))] == ["checkpoint-7", "checkpoint-8"]


def test_a_checkpoint_from_elsewhere_sets_all_that_are_here_aside(arguments: dict[str, Any], undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed / "checkpoint-6", tmp_path / "theirs" / "checkpoint-6")
    folder = Path(arguments["output_dir"])
    shutil.copytree(undisturbed, folder, symlinks=True)
    theirs = {**arguments, "resume_from_checkpoint": str(tmp_path / "theirs" / "checkpoint-6")}
    assert finish(run_in_process(theirs, tmp_path / "log", [Accident("interlace.training.trainer:supervised_loss", 2)])) == -signal.SIGKILL
    assert not checkpoint_folders(folder)


def test_trust_does_not_excuse_a_missing_file(arguments: dict[str, Any], undisturbed: Path, tmp_path: Path) -> None:
    for name in ("scheduler.json", "progress.json", "optimizer-00000-of-00001.safetensors"):
        shutil.copytree(undisturbed / "checkpoint-6", tmp_path / name / "checkpoint-6")
        (tmp_path / name / "checkpoint-6" / name).unlink()
        with pytest.raises(InputError, match="is missing"):
            find_checkpoint(tmp_path, {**arguments, "resume_from_checkpoint": str(tmp_path / name / "checkpoint-6"), "trust_checkpoint": True}, print)


def test_going_back_sets_the_newer_checkpoints_aside(arguments: dict[str, Any], undisturbed: Path, tmp_path: Path) -> None:
    """A run that was taken back to step 6 never resumes from step 8 of before."""
    folder = Path(arguments["output_dir"])
    shutil.copytree(undisturbed, folder, symlinks=True)
    back = {**arguments, "resume_from_checkpoint": str(folder / "checkpoint-6"), "learning_rate": 5e-3}
    killed = Accident("interlace.training.trainer:supervised_loss", 2)
    assert finish(run_in_process(back, tmp_path / "log", [killed])) == -signal.SIGKILL
    assert (folder / f"superseded-checkpoint-{STEPS}").is_dir()
    found = find_checkpoint(folder, arguments, print)
    assert found is not None
    assert found.step == 6
    succeeds({**arguments, "learning_rate": 5e-3}, tmp_path / "log")
    assert logged(folder, "learning_rate")[7] == pytest.approx(logged(undisturbed, "learning_rate")[7] / 2)


def test_more_ranks_than_a_step_has_micro_batches_are_refused(arguments: dict[str, Any], undisturbed: Path, tmp_path: Path) -> None:
    arguments = resumed(arguments, undisturbed, gradient_accumulation_steps=1)
    assert [finish(rank) for rank in run_ranks(arguments, tmp_path / "logs", 3)] == [2, 2, 2]
    assert "a step of this run has 2 micro-batches, which 3 processes cannot share evenly" in (tmp_path / "logs" / "0").read_text()
