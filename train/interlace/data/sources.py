"""Reads the files of dataset entries into records, in order, with their file and index."""

import glob
import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interlace.data import demo
from interlace.data.formats import FORMATS, recognise
from interlace.data.sample import BadRow
from interlace.errors import InputError

NAMED_FORMATS = {"chatml_dataset": "chatml", **{name: name for name in FORMATS}}


@dataclass(frozen=True, slots=True)
class Record:
    """A row as it stands in its file. `roots` are the folders its images may lie in, the image folder first."""

    file: str
    index: int
    value: Any
    format: str
    roots: tuple[Path, ...]


def read_entries(entries: list[Mapping[str, Any]], seed: int) -> list[Record]:
    """All records of some dataset entries, in the order of entries, files and rows.

    Raises:
        InputError: with all missing, unreadable, empty or unrecognised files at once.
    """
    records: list[Record] = []
    problems: list[str] = []
    for number, entry in enumerate(entries):
        try:
            records += _read_entry(entry, seed + number)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n  ".join(problems))
    return records


def _read_entry(entry: Mapping[str, Any], seed: int) -> list[Record]:
    if entry["data_files"] == "demo":
        entry = {**entry, "data_files": str(demo.prepare() / f"{entry.get('split') or 'train'}.json")}
    elif entry.get("split"):
        raise InputError(f'{entry["data_files"]}: `split` goes with data_files "demo" only')
    records: list[Record] = []
    for file in expand(entry["data_files"]):
        folder = Path(entry["image_folder"]) if entry.get("image_folder") else Path(file).parent
        for root in [folder, *map(Path, entry.get("media_roots") or [])]:
            if not root.is_dir():
                raise InputError(f"{root}: no such folder; image_folder and media_roots must exist")
        rows = read_rows(Path(file))
        if not rows:
            raise InputError(f"{file}: no rows; expected a list of records")
        roots = (folder, *map(Path, entry.get("media_roots") or []))
        kind = entry.get("format") or NAMED_FORMATS.get(entry.get("name") or "") or _recognise_file(file, rows)
        records += [Record(file, index, row, kind, roots) for index, row in enumerate(rows)]
    return select(records, entry.get("sampling_strategy") or "all", seed)


def _recognise_file(file: str, rows: list[Any]) -> str:
    problem = ""
    for row in rows:
        try:
            return recognise(row)
        except BadRow as error:
            problem = problem or error.detail
    raise InputError(f"{file}: no row has a known format; {problem}; formats: {', '.join(FORMATS)}")


def expand(data_files: str | list[str]) -> list[str]:
    """Paths and globs -> existing files; a glob's files in sorted order.

    Raises:
        InputError: a path that does not exist, or a glob that matches nothing.
    """
    files: list[str] = []
    for pattern in [data_files] if isinstance(data_files, str) else data_files:
        found = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise InputError(f"{pattern}: no such file; data_files takes a path, a list of paths or a glob, from the current directory")
        files += found
    return files


def read_rows(path: Path) -> list[Any]:
    """The rows of a .json file (a list) or a .jsonl file (one object per line, blank lines not counted).

    Raises:
        InputError: not UTF-8, no complete JSON (with its line), or not a list.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    if path.suffix == ".jsonl":
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                raise InputError(f"{path}: line {number}: {error.msg}; each line must be one complete JSON object") from None
        return rows
    if not text.strip():
        raise InputError(f"{path}: the file is empty; expected a list of records")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}; the file is no complete JSON") from None
    if not isinstance(value, list):
        raise InputError(f"{path}: expected a list of records, got {type(value).__name__}; one object per line belongs into a .jsonl file")
    return value


def select(records: list[Record], strategy: str, seed: int) -> list[Record]:
    """LLaVA-NeXT's sampling strategies: `all`, `first:N`, `end:N`, `random:N`, N a count or a percentage (rounded up)."""
    if strategy == "all":
        return records
    kind, _, amount = strategy.partition(":")
    number, percent = amount.removesuffix("%"), amount.endswith("%")
    if kind not in ("first", "end", "random") or not number.replace(".", "", percent).isdigit():
        raise InputError(f"sampling_strategy: expected all, first:N, end:N or random:N (N a count or a percentage), got {strategy!r}")
    count = min(len(records), math.ceil(len(records) * float(number) / 100) if percent else int(number))
    if kind == "random":
        return [records[i] for i in sorted(random.Random(seed).sample(range(len(records)), count))]
    return records[:count] if kind == "first" else records[len(records) - count :]
