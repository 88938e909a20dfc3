"""The rows the model will see: every record read, checked and accounted for before training, in parallel, and kept on disk."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from filelock import FileLock
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from interlace.data.ledger import Entry, Ledger, check_ledger
from interlace.data.reading import Headers, Record, Row, RowReader
from interlace.data.sources import Source
from interlace.data.store import SCHEMA, SHORTENED, SKIPPED, TRAINED, Store, content_of, to_batch
from interlace.errors import InputError
from interlace.files import set_default_mode

_ROWS_PER_CHUNK = 256
_ROWS_WITH_MEDIA_PER_CHUNK = 32  # rows of tables and archives hold whole images
_SMALL_BYTES = 1 << 20  # below this, starting workers takes longer than reading
Chunk = tuple[int, pa.RecordBatch | InputError | None, float]


def default_cache_dir() -> Path:
    """Where rows are kept: $INTERLACE_CACHE, else a folder in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("INTERLACE_CACHE") or Path(home) / "interlace")


class Rows(Sequence[Row]):
    """The admitted rows of some stores, in order; each is read from disk when it is asked for.

    `lengths`, `num_images`, `image_tokens` and `supervised` (N,) count each row's tokens, images, their tokens and supervised tokens; `copies` (N,) says how
    often it comes in an epoch, `sources` (N,) which store it is of; `prefixes` (N,) are equal for rows that begin alike, `prefix_lengths`, `prefix_images` and
    `prefix_image_tokens` (N,) count what they share.
    """

    def __init__(self, stores: Sequence[Store], weights: Sequence[float]):
        self.stores = list(stores)
        positions = [np.flatnonzero(store.column("status") != SKIPPED) for store in self.stores]
        self._positions = np.concatenate(positions) if positions else np.zeros(0, np.int64)
        self._store = np.repeat(np.arange(len(self.stores)), [len(part) for part in positions])
        self.lengths, self.num_images, self.supervised = (self._admitted(name, positions) for name in ("length", "num_images", "supervised"))
        self.image_tokens = self._admitted("image_tokens", positions)
        self.prefixes, self.prefix_lengths, self.prefix_images = (self._admitted(f"prefix{name}", positions) for name in ("", "_length", "_images"))
        self.prefix_image_tokens = self.prefix_lengths - (self._admitted("prefix_ids", positions) - self.prefix_images)
        self.sources = self._store
        self.copies = np.asarray(weights, np.float64)[self._store]

    def _admitted(self, name: str, positions: Sequence[np.ndarray]) -> np.ndarray:
        columns = [store.column(name)[part] for store, part in zip(self.stores, positions, strict=True)]
        return np.concatenate([np.zeros(0, np.int64), *columns]).astype(np.int64)

    @property
    def fingerprint(self) -> str:
        """The same for the same rows in the same order, on whichever machine and in whichever folder they lie."""
        return hashlib.sha256(" ".join(store.content for store in self.stores).encode()).hexdigest()

    def num_distinct_images(self) -> int:
        """Images and frames, each counted once however many rows show it."""
        tables = [pa.table({name: media.field(name) for name in ("path", "offset", "pts")}) for store in self.stores for media in store.media()]
        return len(pa.concat_tables(tables).group_by(["path", "offset", "pts"]).aggregate([])) if tables else 0

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, number: int) -> Row:  # type: ignore[override]
        return self.stores[self._store[number]].row(int(self._positions[number]))


class _Entries:
    """The ledger entries of some stores, read from disk whenever they are iterated."""

    def __init__(self, stores: Sequence[Store]):
        self.stores = stores

    def __iter__(self) -> Iterator[Entry]:
        return (entry for store in self.stores for entry in store.entries())


def ledger_of(stores: Sequence[Store]) -> Ledger:
    """The account of every row of some stores."""
    status = Counter(value for store in stores for value in store.column("status").tolist())
    reasons: Counter[str] = Counter()
    for store in stores:
        reasons.update(store.counts("reason"))
    return Ledger(sum(status.values()), status[TRAINED], status[SHORTENED], status[SKIPPED], reasons, _Entries(stores))


class _Chunks(IterableDataset[Chunk]):
    """What becomes of every record, some hundred at a time: (source, batch, position), then (source, None or what stopped it, 1).

    With fewer sources than workers, each worker reads all records and works on its share of the chunks; else each has sources of its own.
    """

    def __init__(self, sources: Sequence[Source], reader: RowReader):
        self.sources, self.reader = sources, reader

    def __iter__(self) -> Iterator[Chunk]:
        worker, headers = get_worker_info(), Headers()
        share, number = (worker.num_workers, worker.id) if worker else (1, 0)
        by_source, chunk = len(self.sources) >= share, 0
        for i, source in enumerate(self.sources):
            if by_source and i % share != number:
                continue
            for records, position in _pieces(source):
                if by_source or chunk % share == number:
                    batch = to_batch([self.reader.read(record, headers) for record in records]) if isinstance(records, list) else records
                    yield i, batch, position
                chunk += 1


def _pieces(source: Source) -> Iterator[tuple[list[Record] | InputError | None, float]]:
    """A source's records in chunks, with the position behind each; then None, or the error that ended the reading."""
    waiting: list[Record] = []
    position = 0.0
    most = _ROWS_PER_CHUNK if source.table is None and ".json" in Path(source.file).name.lower() else _ROWS_WITH_MEDIA_PER_CHUNK
    try:
        for index, value, position in source.rows():
            waiting.append(Record(source, index, value))
            if len(waiting) == most:
                yield waiting, position
                waiting = []
    except InputError as error:
        yield error, 1.0
        return
    if waiting:
        yield waiting, position
    yield None, 1.0


def make_stores(sources: Sequence[Source], reader: RowReader, cache_dir: Path, workers: int, show_progress: bool) -> list[Store]:
    """The rows of all sources on disk: those that are there already, and those that are read and checked now.

    Raises:
        InputError: files that cannot be read at all, all named at once; or the cache folder cannot be written.
    """
    start = psutil.Process().create_time()
    settings = reader.fingerprint()
    try:
        folders = [cache_dir / "rows" / _key(source, settings) for source in sources]
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from None
    try:
        (cache_dir / "rows").mkdir(parents=True, exist_ok=True)
        with ExitStack() as locks:  # the first process makes them, the others wait and find them; sorted, so that no two wait for each other
            for name in sorted({folder.name[:2] for folder in folders}):  # 256 locks at most: open files are few
                locks.enter_context(FileLock(cache_dir / "rows" / f"{name}.lock"))
            missing = [i for i, folder in enumerate(folders) if folders.index(folder) == i and not _is_usable(folder, start)]
            if missing:
                _build([sources[i] for i in missing], [folders[i] for i in missing], reader, workers, show_progress)
            return [Store(folder, source.file) for folder, source in zip(folders, sources, strict=True)]
    except OSError as error:
        raise InputError(f"{cache_dir}: rows cannot be kept there: {error.strerror or error}; choose another folder with cache_dir") from error


def _is_usable(folder: Path, start: float) -> bool:
    """Whether a folder holds a whole store whose media are as they were; one that lost power while it was written is made anew."""
    try:
        return Store(folder, "").is_current(start)
    except (OSError, ValueError, KeyError):
        return False


def _key(source: Source, settings: str) -> str:
    taken = None if source.taken is None else hashlib.sha256(source.taken.tobytes()).hexdigest()
    roots = [[str(root.resolve()) for root in group] for group in (source.image_roots, source.video_roots)]
    excluded = [sorted(source.excluded.items())] if source.excluded else []
    return hashlib.sha256(repr([source.content_hash(), settings, source.format, roots, taken, SCHEMA.names, *excluded]).encode()).hexdigest()[:32]


def _build(sources: list[Source], folders: list[Path], reader: RowReader, workers: int, show_progress: bool) -> None:
    is_small = all(source.table is None and Path(source.file).is_file() and Path(source.file).stat().st_size < _SMALL_BYTES for source in sources)
    loader = DataLoader(_Chunks(sources, reader), batch_size=None, collate_fn=_unchanged, num_workers=0 if is_small else workers)
    bar_format = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    bar = tqdm(total=float(len(sources)), desc="checking rows", bar_format=bar_format, disable=not show_progress, leave=False)
    problems: list[str] = []
    positions, count = [0.0] * len(sources), 0
    making: dict[int, _Making] = {}
    with bar:
        for i, batch, positions[i] in loader:
            if i not in making:
                making[i] = _Making(folders[i], sources[i].file)
            if isinstance(batch, pa.RecordBatch):
                making[i].write(batch)
                count += batch.num_rows
            elif batch is None:
                making.pop(i).finish()
            else:
                problems.append(str(batch))
                making.pop(i).drop()
            bar.set_description_str(f"checking rows: {count:,}", refresh=False)
            bar.update(sum(positions) - bar.n)
    if problems:
        raise InputError("\n  ".join(problems))


def _unchanged(chunk: Any) -> Any:
    return chunk


class _Making:
    """A store that is being written; it gets its name when it is whole."""

    def __init__(self, folder: Path, file: str):
        self.folder, self.file = folder, file
        self.scratch = Path(tempfile.mkdtemp(prefix="making-", dir=folder.parent))
        self.writer = pa.ipc.new_file(str(self.scratch / "rows.arrow"), SCHEMA)
        self.content = hashlib.sha256()

    def write(self, batch: pa.RecordBatch) -> None:
        self.writer.write_batch(batch)
        self.content.update(content_of(batch))

    def finish(self) -> None:
        self.writer.close()
        source = {"file": self.file, "made": time.time(), "content": self.content.hexdigest()}
        (self.scratch / "source.json").write_text(json.dumps(source) + "\n", encoding="utf-8")
        set_default_mode(self.scratch)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.scratch.rename(self.folder)

    def drop(self) -> None:
        self.writer.close()
        shutil.rmtree(self.scratch)


def describe_formats(stores: Sequence[Store]) -> list[str]:
    """One line for each source: which format its rows were read as."""
    lines = []
    for store in stores:
        formats = ", ".join(f"{count:,} {name}" for name, count in sorted(store.counts("format").items(), key=lambda item: -item[1]))
        lines.append(f"{store.file}: {len(store):,} rows" + (f": {formats}" if formats else ""))
    return lines


def load_rows(sources: Sequence[Source], reader: RowReader, data: Mapping[str, Any], show_progress: bool) -> tuple[Rows, Ledger]:
    """The rows of some sources and the account of all, by the keys `bad_rows`, `max_bad_rows` and those of `open_rows`.

    Raises:
        InputError: bad rows that the policy does not allow.
    """
    rows, ledger = open_rows(sources, reader, data, show_progress)
    check_ledger(ledger, reader.too_long, data["bad_rows"], data["max_bad_rows"])
    return rows, ledger


def open_rows(sources: Sequence[Source], reader: RowReader, data: Mapping[str, Any], show_progress: bool) -> tuple[Rows, Ledger]:
    """The rows of some sources and the account of all, whatever it says, by the keys `cache_dir` and `preprocessing_num_workers` of `data`.

    Raises:
        InputError: files that cannot be read at all.
    """
    cache_dir = Path(data["cache_dir"]) if data["cache_dir"] else default_cache_dir()
    workers = data["preprocessing_num_workers"]
    stores = make_stores(sources, reader, cache_dir, min(os.cpu_count() or 1, 16) if workers is None else workers, show_progress)
    return Rows(stores, [source.weight for source in sources]), ledger_of(stores)
