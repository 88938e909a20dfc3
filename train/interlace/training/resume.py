"""Where a run may write, and what it may go on from."""

import json
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from interlace.errors import InputError
from interlace.training.checkpoint import (
    ANSWERS_FOLDER,
    FORMAT,
    LATEST,
    REPORT_FILE,
    STATE_FILE,
    Checkpoint,
    checkpoint_folders,
    clear_scratch,
    damage,
    missing_files,
    newest_whole,
    open_checkpoint,
    point_latest,
    set_aside,
    step_of,
)
from interlace.training.state import PROGRESS_FILE, SCHEDULER_FILE

RESULTS = (
    *(STATE_FILE, "train_results.json", "all_results.json", "training_curves.png"),
    *(REPORT_FILE, "row_report.parquet", "row_report.json", "row_drop.json"),
)
RECORDS = ("arguments.json", "environment.json", "ledger.json", "loss_spikes.jsonl", "wandb_run_id.txt", "README.md", *RESULTS)
MODEL_FILES = ("config.json", "generation_config.json", "adapter_config.json", "*.safetensors", "*.safetensors.index.json", "*.bin")
# What else decides which weights train and how a row becomes numbers; rows, their order and their number per step are held against the plan's fingerprint
FIXED_KEYS = (
    *("model_name_or_path", "lora", "lora_path", "lora_rank", "lora_alpha", "lora_target_modules", "use_dora", "use_rslora", "load_in_4bit", "load_in_8bit"),
    *("lora_init", "tunable_parts", "freeze_include", "freeze_exclude", "optim", "lora_dtype"),
)
DATA_KEYS = (
    *(
        "image_aspect_ratio",
        "min_pixels",
        "max_pixels",
        "num_frames",
        "video_fps",
        "max_length",
        "too_long",
        "bad_rows",
        "system_prompt",
        "label_policy",
        "seed",
        "data_seed",
    ),
    *("prompt_style", "image_placement", "image_placement_ratio", "newline_after_image"),
    *("packing", "per_device_train_batch_size", "max_tokens_per_batch", "share_prefix", "max_rows_per_prefix"),
)
# Keys that change nothing about the training: no word is lost about them
FREE_KEYS = (
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "accept_data_change",
    "allow_partial_resume",
    "trust_checkpoint",
    "output_dir",
    "row_report",
    "row_report_images",
    "eval_on_start",
    "local_rank",
)


def check_output_dir(output_dir: Path, resumes: bool, overwrite: bool, sources: Sequence[str]) -> None:
    """Refuses a folder that holds another run or a model, and always one that the run starts from (`sources`).

    Raises:
        InputError: it is a file, or holds a run and neither resuming nor overwriting was asked for.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"output_dir: {output_dir} is a file; expected a folder, new or empty")
    for source in sources:
        if output_dir.resolve() == Path(source).resolve():
            raise InputError(f"output_dir: {output_dir} is what this run starts from; choose another folder")
    held = [path.name for pattern in (*RECORDS, *MODEL_FILES, "checkpoint-*", "*-checkpoint-*") for path in output_dir.glob(pattern)]
    if held and not resumes and not overwrite:
        raise InputError(
            f"output_dir: {output_dir} already holds a run or a model ({', '.join(held[:3])}); choose another folder, "
            "or set resume_from_checkpoint: true to go on, or overwrite_output_dir: true to start over"
        )


def folders_of_lists(arguments: Mapping[str, Any]) -> list[str]:
    """The folders of the lists that `exclude_rows` names: a run that wrote there would write over them."""
    entries = [*arguments["dataset"]["train"], *(arguments["dataset"].get("eval") or [])]
    return [str(Path(entry["exclude_rows"]).parent) for entry in entries if entry.get("exclude_rows")]


def find_checkpoint(output_dir: Path, arguments: Mapping[str, Any], say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint to go on from: the one named by `resume_from_checkpoint`, the newest whole one for `true`, or None.

    Raises:
        InputError: the one named is no whole checkpoint, or none is whole though there are some.
    """
    wanted = arguments["resume_from_checkpoint"]

    def problem_of(folder: Path) -> str | None:
        if not arguments["trust_checkpoint"]:
            return damage(folder, arguments["allow_partial_resume"])
        needed = () if arguments["allow_partial_resume"] else (STATE_FILE, SCHEDULER_FILE, PROGRESS_FILE, "optimizer-*")
        return next((f"{name} is missing" for name in needed if not any(folder.glob(name))), None)

    if not wanted:
        return None
    if wanted is True:
        return _known(newest_whole(output_dir, problem_of, say), say)
    folder = Path(wanted).resolve()
    problem = problem_of(folder) if folder.is_dir() else "no such folder"
    if problem is not None:
        raise InputError(
            f"resume_from_checkpoint: {wanted}: no complete checkpoint: {problem}; take another one, or set allow_partial_resume: true "
            "(files are missing: what they held starts afresh) or trust_checkpoint: true (files were changed, or it has no manifest)"
        )
    return _known(open_checkpoint(folder), say)


def _known(checkpoint: Checkpoint | None, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint, after saying what is not in it.

    Raises:
        InputError: what is not in it are the weights, or it is of another format.
    """
    if checkpoint is not None and checkpoint.about and checkpoint.about.get("format") != FORMAT:
        raise InputError(f"{checkpoint.folder}: written by another version of Interlace; go on with that version, or start over in another output_dir")
    missing = missing_files(checkpoint.folder) if checkpoint is not None and checkpoint.about else []
    if any("model" in name and name.endswith(".safetensors") for name in missing):
        raise InputError(f"resume_from_checkpoint: the weights are missing: {', '.join(missing)}; take another checkpoint")
    if missing and checkpoint is not None:
        say(f"{checkpoint.folder}: missing: {', '.join(missing)}; what they held starts afresh (allow_partial_resume)")
    return checkpoint


def finished_steps(output_dir: Path) -> int:
    """Steps of a run that has come to its end in this folder; 0 if none has."""
    path = output_dir / STATE_FILE
    return int(json.loads(path.read_text(encoding="utf-8"))["global_step"]) if path.is_file() else 0


def check_settings(checkpoint: Checkpoint, arguments: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Holds the arguments against those that the checkpoint was made with: what trains must be the same, and how rows are read, unless
    `accept_data_change`; every other difference is said. Where the data lie may change: `check_data` looks at the rows themselves.

    Raises:
        InputError: the keys that changed, with what they were and are.
    """
    path = checkpoint.folder / "arguments.json"
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = {name: f"{name}: was {before[name]!r}, is {value!r}" for name, value in arguments.items() if name in before and before[name] != value}
    fixed = [*FIXED_KEYS, *(() if arguments["accept_data_change"] else DATA_KEYS)]
    refused = [text for name, text in changed.items() if name in fixed]
    if refused:
        door = "" if any(name in FIXED_KEYS for name in changed) else ", or set accept_data_change: true"
        raise InputError(
            f"{checkpoint.folder} belongs to a run with other settings; change them back{door}, or start over in another output_dir\n  " + "\n  ".join(refused)
        )
    said = [text for name, text in changed.items() if name not in FREE_KEYS]
    if said:
        say(f"{checkpoint.folder} was made with other settings; from here on:\n  " + "\n  ".join(said))


def check_data(checkpoint: Checkpoint, fingerprint: str, steps_per_epoch: int, accept: bool, say: Callable[[str], None]) -> None:
    """Holds rows and plan against those of the checkpoint.

    Raises:
        InputError: they differ, and `accept_data_change` does not allow it.
    """
    before, steps_before = checkpoint.about.get("data"), checkpoint.about.get("steps_per_epoch")
    if before not in (None, fingerprint):
        what = "the rows of dataset.train are not those that the run began with"
        hint = " (a file was edited, rows were added, dropped or reordered); restore them"
    elif steps_before not in (None, steps_per_epoch):
        what = f"an epoch of the plan has {steps_per_epoch} steps now, and had {steps_before}"
        hint = ": of the epochs that num_train_epochs or max_steps ask for, the fullest decides; ask for as many as before"
    else:
        return
    if not accept:
        raise InputError(f"{checkpoint.folder}: {what}{hint}, or set accept_data_change: true to go on with a new plan, or start over in another output_dir")
    say(f"{what}; accept_data_change: going on at the same place of a new plan")


def accumulation_for(checkpoint: Checkpoint, world_size: int, accumulation: int, say: Callable[[str], None]) -> int:
    """Micro-batches per rank and step, so that a step has as many over all ranks as it had before.

    Raises:
        InputError: that number does not divide among the ranks, or another one was asked for with the same number of ranks.
    """
    before = checkpoint.about.get("micro_batches")
    if before is None or before == world_size * accumulation:
        return accumulation
    if world_size == checkpoint.about["world_size"]:
        raise InputError(
            f"gradient_accumulation_steps: {accumulation} with {world_size} processes; {checkpoint.folder} was made with {before // world_size}, and the plan "
            "of batches rests on it; change it back, or start over in another output_dir"
        )
    if before % world_size:
        raise InputError(
            f"{checkpoint.folder}: a step of this run has {before} micro-batches, which {world_size} processes cannot share evenly; "
            f"expected a number of processes that divides {before}"
        )
    say(f"{checkpoint.about['world_size']} processes before, {world_size} now: gradient_accumulation_steps {accumulation} -> {before // world_size}")
    return before // world_size  # type: ignore[no-any-return]


def begin_branch(output_dir: Path, checkpoint: Checkpoint | None, overwrite: bool) -> str:
    """Makes a folder ready for a run: what is newer than its checkpoint is set aside, what an earlier run left is removed if it may be. The run's id."""
    clear_scratch(output_dir)
    if overwrite:
        clear_run(output_dir)
    if checkpoint is not None:
        is_elsewhere = checkpoint.folder.resolve().parent != output_dir.resolve()  # then those that are here belong to another run
        for folder in checkpoint_folders(output_dir):
            if is_elsewhere or (step_of(folder) or 0) > checkpoint.step:
                set_aside(folder, "superseded")
        point_latest(output_dir)
        for name in RESULTS:  # of an end that this run has not reached yet
            (output_dir / name).unlink(missing_ok=True)
        for path in (output_dir / ANSWERS_FOLDER).glob("step-*.jsonl"):
            step = path.stem.removeprefix("step-")
            if is_elsewhere or not step.isdecimal() or int(step) > checkpoint.step:
                path.unlink()
    return uuid.uuid4().hex if checkpoint is None else checkpoint.about.get("run", uuid.uuid4().hex)


def clear_run(output_dir: Path) -> None:
    """Removes an earlier run's records, model and checkpoints, so that nothing of it can be taken for the new run's."""
    (output_dir / LATEST).unlink(missing_ok=True)
    for pattern in ("checkpoint-*", "*-checkpoint-*"):
        for path in output_dir.glob(pattern):
            shutil.rmtree(path)
    if (output_dir / ANSWERS_FOLDER).is_dir():
        shutil.rmtree(output_dir / ANSWERS_FOLDER)
    for pattern in (*RECORDS, *MODEL_FILES):
        for path in output_dir.glob(pattern):
            path.unlink()
