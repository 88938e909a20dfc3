"""Rows on disk: Arrow files that are mapped rather than read, so that memory does not grow with the number of rows.

A store holds what became of every row of one source. Its folder is named by a hash of the source's content and of all settings; it is made once, by
whichever process comes first, and shared by all ranks, workers and later runs for as long as its media stay as they were.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from interlace.data.ledger import Entry
from interlace.data.reading import Outcome, Row
from interlace.data.sample import Place
from interlace.data.template import IGNORE_INDEX, Encoded
from interlace.errors import InputError

TRAINED, SHORTENED, SKIPPED = 0, 1, 2
# Reasons that may pass without a change of the data file: a picture is mended, a server is up again
PASSING_REASONS = frozenset(
    [
        "missing_image",
        "missing_video",
        "broken_image",
        "broken_video",
        "empty_video",
        "not_a_file",
        "outside_folder",
        "url_error",
        "too_many_pixels",
        "bad_image",
    ]
)
_STATUS = {"trained": TRAINED, "shortened": SHORTENED, "skipped": SKIPPED}
_SPAN = pa.struct([("start", pa.int32()), ("end", pa.int32()), ("weight", pa.float32())])
_MEDIUM = pa.struct(
    [
        ("path", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("pts", pa.int64()),
        ("tokens", pa.int32()),
    ]
)
_FILE = pa.struct([("path", pa.string()), ("bytes", pa.int64()), ("time", pa.int64())])
SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("format", pa.string()),
        ("status", pa.int8()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("length", pa.int32()),
        ("supervised", pa.int32()),
        ("num_images", pa.int32()),
        ("image_tokens", pa.int32()),
        ("prefix", pa.int64()),  # a hash; 0 if the row shares nothing
        ("prefix_ids", pa.int32()),
        ("prefix_images", pa.int32()),
        ("prefix_length", pa.int32()),
        ("input_ids", pa.list_(pa.int32())),
        ("spans", pa.list_(_SPAN)),  # the supervised tokens: labels are their ids
        ("leaf_starts", pa.list_(pa.int32())),
        ("media", pa.list_(_MEDIUM)),
        ("files", pa.list_(_FILE)),  # what the row rests on, as it was when it was checked, to notice a change
    ]
)


def to_batch(outcomes: Sequence[Outcome]) -> pa.RecordBatch:
    """The outcomes as a batch of `SCHEMA`."""
    stats: dict[str, tuple[int, int]] = {}
    return pa.RecordBatch.from_pylist([_to_dict(outcome, stats) for outcome in outcomes], schema=SCHEMA)


def _to_dict(outcome: Outcome, stats: dict[str, tuple[int, int]]) -> dict[str, Any]:
    entry, row = outcome.entry, outcome.row
    values: dict[str, Any] = {"index": outcome.record.index, "format": outcome.format, "status": TRAINED if entry is None else _STATUS[entry.status]}
    if entry is not None:
        values |= {"reason": entry.reason, "detail": entry.detail}
    if row is None:
        return values | dict.fromkeys(("length", "supervised", "num_images", "image_tokens", "prefix", "prefix_ids", "prefix_images", "prefix_length"), 0)
    media = [
        {"path": place.path, "offset": place.offset, "size": place.size, "pts": place.pts, "tokens": tokens}
        for place, tokens in zip(row.images, row.image_tokens, strict=True)
    ]
    paths = dict.fromkeys([*(place.path for place in row.images), *outcome.watched])
    stats.update((path, file_state(path)) for path in paths if path not in stats)
    return values | {
        "length": row.length,
        "supervised": row.supervised_tokens,
        "num_images": len(row.images),
        "image_tokens": sum(row.image_tokens),
        "prefix": _hash(row.prefix) if row.prefix_images else 0,
        **{name: getattr(row, name) for name in ("prefix_ids", "prefix_images", "prefix_length")},
        "input_ids": row.encoded.input_ids,
        "spans": _spans(row.encoded),
        "leaf_starts": row.encoded.leaf_starts,
        "media": media,
        "files": [{"path": path, "bytes": stats[path][0], "time": stats[path][1]} for path in paths],
    }


def _hash(value: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "little", signed=True)


def _spans(encoded: Encoded) -> list[dict[str, Any]]:
    weights = np.where(encoded.labels >= 0, encoded.weights, np.nan)
    changes = [0, *(np.flatnonzero(np.diff(weights) != 0) + 1).tolist(), len(weights)]  # a difference with NaN is not 0
    spans = ((start, end) for start, end in pairwise(changes) if encoded.labels[start] >= 0)
    return [{"start": start, "end": end, "weight": float(weights[start])} for start, end in spans]


def content_of(batch: pa.RecordBatch) -> bytes:
    """What a batch says about its rows, wherever their media lie: the same bytes for the same rows in the same order."""
    media = batch.column("media").flatten()
    names = pc.replace_substring_regex(media.field("path"), ".*/", "")
    columns = [batch.column(name) for name in ("index", "status", "length", "num_images", "input_ids", "spans", "leaf_starts")]
    table = pa.RecordBatch.from_arrays(columns, [str(number) for number in range(len(columns))])
    numbers = ("offset", "size", "pts", "tokens")
    of_media = pa.RecordBatch.from_arrays([names, *(media.field(name) for name in numbers)], ["name", *numbers])
    return bytes(table.serialize()) + bytes(of_media.serialize())


def file_state(path: str) -> tuple[int, int]:
    """(bytes, modification time in ns) of a file or folder; (-1, 0) if it is not there."""
    try:
        stat = os.stat(path)
    except OSError:
        return -1, 0
    return stat.st_size, stat.st_mtime_ns


class Store:
    """One source's rows on disk.

    Args:
        folder: holds `rows.arrow` and `source.json`.
        file: the source's name in ledgers.
        made: when the store was made, if it must be that very one.

    Raises:
        InputError: it has been made anew.
    """

    def __init__(self, folder: Path, file: str, made: float | None = None):
        self.folder, self.file = folder, file
        source = json.loads((folder / "source.json").read_text(encoding="utf-8"))
        self.made: float = source["made"]
        self.content: str = source["content"]  # a hash of the rows, see `content_of`
        if made not in (None, self.made):
            raise InputError(f"{folder}: the rows of {file} have been made anew by another run while this one was reading them; start it again")
        self._reader = pa.ipc.open_file(pa.memory_map(str(folder / "rows.arrow")))
        self._batches = [self._reader.get_batch(number) for number in range(self._reader.num_record_batches)]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.folder, self.file, self.made)  # another process maps the file itself

    def __len__(self) -> int:
        return int(self._starts[-1])

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, (rows,)."""
        return np.concatenate([batch.column(name).to_numpy() for batch in self._batches]) if self._batches else np.zeros(0, np.int64)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows, some at a time, as batches of `SCHEMA`."""
        return iter(self._batches)

    def media(self) -> Iterator[pa.StructArray]:
        """The images and frames of all rows, some at a time: structs of `path`, `offset`, `size`, `pts` and `tokens`."""
        return (batch.column("media").flatten() for batch in self._batches)

    def counts(self, name: str) -> dict[str, int]:
        """How often each value of a text column comes."""
        values: dict[str, int] = {}
        for batch in self._batches:
            for item in batch.column(name).value_counts().to_pylist():
                if item["values"]:
                    values[item["values"]] = values.get(item["values"], 0) + item["counts"]
        return values

    def row(self, position: int) -> Row:
        """The admitted row at a position."""
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        batch, i = self._batches[number], position - int(self._starts[number])
        ids = batch.column("input_ids")[i].values.to_numpy()
        labels, weights = np.full(len(ids), IGNORE_INDEX, np.int32), np.ones(len(ids), np.float32)
        for span in batch.column("spans")[i].as_py():
            place = slice(span["start"], span["end"])
            labels[place], weights[place] = ids[place], span["weight"]
        media = batch.column("media")[i].as_py()
        places = tuple(Place(item["path"], item["offset"], item["size"], item["pts"]) for item in media)
        tokens = tuple(item["tokens"] for item in media)
        leaves = tuple(batch.column("leaf_starts")[i].as_py())
        encoded = Encoded(ids, labels, weights, len(places), leaf_starts=leaves)
        index, length, *prefix = (batch.column(name)[i].as_py() for name in ("index", "length", "prefix_ids", "prefix_images"))
        return Row(self.file, index, encoded, places, tokens, length, *prefix)

    def entries(self) -> Iterator[Entry]:
        """The ledger entries of the rows that were not simply trained, in order."""
        for batch in self._batches:
            for i in np.flatnonzero(batch.column("status").to_numpy() != TRAINED):
                values = [batch.column(name)[int(i)].as_py() for name in ("index", "status", "reason", "detail")]
                yield Entry(self.file, values[0], "shortened" if values[1] == SHORTENED else "skipped", values[2], values[3])

    def is_current(self, process_start: float) -> bool:
        """Whether the media are still as they were. A store with media that were bad is taken only from this very run: they may have been mended since."""
        if self.made < process_start and PASSING_REASONS & set(self.counts("reason")):
            return False
        for batch in self._batches:
            files = batch.column("files").flatten()
            columns = (files.field(name).to_pylist() for name in ("path", "bytes", "time"))
            if any(file_state(path) != (size, time) for path, size, time in set(zip(*columns, strict=True))):
                return False
        return True
