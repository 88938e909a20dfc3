"""Files and folders that are there whole or not at all, and that the right people can read."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Writes a file on the disk under another name, then renames it. Halves of characters, which UTF-8 cannot write, become JSON's escapes."""
    scratch = path.with_name(f".{path.name}.new")
    with scratch.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Writes readable JSON, see `write_whole`."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def whole_or_not_at_all(output_dir: Path) -> Iterator[Path]:
    """A scratch folder that becomes `output_dir` at the end, and is removed when something fails."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output_dir.name}-", dir=output_dir.parent) as name:
        scratch = Path(name) / output_dir.name
        scratch.mkdir()
        yield scratch
        if output_dir.exists():
            output_dir.rmdir()  # empty, or this stops here
        scratch.rename(output_dir)


def set_default_mode(path: Path) -> None:
    """Gives a file or folder the mode that the umask allows: safetensors and `tempfile` make theirs for the owner alone.

    A new one beside it tells which: to ask for the umask is to change it, for all threads.
    """
    example = path.with_name(f".{path.name}.mode")
    if path.is_dir():
        example.mkdir(exist_ok=True)
        mode = example.stat().st_mode
        example.rmdir()
    else:
        example.touch()
        mode = example.stat().st_mode
        example.unlink()
    path.chmod(mode & 0o777)


def sync_file(path: Path) -> None:
    """Brings a file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
