"""Reference log-probs on disk: computed once before training, shared by the ranks, taken up half-way, refused when anything they rest on has changed."""

import hashlib
import json
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from interlace.data.store import Store
from interlace.errors import InputError
from interlace.files import set_default_mode, write_whole
from interlace.ranks import Ranks

_SECONDS_PER_PART = 60
ABOUT_FILE = "about.json"
_WORDS = {
    "weights": "the model's weights",
    "adapter": "the adapter in lora_path",
    "prompt": "tokenizer or prompt",
    "images": "how images are processed",
    "precision": "precision or quantisation",
    "rows": "the rows",
    "media": "the content of images or videos",
}


class ScoreRows(Protocol):
    """Numbers of rows -> (number, log-probs of its supervised tokens) of this rank's share of them, in any order."""

    def __call__(self, numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]: ...


@dataclass(frozen=True)
class StoredLogProbs:
    """The log-probs of the reference for all supervised tokens of some rows, in a folder.

    Args:
        folder: holds `about.json` and the parts that were computed.
        settings: names and hashes of all that the values rest on.
        counts: (rows,) supervised tokens of each row.
    """

    folder: Path
    settings: Mapping[str, str]
    counts: np.ndarray

    def open(self) -> None:
        """Makes the folder, or finds it; to be called by one rank.

        Raises:
            InputError: the folder cannot be written, or what is in it rests on something else.
        """
        about, kept = self.folder / ABOUT_FILE, None
        try:
            others = [path.name for path in self.folder.iterdir() if not path.name.startswith(".")] if self.folder.is_dir() else []
            if not others:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_whole(about, json.dumps(dict(self.settings), indent=2) + "\n")
            if ABOUT_FILE in others or not others:
                kept = json.loads(about.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"reference_dir: {self.folder}: {error}; choose another folder") from error
        if not isinstance(kept, dict):
            raise InputError(f"reference_dir: {self.folder} holds other files and no {ABOUT_FILE} of ours; expected an empty or new folder")
        changed = [words for name, words in _WORDS.items() if kept.get(name) != self.settings[name]]
        if changed:
            raise InputError(
                f"reference_dir: {self.folder} was computed with another state of: {', '.join(changed)}; its log-probs do not hold here. Choose another "
                "reference_dir, or remove this one to have it computed again"
            )

    def fill(self, score: ScoreRows, ranks: Ranks, show: str) -> torch.Tensor:
        """Computes what is missing, each rank its share, and reads all.

        Args:
            show: what the progress bar says.

        Returns:
            (supervised tokens of all rows,), row by row.

        Raises:
            InputError: on all ranks, if a row's images cannot be read or the disk refuses on one.
        """
        values, known = self._read()
        known = np.logical_and.reduce(ranks.gather(known))  # a folder may look older from one machine than from another
        missing = np.flatnonzero(~known)
        if len(missing):
            problem = self._add(score, missing, ranks, show)
            problems = [found for found in ranks.gather(problem) if found]
            if problems:
                raise InputError("\n  ".join(dict.fromkeys(problems)))
            values, known = self._read()
            if not all(ranks.gather(bool(known.all()))):
                raise InputError(f"reference_dir: {self.folder}: not all that was written there can be read; is the folder shared by all machines?")
        return torch.from_numpy(values)

    def _add(self, score: ScoreRows, missing: np.ndarray, ranks: Ranks, show: str) -> str | None:
        bar = tqdm(total=len(missing), desc=show, disable=not ranks.is_main, leave=False)
        waiting: dict[int, np.ndarray] = {}
        since = time.monotonic()
        try:
            with bar:
                for number, values in score(missing):
                    waiting[number] = values
                    bar.update(ranks.world_size)
                    if time.monotonic() - since > _SECONDS_PER_PART:
                        self._write(waiting)
                        waiting, since = {}, time.monotonic()
            self._write(waiting)
        except InputError as error:
            return str(error)
        except OSError as error:
            return f"reference_dir: {self.folder} cannot be written: {error.strerror or error}; make room, or choose another folder: what is there is kept"
        return None

    @property
    def starts(self) -> np.ndarray:
        """(rows + 1,) where each row's values begin."""
        return np.concatenate([[0], np.cumsum(self.counts)])

    def _read(self) -> tuple[np.ndarray, np.ndarray]:
        """All values, NaN where there are none, and which rows are known."""
        starts = self.starts
        values, known = np.full(int(starts[-1]), np.nan, np.float32), np.zeros(len(self.counts), bool)
        for part in sorted(self.folder.glob("part-*.npz")):
            try:
                with np.load(part) as stored:
                    numbers, found = stored["rows"], stored["values"]
            except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):  # damaged: what it held is computed again
                continue
            if len(found) != self.counts[numbers].sum():
                continue
            bounds = np.concatenate([[0], np.cumsum(self.counts[numbers])])
            for number, start, end in zip(numbers, bounds[:-1], bounds[1:], strict=True):
                values[starts[number] : starts[number + 1]] = found[start:end]
            known[numbers] = True
        return values, known & ~np.isnan(np.add.reduceat(values, starts[:-1]) if len(values) else values)

    def _write(self, rows: Mapping[int, np.ndarray]) -> None:
        if not rows:
            return
        descriptor, scratch = tempfile.mkstemp(prefix=".writing-", dir=self.folder)
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, rows=np.array(list(rows)), values=np.concatenate(list(rows.values())).astype(np.float32))
            file.flush()
            os.fsync(file.fileno())
        set_default_mode(Path(scratch))
        Path(scratch).replace(self.folder / f"part-{Path(scratch).name.removeprefix('.writing-')}.npz")


def media_hash(stores: Sequence[Store], known_file: Path) -> str:
    """A hash of the content of all files that the rows of some stores show, in order of first use.

    Args:
        known_file: keeps what was read of each file, with its size and time of change: files that look the same are not read again.
    """
    try:
        known: dict[str, list[Any]] = json.loads(known_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    paths = dict.fromkeys(path for store in stores for media in store.media() for path in media.field("path").to_pylist())
    found: dict[str, list[Any]] = {}
    content = hashlib.sha256()
    for path in tqdm(paths, desc="reading images", leave=False):
        stat = Path(path).stat()
        state = [stat.st_size, stat.st_mtime_ns]
        found[path] = known[path] if known.get(path, [])[:2] == state else [*state, hash_of_file(Path(path))]
        content.update(found[path][2].encode())
    if found != {path: known.get(path) for path in found}:
        known_file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, scratch = tempfile.mkstemp(prefix=".media-", dir=known_file.parent)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(known | found, file)
        set_default_mode(Path(scratch))
        shutil.move(scratch, known_file)
    return content.hexdigest()


def hash_of_file(path: Path) -> str:
    """A hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_for(cache_dir: Path, settings: Mapping[str, str]) -> Path:
    """Where values are kept when the user names no place."""
    key = hashlib.sha256(json.dumps([settings[name] for name in _WORDS]).encode()).hexdigest()[:32]
    return cache_dir / "reference" / key
