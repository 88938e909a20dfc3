"""Lists of rows to leave out: written from what a run has found, edited by its user, taken by the next run (`exclude_rows`)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interlace.errors import InputError

FORMAT = "interlace rows to exclude"
_REMEDY = "take the list that was made for this data, or remove exclude_rows"


@dataclass(frozen=True)
class Excluded:
    """A row to leave out, and why. `index` counts from 0 in its file."""

    index: int
    reason: str


def write_list(path: Path, sources: Mapping[str, str], rows: Mapping[str, Sequence[Excluded]]) -> None:
    """Writes a list, one row per line, so that a line can be taken out by hand.

    Args:
        sources: file as listed in the ledger -> its fingerprint; all files of the run, so that the next run knows that the list speaks of them.
        rows: file -> what is to be left out of it.
    """
    files = []
    for file, fingerprint in sources.items():
        lines = [json.dumps({"index": row.index, "reason": row.reason}, ensure_ascii=False) for row in rows.get(file, [])]
        inside = ",".join(f"\n    {line}" for line in lines)
        files.append(f'\n  {{"file": {json.dumps(file, ensure_ascii=False)}, "fingerprint": "{fingerprint}", "rows": [{inside}]}}')
    path.write_text(f'{{"format": "{FORMAT}", "files": [{",".join(files)}\n]}}\n', encoding="utf-8")


Listed = dict[tuple[str, str], dict[int, str]]  # (file, fingerprint) -> index -> reason


def rows_to_exclude(path: str, listed: Listed, file: str, fingerprint: str) -> dict[int, str]:
    """index -> reason of the rows of `file` that the list at `path` names: under this very path, or of the one file that has its name and content elsewhere.

    Raises:
        InputError: it was not made for this file: another name or other content; or it names several such files elsewhere.
    """
    if (file, fingerprint) in listed:
        return listed[file, fingerprint]
    name = Path(file).name
    of_name = {other: known for other, known in listed if Path(other).name == name}
    same = [other for other, known in of_name.items() if known == fingerprint]
    if len(same) == 1:
        return listed[same[0], fingerprint]
    if same:
        raise InputError(f"exclude_rows: {path}: {file} has the name and content of {', '.join(same)}, which differ in the list; give it the path it has there")
    if not of_name:
        raise InputError(f"exclude_rows: {path} says nothing about {file}; it is about {', '.join(other for other, _ in listed) or 'no file'}; {_REMEDY}")
    known = ", ".join(other[:12] for other in of_name.values())
    raise InputError(f"exclude_rows: {path} was made for another {name} (fingerprint {known}); {file} has {fingerprint[:12]}; {_REMEDY}")


def read_list(path: Path) -> Listed:
    """A list as `write_list` writes it.

    Raises:
        InputError: it cannot be read, or is something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"exclude_rows: {path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"exclude_rows: {path}: no valid JSON: {error}") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT or not isinstance(value.get("files"), list):
        raise InputError(f'exclude_rows: {path}: expected {{"format": "{FORMAT}", "files": [..]}}, as row_drop.json of an output_dir is; see data/README.md')
    listed: Listed = {}
    problems: list[str] = []
    for number, item in enumerate(value["files"]):
        if not isinstance(item, dict) or not all(isinstance(item.get(name), str) for name in ("file", "fingerprint")) or not isinstance(item.get("rows"), list):
            problems.append(f"files[{number}]: expected {{file, fingerprint, rows}}")
            continue
        bad = next((row for row in item["rows"] if not _is_row(row)), None)
        if bad is not None:
            problems.append(f"{item['file']}: expected {{index, reason}}, the index from 0, got {json.dumps(bad)[:80]}")
            continue
        listed[item["file"], item["fingerprint"]] = {row["index"]: row.get("reason", "") for row in item["rows"]}
    if problems:
        raise InputError(f"exclude_rows: {path}: " + "\n  ".join(problems))
    return listed


def _is_row(row: Any) -> bool:
    index = row.get("index") if isinstance(row, dict) else None
    return isinstance(index, int) and not isinstance(index, bool) and index >= 0 and isinstance(row.get("reason", ""), str)
