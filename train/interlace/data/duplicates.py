"""Rows that say the same, and rows that answer the same question in another way: by their ids and by the content of their images."""

import hashlib
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from interlace.data.dataset import Rows
from interlace.data.store import SKIPPED, Store

_WHOLE_BYTES = 1 << 20  # of a larger medium both ends are compared, half as much each, and the size
_Medium = tuple[str, int, int, int | None, int]  # path, offset, size within an archive, time of a frame, bytes


@dataclass(frozen=True)
class Likeness:
    """Both (rows,): the number of the first row that a row repeats, of the first row that asks the same with another answer; -1 for none, and for that first
    row of duplicates itself."""

    duplicate_of: np.ndarray
    conflicts_with: np.ndarray


def likeness(rows: Rows, show_progress: bool = False) -> Likeness:
    """Which of the admitted rows are alike.

    Images are the same if their bytes are. They are read only for rows whose other ids are the same and whose images have the same sizes in bytes, so nothing
    is read of most data.
    """
    duplicate_of, conflicts_with = np.full(len(rows), -1, np.int64), np.full(len(rows), -1, np.int64)
    hashes: dict[_Medium, Hashable] = {}
    candidates: dict[bytes, list[tuple[int, bytes, tuple[_Medium, ...]]]] = {}
    keys = (key for store in rows.stores for key in _keys(store))
    for number, (question, answer, media) in enumerate(tqdm(keys, "looking for duplicates", len(rows), leave=False, disable=not show_progress)):
        candidates.setdefault(question, []).append((number, answer, media))
    for group in candidates.values():
        if len(group) < 2:
            continue
        same_media: dict[Hashable, list[tuple[int, bytes]]] = {}
        is_one_place = len({media for _, _, media in group}) == 1
        for number, answer, media in group:
            key = () if is_one_place else tuple(_content(medium, hashes) for medium in media)
            same_media.setdefault(key, []).append((number, answer))
        for alike in same_media.values():
            _compare(alike, duplicate_of, conflicts_with)
    return Likeness(duplicate_of, conflicts_with)


def _compare(alike: list[tuple[int, bytes]], duplicate_of: np.ndarray, conflicts_with: np.ndarray) -> None:
    """Rows with one question and the same images: (number, hash of the answer)."""
    first: dict[bytes, int] = {}
    for number, answer in alike:
        if answer in first:
            duplicate_of[number] = first[answer]
        first.setdefault(answer, number)
    if len(first) > 1:
        earliest, second = sorted(first.values())[:2]
        for number, answer in alike:
            conflicts_with[number] = earliest if first[answer] != earliest else second


def _keys(store: Store) -> Iterator[tuple[bytes, bytes, tuple[_Medium, ...]]]:
    """Of each admitted row: a hash of what is not supervised and of the images' sizes, a hash of what is supervised, and the images."""
    for batch in store.batches():
        ids, spans, media, files = (batch.column(name) for name in ("input_ids", "spans", "media", "files"))
        of_ids, of_spans, of_media, of_files = (_row_slices(column) for column in (ids, spans, media, files))
        values, starts, ends = ids.values.to_numpy(), *(spans.values.field(name).to_numpy() for name in ("start", "end"))
        columns = [media.values.field(name).to_pylist() for name in ("path", "offset", "size", "pts")]
        paths, sizes = (files.values.field(name).to_pylist() for name in ("path", "bytes"))
        for i in np.flatnonzero(batch.column("status").to_numpy() != SKIPPED).tolist():
            row = values[of_ids(i)]
            is_supervised = np.zeros(len(row), bool)
            for start, end in zip(starts[of_spans(i)], ends[of_spans(i)], strict=True):
                is_supervised[start:end] = True
            known = dict(zip(paths[of_files(i)], sizes[of_files(i)], strict=True))
            places = zip(*(column[of_media(i)] for column in columns), strict=True)
            shown = tuple((path, offset, size, pts, size if size >= 0 else known.get(path, -1)) for path, offset, size, pts in places)
            outside = repr([(medium[3], medium[4]) for medium in shown]).encode()
            question = hashlib.blake2b(row[~is_supervised].tobytes() + outside, digest_size=16).digest()
            yield question, hashlib.blake2b(row[is_supervised].tobytes() + is_supervised.tobytes(), digest_size=16).digest(), shown


def _row_slices(column: pa.ListArray) -> Callable[[int], slice]:
    offsets = column.offsets.to_numpy().tolist()
    return lambda row: slice(offsets[row], offsets[row + 1])


def _content(medium: _Medium, hashes: dict[_Medium, Hashable]) -> Hashable:
    """What tells a medium from others; the medium itself, where it cannot be read."""
    if medium not in hashes:
        path, offset, _, pts, size = medium
        try:
            with Path(path).open("rb") as file:
                file.seek(max(offset, 0))
                digest = hashlib.blake2b(file.read(min(size, _WHOLE_BYTES // 2) if size > _WHOLE_BYTES else size))
                if size > _WHOLE_BYTES:
                    file.seek(max(offset, 0) + size - _WHOLE_BYTES // 2)
                    digest.update(file.read(_WHOLE_BYTES // 2))
            hashes[medium] = (digest.digest(), size, pts)
        except OSError:
            hashes[medium] = medium
    return hashes[medium]
