"""Files -> rows as they stand in them, one after another: json, jsonl, parquet, tar shards and saved `datasets`; memory does not grow with the
file (of a parquet file, one row group is held).

Every reader yields (index, value, position): `value` is the record, or a `BadRow` where the file is damaged there; `position`, from 0 to 1, is how far
the reading is.
"""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from interlace.data.sample import BadRow
from interlace.data.shards import tar_rows
from interlace.errors import InputError

Rows = Iterator[tuple[int, Any, float]]
_CHUNK_BYTES = 1 << 20
_LONGEST_ROW = 256 << 20
_ROWS_PER_BATCH = 64  # of a table: rows may hold whole images
_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")


def read_rows(path: Path) -> Rows:
    """The rows of a file, by its suffix.

    Raises:
        InputError: the suffix is unknown, or the file as a whole cannot be read.
    """
    name = path.name.lower()
    try:
        if path.is_dir():
            yield from _saved_dataset(path)
        elif name.endswith((".jsonl", ".jsonl.gz")):
            yield from _json_lines(path)
        elif name.endswith((".json", ".json.gz")):
            yield from _json_lines(path) if _is_json_lines(path) else _json_list(path)
        elif name.endswith(".parquet"):
            yield from _parquet(path)
        elif name.endswith(_TAR_SUFFIXES):
            yield from tar_rows(path)
        else:
            raise InputError(f"{path}: unknown kind of file; expected .json, .jsonl (also .gz), .parquet, .tar, .yaml or a folder that `datasets` saved")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def _open(path: Path) -> tuple[BinaryIO, BinaryIO]:
    """The file's contents, unpacked, and the file itself, whose position tells the progress."""
    raw = path.open("rb")
    return (gzip.GzipFile(fileobj=raw), raw) if path.name.lower().endswith(".gz") else (raw, raw)  # type: ignore[return-value]


def _is_json_lines(path: Path) -> bool:
    """Whether a .json file holds one object per line: its first line is a whole object, and more follows."""
    contents, raw = _open(path)
    with raw:
        try:
            first, newline, rest = contents.read(_CHUNK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")
        except (EOFError, zlib.error, gzip.BadGzipFile):
            return False
    if not first.startswith(b"{") or not newline or not rest.strip():
        return False
    try:
        return isinstance(json.loads(first), dict)
    except ValueError:
        return False


def _json_lines(path: Path) -> Rows:
    """One object per line, blank lines not counted; a broken line is a bad row."""
    size = max(path.stat().st_size, 1)
    contents, raw = _open(path)
    index = number = 0
    with raw:
        try:
            while line := contents.readline(_LONGEST_ROW):
                if len(line) == _LONGEST_ROW:
                    raise InputError(f"{path}: line {number + 1}: a row of more than {_LONGEST_ROW >> 20} MiB")
                number += 1
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip():
                    yield index, _json_line(line, number), raw.tell() / size
                    index += 1
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            if index == 0:
                raise InputError(f"{path}: cannot be unpacked: {error}") from None
            yield index, BadRow("broken_archive", f"the file breaks off behind line {number}: {error}; what follows is lost"), 1.0
            index += 1
    if index == 0:
        raise InputError(f"{path}: no rows; expected one JSON object per line")


def _json_line(line: bytes, number: int) -> Any:
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return BadRow("bad_text", f"line {number} is UTF-16; save the file as UTF-8")
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow("bad_text", f"line {number} is not UTF-8 at its byte {error.start}; save the file as UTF-8")
    except json.JSONDecodeError as error:
        return BadRow("bad_json", f"line {number}, column {error.colno}: {error.msg}; each line must be one complete JSON object")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nested too deeply
        return BadRow("bad_json", f"line {number}: {error}")


class _Text:
    """The decoded text of a JSON file from the current place on, with what an error message needs: bytes and lines already passed."""

    def __init__(self, path: Path, contents: BinaryIO):
        self.path, self.contents, self.text, self.line, self.passed_bytes = path, contents, "", 1, 0
        self.decoder, self.done = codecs.getincrementaldecoder("utf-8-sig")(), False

    def more(self) -> bool:
        """Reads on; False at the end of the file.

        Raises:
            InputError: not UTF-8, or a damaged archive.
        """
        if self.done:
            return False
        try:
            chunk = self.contents.read(max(_CHUNK_BYTES, len(self.text)))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{self.path}: the archive breaks off: {error}") from None
        if self.passed_bytes == 0 and chunk.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise InputError(f"{self.path}: this is UTF-16; save it as UTF-8")
        try:
            self.text += self.decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path}: not UTF-8 at byte {self.passed_bytes + error.start}; save it as UTF-8") from None
        self.passed_bytes += len(chunk)
        self.done = not chunk
        if len(self.text) > _LONGEST_ROW:
            raise InputError(f"{self.path}: line {self.line}: a row of more than {_LONGEST_ROW >> 20} MiB, or a quotation mark that is never closed")
        return not self.done

    def drop(self, count: int) -> None:
        """Forgets the first `count` characters."""
        self.line += self.text.count("\n", 0, count)
        self.text = self.text[count:]

    def place(self, position: int) -> str:
        """`line L, column C` of a position in the text."""
        before = self.text[:position]
        return f"line {self.line + before.count(chr(10))}, column {position - before.rfind(chr(10))}"


_SPACE = re.compile(r"[ \t\n\r]*")


def _json_list(path: Path) -> Rows:
    """A JSON list, one element after another."""
    size = max(path.stat().st_size, 1)
    contents, raw = _open(path)
    with raw:
        text = _Text(path, contents)
        position = _skip_space(text, 0)
        if position == len(text.text):
            raise InputError(f"{path}: the file is empty; expected a list of records")
        if text.text[position] != "[":
            raise InputError(f"{path}: expected a list of records; {_what_it_is(text)}")
        position, index = _skip_space(text, position + 1), 0
        while text.text[position : position + 1] != "]":
            if index:
                if text.text[position : position + 1] != ",":
                    raise _incomplete(text, position, "expected a comma or the end of the list")
                position = _skip_space(text, position + 1)
            value, position = _element(text, position)
            yield index, value, raw.tell() / size
            index += 1
            if position > _CHUNK_BYTES:
                text.drop(position)
                position = 0
            position = _skip_space(text, position)
        position = _skip_space(text, position + 1)
        if position != len(text.text):
            raise _incomplete(text, position, "there is more behind the end of the list")
    if index == 0:
        raise InputError(f"{path}: no rows; expected a list of records")


def _skip_space(text: _Text, position: int) -> int:
    while True:
        match = _SPACE.match(text.text, position)
        assert match is not None
        position = match.end()
        if position < len(text.text) or not text.more():
            return position


_decode_element = json.JSONDecoder().raw_decode


def _element(text: _Text, position: int) -> tuple[Any, int]:
    """One element of the list; reads on while it may only be cut off by the end of what is read."""
    while True:
        try:
            value, end = _decode_element(text.text, position)
            if end < len(text.text) or not text.more():  # a number may go on
                return value, end
        except json.JSONDecodeError as error:
            cut = error.msg.startswith("Unterminated string") or error.pos >= len(text.text) - 16
            if not cut or not text.more():
                raise _incomplete(text, error.pos, error.msg) from None
        except RecursionError:
            raise _incomplete(text, position, "nested too deeply") from None
        except ValueError as error:  # a number of thousands of digits
            raise _incomplete(text, position, str(error)) from None


def _incomplete(text: _Text, position: int, message: str) -> InputError:
    return InputError(f"{text.path}: {text.place(position)}: {message}; the file is no complete JSON")


def _what_it_is(text: _Text) -> str:
    while text.more():
        pass
    try:
        value = json.loads(text.text)
    except ValueError as error:
        return f"it does not begin with one, and is no JSON either: {error}"
    keys = f" with the keys {', '.join(list(value)[:5])}; save the list inside it as a file of its own" if isinstance(value, dict) else ""
    return f"got {type(value).__name__}{keys}"


def _table_rows(batches: Iterator[pa.RecordBatch], total: int) -> Rows:
    index = 0
    for batch in batches:
        for row in batch.to_pylist():
            yield index, row, index / max(total, 1)
            index += 1


def _parquet(path: Path) -> Rows:
    try:
        file = pq.ParquetFile(path)
        if file.metadata.num_rows == 0:
            raise InputError(f"{path}: no rows")
        yield from _table_rows(file.iter_batches(_ROWS_PER_BATCH), file.metadata.num_rows)
    except (pa.ArrowException, UnicodeDecodeError, OverflowError) as error:  # the last two: damaged text and dates
        raise InputError(f"{path}: no complete parquet file: {error}") from None


def _saved_dataset(path: Path) -> Rows:
    """A folder from `Dataset.save_to_disk`; images and videos stay encoded."""
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except (FileNotFoundError, ValueError, KeyError, pa.ArrowException) as error:
        raise InputError(f"{path}: no folder that `datasets` saved: {error}; for a folder of files write a glob, such as {path}/*.parquet") from None
    if isinstance(dataset, DatasetDict):
        raise InputError(f"{path}: holds the splits {', '.join(dataset)}; name the folder of one, such as {path / next(iter(dataset))}")
    yield from dataset_rows(dataset)


def dataset_rows(dataset: Any) -> Rows:
    """The rows of a `datasets.Dataset`, media as they are stored."""
    batches = (batch for table in dataset.with_format("arrow").iter(_ROWS_PER_BATCH) for batch in table.to_batches())
    yield from _table_rows(batches, len(dataset))
