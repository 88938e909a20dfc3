"""Dataset entries -> sources: which files and tables there are, which of their rows are taken, how often, and where their media lie."""

import glob
import hashlib
import math
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from interlace.data import demo
from interlace.data.formats import FORMATS
from interlace.data.readers import dataset_rows, read_rows
from interlace.data.row_lists import read_list, rows_to_exclude
from interlace.errors import InputError

NAMED_FORMATS = {"chatml_dataset": "chatml", **{name: name for name in FORMATS}}
_MIXTURE_SUFFIXES = (".yaml", ".yml")
_WHOLLY_HASHED = (".json", ".jsonl", ".gz")
_END_BYTES = 1 << 20


@dataclass(frozen=True)
class Source:
    """One file or table of rows.

    Args:
        file: its path as listed, or `owner/name:split` of a hub data set; names the rows in the ledger.
        name: for logs and metrics.
        format: of every row; None where each row's own keys tell.
        image_roots, video_roots: folders that media may lie in, the declared one first.
        weight: how often each row comes in an epoch.
        taken: numbers of the rows to take, rising; None for all.
        excluded: index -> reason of the rows that a list leaves out; they are accounted for as skipped.
        table: the rows of a hub data set, instead of a file.
    """

    file: str
    name: str
    format: str | None
    image_roots: tuple[Path, ...]
    video_roots: tuple[Path, ...]
    weight: float = 1.0
    taken: np.ndarray | None = None
    excluded: Mapping[int, str] = field(default_factory=dict)
    table: Any = field(default=None, compare=False)

    def rows(self) -> Iterator[tuple[int, Any, float]]:
        """(index, value, position) of every row to take; see `readers`.

        Raises:
            InputError: the file as a whole cannot be read.
        """
        rows = read_rows(Path(self.file)) if self.table is None else dataset_rows(self.table)
        if self.taken is None:
            yield from rows
            return
        wanted = iter(self.taken)
        next_index = next(wanted, None)
        for index, value, position in rows:
            if next_index is None:
                return
            if index == next_index:
                yield index, value, position
                next_index = next(wanted, None)

    def content_hash(self) -> str:
        """A hash that changes with the content: of all bytes for text, of size, time and both ends for archives and tables."""
        return self._hash(with_time=True)

    @property
    def fingerprint(self) -> str:
        """A hash that also a copy has, whatever it is called: of all bytes for text, of size and both ends for archives and tables."""
        return self._hash(with_time=False)

    def _hash(self, with_time: bool) -> str:
        digest = hashlib.sha256()
        if self.table is not None:
            digest.update(str(self.table._fingerprint).encode())
            return digest.hexdigest()
        path = Path(self.file)
        files = sorted(file for file in path.glob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            with file.open("rb") as handle:
                if file.suffix.lower() in _WHOLLY_HASHED:
                    digest.update(hashlib.file_digest(handle, "sha256").digest())
                    continue
                stat = file.stat()
                digest.update((f"{file.name} {stat.st_size} {stat.st_mtime_ns}" if with_time else f"{stat.st_size}").encode())
                digest.update(handle.read(_END_BYTES))
                handle.seek(max(0, stat.st_size - _END_BYTES))
                digest.update(handle.read())
        return digest.hexdigest()


def read_entries(entries: list[Mapping[str, Any]], seed: int) -> list[Source]:
    """The sources of dataset entries, in the order of entries and files.

    Args:
        seed: of `random:N` in `sampling_strategy`; the same rows on every machine and in every restart.

    Raises:
        InputError: with everything wrong at once: files that are missing, folders, mixtures, strategies.
    """
    sources: list[Source] = []
    problems: list[str] = []
    for number, entry in enumerate(entries):
        for part, step in enumerate(_expand_mixtures(entry, problems)):
            try:
                sources += _read_entry(step, seed + number if part == 0 else f"{seed} {number} {part}")
            except InputError as error:
                problems.append(str(error))
    if problems:
        raise InputError("\n  ".join(problems))
    return sources


def _expand_mixtures(entry: Mapping[str, Any], problems: list[str]) -> Iterator[Mapping[str, Any]]:
    """An entry as it is, or one entry for each of those a yaml mixture lists."""
    files = [entry["data_files"]] if isinstance(entry["data_files"], str) else list(entry["data_files"])
    mixtures = [file for file in files if file.lower().endswith(_MIXTURE_SUFFIXES)]
    rest = [file for file in files if file not in mixtures]
    if rest or not mixtures:
        yield entry if not mixtures else {**entry, "data_files": rest}
    for file in mixtures:
        try:
            yield from _read_mixture(Path(file), entry)
        except InputError as error:
            problems.append(str(error))


_TEXT_KEYS = ("sampling_strategy", "image_folder", "video_folder", "format")
_MIXTURE_KEYS = {
    "json_path": "data_files",
    "data_files": "data_files",
    "sampling_strategy": "",
    "image_folder": "",
    "video_folder": "",
    "weight": "",
    "format": "",
}


def _read_mixture(path: Path, entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """LLaVA-NeXT's yaml mixtures: `datasets: [{json_path, sampling_strategy}]`; also the keys of our entries."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: no valid yaml: {error}") from None
    steps = value.get("datasets") if isinstance(value, dict) else None
    if not isinstance(steps, list) or not steps:
        raise InputError(f"{path}: expected `datasets`, a list of {{json_path, sampling_strategy}}")
    entries = []
    for number, step in enumerate(steps):
        where = f"{path}: datasets[{number}]"
        if not isinstance(step, dict) or not isinstance(step.get("json_path", step.get("data_files")), str):
            raise InputError(f"{where}: expected {{json_path, sampling_strategy}}, got {str(step)[:80]}")
        unknown = set(step) - set(_MIXTURE_KEYS)
        if unknown:
            raise InputError(f"{where}: unknown keys {', '.join(sorted(map(str, unknown)))}; known: {', '.join(_MIXTURE_KEYS)}")
        wrong = [name for name in _TEXT_KEYS if not isinstance(step.get(name), (str, type(None)))]
        wrong += ["weight"] if isinstance(step.get("weight"), bool) or not isinstance(step.get("weight", 1), (int, float)) else []
        if wrong:
            raise InputError(f"{where}: {', '.join(f'{name}: {step[name]!r}' for name in wrong)}: expected a text (weight: a number)")
        renamed = {_MIXTURE_KEYS[name] or name: item for name, item in step.items()}
        twice = [name for name in renamed if name != "data_files" and name in entry and entry[name] not in (None, "all", 1, 1.0, renamed[name])]
        if twice:
            raise InputError(f"{where}: {', '.join(twice)} is also in the dataset entry, with another value; keep one")
        file = renamed["data_files"]
        if not expand(file, quiet=True) and expand(str(path.parent / file), quiet=True):
            renamed["data_files"] = str(path.parent / file)
        entries.append({**entry, **renamed})
    return entries


def _read_entry(entry: Mapping[str, Any], seed: int | str) -> list[Source]:
    if entry["data_files"] in ("demo", ["demo"]):
        if (entry.get("split") or "train") not in demo.SPLITS:
            raise InputError(f"demo: no split {entry['split']!r}; expected one of {', '.join(demo.SPLITS)}")
        entry = {**entry, "data_files": str(demo.prepare() / f"{entry.get('split') or 'train'}.json"), "split": None}
    weight = entry.get("weight")
    weight = 1.0 if weight is None else float(weight)
    if not 0 < weight < math.inf:
        raise InputError(f"{entry['data_files']}: weight: expected a number above 0, got {weight}")
    if entry.get("format") not in (None, *FORMATS):
        raise InputError(f"{entry['data_files']}: format: expected one of {', '.join(FORMATS)}, got {entry['format']!r}")
    kind = entry.get("format") or NAMED_FORMATS.get(entry.get("name") or "")
    sources = []
    for file, table in _tables(entry):
        beside = Path(file).parent if table is None else Path()
        name = entry.get("name") or (Path(file).name.partition(".")[0] if table is None else str(entry["data_files"]))
        image_roots, video_roots = (_roots(entry, folder, beside) for folder in ("image_folder", "video_folder"))
        sources.append(Source(file, name, kind, image_roots, video_roots, weight, table=table))
    selected = _selected(sources, entry.get("sampling_strategy") or "all", seed)
    return _excluding(selected, entry["exclude_rows"]) if entry.get("exclude_rows") else selected


def _excluding(sources: list[Source], path: str) -> list[Source]:
    listed, problems, found = read_list(Path(path)), [], []
    for source in sources:
        try:
            found.append(replace(source, excluded=rows_to_exclude(path, listed, source.file, source.fingerprint)))
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n  ".join(problems))
    return found


def _roots(entry: Mapping[str, Any], key: str, beside: Path) -> tuple[Path, ...]:
    """The declared folder (else the other medium's, else the data file's own), then `media_roots`."""
    folder = entry.get(key) or entry.get("image_folder") or entry.get("video_folder")
    roots = (Path(folder) if folder else beside, *map(Path, entry.get("media_roots") or []))
    for root in roots:
        if not root.is_dir():
            raise InputError(f"{root}: no such folder; image_folder, video_folder and media_roots must exist")
    return roots


def _tables(entry: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(file, None) for files, (name, table) for a hub data set."""
    files = entry["data_files"]
    if isinstance(files, str) and is_hub_name(files):
        return [_hub_table(files, entry.get("subset"), entry.get("split") or "train")]
    if entry.get("split"):
        raise InputError(f'{files}: `split` goes with data_files "demo" or a hub data set only')
    return [(file, None) for file in expand(files)]


def is_hub_name(name: str) -> bool:
    """Whether `data_files` names a data set on the hub: it looks like one, and no file is there."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not expand(name, quiet=True) and not _looks_like_file(name)


def _looks_like_file(name: str) -> bool:
    return Path(name).suffix.lower() in (".json", ".jsonl", ".gz", ".parquet", ".tar", ".tgz", *_MIXTURE_SUFFIXES)


def _hub_table(name: str, subset: str | None, split: str) -> tuple[str, Any]:
    import datasets

    try:
        table = datasets.load_dataset(name, subset, split=split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, ConnectionError) as error:
        text = str(error).split("\n")[0]
        raise InputError(f"{name}: neither a file here nor a data set that the hub gives: {text}") from None
    return f"{name}:{split}", table


def expand(data_files: str | list[str], quiet: bool = False) -> list[str]:
    """Paths, brace lists and globs -> existing files (or folders that `datasets` saved); a glob's files in sorted order.

    Raises:
        InputError: a path that does not exist, or a glob that matches nothing (unless `quiet`, which leaves it out).
    """
    files: list[str] = []
    for pattern in [data_files] if isinstance(data_files, str) else data_files:
        for name in _braces(pattern):
            exists = _holds_rows(name) or (Path(name).is_dir() and not quiet)
            found = [name] if exists else sorted(filter(_holds_rows, glob.glob(name, recursive=True)))
            if not found and not quiet:
                raise InputError(f"{name}: no such file; data_files takes a path, a list of paths, a brace list or a glob, from the current directory")
            files += found
    return files


def _holds_rows(name: str) -> bool:
    try:
        return Path(name).is_file() or (Path(name) / "state.json").is_file()
    except OSError:  # no name that a file could have
        return False


def _braces(pattern: str) -> list[str]:
    """`a/{b,c}.json` -> `a/b.json`, `a/c.json`; a file that is really named so stays as it is."""
    match = None if Path(pattern).exists() else re.search(r"\{([^{}]*,[^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    return [name for choice in match[1].split(",") for name in _braces(pattern[: match.start()] + choice.strip() + pattern[match.end() :])]


def _selected(sources: list[Source], strategy: str, seed: int | str) -> list[Source]:
    """The sources with the rows that a strategy takes from all of them together; a source none of whose rows are taken goes."""
    kind, count, share = parse_strategy(strategy)
    if kind == "all":
        return sources
    early = kind == "first" and share is None
    counts = _counts_up_to(sources, count) if early else [sum(1 for _ in source.rows()) for source in sources]
    taken = choose(sum(counts), strategy, seed)
    start, chosen = 0, []
    for source, size in zip(sources, counts, strict=True):
        mine = taken[(taken >= start) & (taken < start + size)] - start
        start += size
        if len(mine):
            chosen.append(replace(source, taken=mine))
    return chosen


def _counts_up_to(sources: list[Source], most: int) -> list[int]:
    """How many rows each source has, no further than the first `most` rows of all."""
    counts: list[int] = []
    for source in sources:
        left, count = most - sum(counts), 0
        if left > 0:
            for _ in source.rows():
                count += 1
                if count == left:
                    break
        counts.append(count)
    return counts


def parse_strategy(strategy: str) -> tuple[str, int, float | None]:
    """LLaVA-NeXT's `all`, `first:N`, `end:N`, `random:N` -> (kind, N, None), or (kind, 0, share) for a percentage.

    Raises:
        InputError: anything else.
    """
    match = re.fullmatch(r"(first|end|random):(?:(\d+)|(\d+(?:\.\d+)?)%)", strategy)
    if strategy == "all":
        return "all", 0, None
    if match is None:
        raise InputError(f"sampling_strategy: expected all, first:N, end:N or random:N (N a count or a percentage such as 10%), got {strategy!r}")
    return match[1], int(match[2] or 0), float(match[3]) / 100 if match[3] else None


def choose(total: int, strategy: str, seed: int | str) -> np.ndarray:
    """The numbers, rising, of the rows out of `total` that a strategy takes; a percentage is rounded up."""
    kind, count, share = parse_strategy(strategy)
    count = total if kind == "all" else min(total, count if share is None else math.ceil(round(total * share, 6)))
    if kind == "random":
        return np.array(sorted(random.Random(seed).sample(range(total), count)), np.int64)
    return np.arange(count, dtype=np.int64) + (total - count if kind == "end" else 0)
