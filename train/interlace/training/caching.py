"""Whether and where a run keeps the features of its images."""

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from interlace.arguments import Arguments
from interlace.data.dataset import Rows, default_cache_dir
from interlace.errors import InputError
from interlace.model.features import FeatureCache, FeatureStore, make_room, tower_hash
from interlace.model.loading import Processing
from interlace.model.tuning import TunedModel
from interlace.ranks import Ranks
from interlace.training.planning import columns_of

_PREFIX = "interlace-features-"  # then the number of the process that made the folder


def attach_feature_cache(
    tuned: TunedModel, rows: Rows, epochs: float, processing: Processing, arguments: Arguments, ranks: Ranks, say: Callable[[str], None]
) -> None:
    """Gives the frozen tower a cache, as `feature_cache` wants it; all ranks of a host share it.

    Raises:
        InputError: the folder cannot be made.
    """
    kind, tower, most_bytes = arguments["feature_cache"], tuned.tower, int(arguments["feature_cache_gib"] * 2**30)
    if kind in ("auto", "memory"):
        _clear_abandoned()
        most_bytes = min(ranks.gather(_memory_room(most_bytes)))
    if kind == "auto":
        reason = next((found for found in ranks.gather(why_not(tuned, rows, epochs, most_bytes)) if found), None)
        say("feature cache: on, in memory" if reason is None else f"feature cache: off: {reason}")
        kind = "off" if reason else "memory"
    if kind == "off":
        return
    assert tower is not None  # else the arguments were refused
    settings = f"{processing.image_processor.to_json_string()} {processing.image_settings} {tower.family.feature_settings(tower.config)}"
    settings += f" {processing.config.model_type}"
    name = tower_hash(tower.module, settings)
    if kind == "memory":
        folder, room = _in_memory(ranks, name), most_bytes
        share = ranks.gather(platform.node()).count(platform.node())
    else:
        folder, room = ranks.on_main(lambda: _on_disk(arguments, name, most_bytes))
        share = ranks.world_size
    tower.cache = FeatureCache(FeatureStore(folder), room // share, say)


def why_not(tuned: TunedModel, rows: Rows, epochs: float, most_bytes: int) -> str | None:
    """Why a cache in memory would not pay, for `auto`; None if it would: it saves the tower's forward pass, and decoding, from the second epoch on."""
    if tuned.tower is None:
        return "the vision tower learns"
    if epochs <= 1:
        return "every row is seen once"
    images = rows.num_distinct_images()
    if not images:
        return "no row has an image"
    tiles = images * columns_of(rows, tuned.base.config).num_images.sum() / rows.num_images.sum()
    needed, gib = tiles * tuned.tower.feature_bytes, 2**30
    if needed > most_bytes:
        return f"{images:,} images would need {needed / gib:,.1f} GiB, and {most_bytes / gib:,.1f} GiB may be used; feature_cache: disk may still pay"
    return None


def _memory_room(most_bytes: int) -> int:
    """Bytes of this host's memory that the cache may take: half of what is free, since the processes that read data send it through the same place."""
    return min(most_bytes, psutil.virtual_memory().available // 2, shutil.disk_usage(_memory_folder()).free // 2)


def _on_disk(arguments: Arguments, name: str, most_bytes: int) -> tuple[Path, int]:
    """The folder of a tower, and the bytes that may still be written there."""
    folder = (Path(arguments["cache_dir"]) if arguments["cache_dir"] else default_cache_dir()) / "features" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.touch()  # used now: `make_room` begins with those that have not been for longest
        return folder, make_room(folder, most_bytes)
    except OSError as error:
        raise InputError(f"feature_cache: disk: {error.filename}: {error.strerror}; choose another cache_dir, or feature_cache: off") from error


def _memory_folder() -> Path:
    """Where files live in memory; on systems that have no such place, where temporary files go."""
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


def _in_memory(ranks: Ranks, name: str) -> Path:
    """This host's folder, made by the first of its ranks and removed at its end."""
    hosts = ranks.gather(platform.node())
    first = hosts.index(platform.node()) == ranks.rank
    mine = _memory_folder() / f"{_PREFIX}{os.getpid()}" / name
    if first:
        mine.mkdir(parents=True, mode=0o700)
    folders = ranks.gather(str(mine))
    return Path(folders[hosts.index(platform.node())])


def _clear_abandoned() -> None:
    """Removes what killed runs have left in memory."""
    for path in _memory_folder().glob(f"{_PREFIX}*"):
        number = path.name.removeprefix(_PREFIX)
        if number.isdecimal() and not psutil.pid_exists(int(number)):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def memory_given_back() -> Iterator[None]:
    """Removes at the end what this process has kept in memory."""
    try:
        yield
    finally:
        shutil.rmtree(_memory_folder() / f"{_PREFIX}{os.getpid()}", ignore_errors=True)
