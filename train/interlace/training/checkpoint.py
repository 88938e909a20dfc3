"""Checkpoints: written aside, checksummed, and given their name only when they are whole; found again, the damaged ones set aside.

Each rank writes its files into a folder of another name and notes their sizes and checksums; when all ranks have, the main process writes the manifest
and renames the folder. So whatever has the name `checkpoint-N` was once whole, and its manifest tells whether it still is.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError

from interlace.errors import InputError
from interlace.files import sync_file, write_whole

MANIFEST = "manifest.json"
FORMAT = 1  # of what a checkpoint holds; another one cannot be taken up
LATEST = "checkpoint-latest"
STATE_FILE = "trainer_state.json"
REPORT_FILE = "report.html"
ANSWERS_FOLDER = "eval_answers"  # with a file for each evaluation
_SCRATCH = ".saving-checkpoint"
_NAME = re.compile(r"checkpoint-(\d+)")

Write = Callable[[Path], list[str]]  # writes into a folder and returns the names of the files


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder, the optimizer step, and the manifest's words about the run it belongs to."""

    folder: Path
    step: int
    about: dict[str, Any]


def step_of(folder: Path) -> int | None:
    """The optimizer step in the name of a checkpoint's folder; None for any other name."""
    match = _NAME.fullmatch(folder.name)
    return int(match.group(1)) if match and not folder.is_symlink() else None


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """Folders with the name of a checkpoint, oldest step first; whether they are whole still is another question."""
    return sorted((path for path in output_dir.glob("checkpoint-*") if step_of(path) is not None), key=lambda path: step_of(path) or 0)


def newest_step(output_dir: Path) -> int | None:
    """The step of the newest checkpoint by its name; None without any."""
    folders = checkpoint_folders(output_dir)
    return step_of(folders[-1]) if folders else None


# --- writing ---


class Saver:
    """Writes a run's checkpoints, one at a time, in a thread of its own.

    Args:
        output_dir: shared by all ranks.
        rank, world_size: of this process.
        about: what the manifest says about the run.
        limit: how many checkpoints to keep; None for all.
    """

    def __init__(self, output_dir: Path, rank: int, world_size: int, about: Mapping[str, Any], limit: int | None = None):
        self.output_dir, self.rank, self.world_size, self.about, self.limit = output_dir, rank, world_size, dict(about), limit
        self.step: int | None = None  # of the checkpoint that is being written
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._future: Future[None] | None = None

    @property
    def scratch(self) -> Path:
        """Where the checkpoint stands until it is whole."""
        return self.output_dir / f"{_SCRATCH}-{self.step}"

    def begin(self, step: int, write: Write, num_bytes: int) -> None:
        """Begins to write this rank's files of a checkpoint; the one before must have been settled.

        Args:
            write: writes the files; everything it needs must be its own, for training goes on meanwhile.
            num_bytes: about what all ranks will write, to refuse early where the disk has no room.
        """
        assert self.step is None
        self.step = step
        self._future = self._thread.submit(self._write, write, num_bytes)

    def _write(self, write: Write, num_bytes: int) -> None:
        self.scratch.mkdir(parents=True, exist_ok=True)
        free = _free_bytes(self.scratch)
        if self.rank == 0 and free < num_bytes:
            raise OSError(f"{num_bytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")
        files: dict[str, Any] = {}
        for name in write(self.scratch):
            sync_file(self.scratch / name)
            files[name] = _checksum(self.scratch / name)
        write_whole(self._part(self.rank), json.dumps(files))

    def _part(self, rank: int) -> Path:
        return self.scratch / f"part-{rank:05d}.json"

    @property
    def is_busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._future is not None and not self._future.done()

    def problem(self) -> str | None:
        """Waits until this rank has written; what the disk refused, if it did."""
        error = None if self._future is None else self._future.exception()
        if error is not None and not isinstance(error, (OSError, SafetensorError)):
            raise error
        return None if error is None else f"{self.scratch}: {error}"

    def commit(self, best: Path | None) -> Path:
        """On the main process, when all ranks have written: makes the checkpoint official, and the oldest beyond the limit go.

        Args:
            best: a checkpoint that stays in any case.

        Raises:
            OSError: the disk refused; what stood there before still stands.
        """
        assert self.rank == 0 and self.step is not None
        files: dict[str, Any] = {}
        for rank in range(self.world_size):
            files |= json.loads(self._part(rank).read_text(encoding="utf-8"))
            self._part(rank).unlink()
        manifest = {"format": FORMAT, "step": self.step, "world_size": self.world_size, **self.about, "files": dict(sorted(files.items()))}
        write_whole(self.scratch / MANIFEST, json.dumps(manifest, indent=1))
        _sync_folder(self.scratch)
        final = self.output_dir / f"checkpoint-{self.step}"
        remove_folder(final)  # of an earlier attempt at the same step
        self.scratch.rename(final)
        with contextlib.suppress(OSError):  # it stands; the next one tries again
            _sync_folder(self.output_dir)
            point_latest(self.output_dir)
            self._drop_oldest(best)
        self.step, self._future = None, None
        return final

    def settled(self) -> None:
        """On the other ranks: the main process has made the checkpoint official."""
        self.step, self._future = None, None

    def give_up(self) -> None:
        """After a failure on any rank: removes what was written of the checkpoint."""
        if self.rank == 0:
            shutil.rmtree(self.scratch, ignore_errors=True)
        self.settled()

    def _drop_oldest(self, best: Path | None) -> None:
        folders = checkpoint_folders(self.output_dir)
        spare = [folder for folder in folders[:-1] if best is None or folder.resolve() != best.resolve()]
        if self.limit is not None:
            for folder in spare[: max(0, len(folders) - self.limit)]:
                remove_folder(folder)


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _checksum(path: Path) -> dict[str, Any]:
    """A file's bytes and SHA-256."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync_folder(folder: Path) -> None:
    """Brings names of files to the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def remove_folder(folder: Path) -> None:
    """Removes a checkpoint; it loses its name first, so that no half of it is ever taken for one."""
    if folder.is_dir():
        scratch = folder.with_name(f".removing-{folder.name}")
        shutil.rmtree(scratch, ignore_errors=True)
        folder.rename(scratch)
        shutil.rmtree(scratch, ignore_errors=True)


def point_latest(output_dir: Path) -> None:
    """Lets `checkpoint-latest` name the newest checkpoint, in one step; without any, it goes."""
    folders, scratch = checkpoint_folders(output_dir), output_dir / f".{LATEST}"
    if not folders:
        (output_dir / LATEST).unlink(missing_ok=True)
        return
    if not (output_dir / LATEST).is_symlink() or (output_dir / LATEST).readlink() != Path(folders[-1].name):
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(folders[-1].name)
        scratch.replace(output_dir / LATEST)


def clear_scratch(output_dir: Path) -> None:
    """Removes what an earlier process left half written or half removed."""
    for pattern in (f"{_SCRATCH}-*", ".removing-checkpoint-*"):
        for path in output_dir.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


# --- finding ---


def damage(folder: Path, allow_missing: bool = False) -> str | None:
    """What is wrong with a checkpoint, by its manifest: the first file that is missing, cut short or changed; None if it is whole.

    Args:
        allow_missing: whether files may be missing.
    """
    try:
        files: dict[str, Any] = _manifest(folder)["files"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read: {error}"
    there = {name: expected for name, expected in files.items() if (folder / name).is_file()}
    missing = sorted(set(files) - set(there))
    if missing and not allow_missing:
        return f"{missing[0]} is missing"
    for name, expected in there.items():
        size = (folder / name).stat().st_size
        if size != expected["bytes"]:
            return f"{name} has {size:,} bytes, expected {expected['bytes']:,}"
    with ThreadPoolExecutor(psutil.cpu_count() or 1) as threads:  # hashing runs beside the interpreter
        same = threads.map(lambda name: _checksum(folder / name)["sha256"] == there[name]["sha256"], there)
        return next((f"{name} is not what was written: its checksum differs" for name, is_same in zip(there, same, strict=True) if not is_same), None)


def missing_files(folder: Path) -> list[str]:
    """Files that a checkpoint's manifest names and that are not there."""
    return [name for name in _manifest(folder)["files"] if not (folder / name).is_file()]


def _manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def open_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint that has been found whole, or that the user trusts.

    Raises:
        InputError: it lacks what says where training stood.
    """
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        about = _manifest(folder) if (folder / MANIFEST).is_file() else {}
        return Checkpoint(folder, int(state["global_step"]), about)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: no complete checkpoint: {STATE_FILE} or {MANIFEST} cannot be read: {error}") from None


def newest_whole(output_dir: Path, problem_of: Callable[[Path], str | None], say: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint of a folder; damaged ones on the way are renamed, and each is said with what is wrong.

    Args:
        problem_of: `damage`, or something more lenient.

    Raises:
        InputError: there are checkpoints, and none is whole.
    """
    problems: list[str] = []
    for folder in reversed(checkpoint_folders(output_dir)):
        problem = problem_of(folder)
        if problem is None:
            if problems:
                point_latest(output_dir)
            return open_checkpoint(folder)
        aside = set_aside(folder, "damaged")
        problems.append(f"{folder}: damaged: {problem}; it is now {aside.name}")
        say(problems[-1])
    point_latest(output_dir)
    if problems:
        raise InputError(
            f"resume_from_checkpoint: no whole checkpoint is left in {output_dir}; start over with overwrite_output_dir: true, or name one yourself "
            "with allow_partial_resume: true (files are missing) or trust_checkpoint: true (files were changed)\n  " + "\n  ".join(problems)
        )
    return None


def set_aside(folder: Path, word: str) -> Path:
    """Renames a checkpoint, so that it is never taken for a newest one; its new name."""
    names = (folder.with_name(f"{word}-{folder.name}" + (f"-{number}" if number else "")) for number in itertools.count())
    aside = next(name for name in names if not name.exists())
    folder.rename(aside)
    return aside
