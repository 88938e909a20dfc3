"""The feature cache: what a frozen vision tower made of an image, kept in files for later epochs, other processes and later runs.

A file is named by a hash of the image's bytes, of how it was processed and of the tower's weights, so that it can never be the wrong one. It holds the features
before the projector, in the type in which the tower gives them.
"""

import hashlib
import os
import queue
import shutil
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from interlace.data.places import open_bytes
from interlace.data.sample import Place
from interlace.files import set_default_mode

_WAITING_BYTES = 512 << 20  # of features that may wait for the disk
_ABANDONED_SECONDS = 3600  # after which a file that is still being written is not any more


def tower_hash(tower: nn.Module, settings: str) -> str:
    """A hash of a tower's weights and of how images come into it and features out of it."""
    content = hashlib.sha256(settings.encode())
    for name, tensor in sorted(tower.state_dict().items()):
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return content.hexdigest()[:32]


@dataclass(frozen=True)
class FeatureStore:
    """Looks features up; to be used in any process, as it holds nothing but a path.

    Args:
        folder: of one tower and one way of processing; see `tower_hash`.
    """

    folder: Path

    def key(self, place: Place, image_tokens: int) -> str:
        """Names the features of an image: by its bytes; those of a frame by its video's path, size and time of change, since videos are long."""
        content = hashlib.sha256(f"{image_tokens} {place.pts}".encode())
        if place.pts is None:
            with open_bytes(place) as file:
                content.update(file.read())
        else:
            stat = Path(place.path).stat()
            content.update(f"{place.path} {place.offset} {stat.st_size} {stat.st_mtime_ns}".encode())
        return content.hexdigest()

    def path(self, key: str) -> Path:
        """Where they would be."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def find(self, key: str) -> tuple[torch.Tensor, tuple[int, int]] | None:
        """(tiles, tokens, width) and the image's (height, width), or None. A damaged file is removed, to be made anew."""
        path = self.path(key)
        try:
            with safe_open(path, "pt") as file:
                features, about = file.get_tensor("features"), file.metadata()
            if int(about["crc32"]) == _checksum(features):
                return features, (int(about["height"]), int(about["width"]))
        except OSError:  # not there, or not ours to read
            return None
        except (SafetensorError, KeyError, ValueError):
            pass
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return None

    def write(self, key: str, features: torch.Tensor, size: tuple[int, int]) -> int:
        """Keeps the features of an image of this (height, width); the bytes that this took.

        Raises:
            OSError: the disk refuses.
        """
        path = self.path(key)
        path.parent.mkdir(exist_ok=True)  # the folder above is there, or has been given back
        about = {"height": str(size[0]), "width": str(size[1]), "crc32": str(_checksum(features))}
        descriptor, scratch = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
        os.close(descriptor)
        try:
            save_file({"features": features.contiguous()}, scratch, about)
            set_default_mode(Path(scratch))
            Path(scratch).replace(path)
        except SafetensorError as error:  # what a full disk becomes in there
            raise OSError(str(error)) from error
        finally:
            Path(scratch).unlink(missing_ok=True)
        return path.stat().st_size


def _checksum(features: torch.Tensor) -> int:
    return zlib.crc32(features.contiguous().view(torch.uint8).numpy().data)


class FeatureCache:
    """Fills a store from a thread of its own, so that training does not wait for the disk.

    Args:
        store: to be filled.
        most_bytes: that this process may add.
        say: takes warnings.
    """

    def __init__(self, store: FeatureStore, most_bytes: int, say: Callable[[str], None]):
        self.store, self.room, self.say = store, most_bytes, say
        self.num_dropped = 0  # for lack of time; they are made again
        self._waiting: queue.Queue[tuple[str, torch.Tensor, tuple[int, int]]] = queue.Queue()
        self._waiting_bytes = 0
        self._is_open = True
        threading.Thread(target=self._write_all, name="feature cache", daemon=True).start()

    def keep(self, keys: Sequence[str], features: Iterable[torch.Tensor], sizes: Sequence[tuple[int, int]]) -> None:
        """Takes the features of some images, (tiles, tokens, width) each, unless there is no room or too much is waiting already."""
        for key, tensor, size in zip(keys, features, sizes, strict=True):
            if not self._is_open:
                return
            if self._waiting_bytes + tensor.nbytes > _WAITING_BYTES:
                self.num_dropped += 1
            else:
                self._waiting_bytes += tensor.nbytes
                self._waiting.put((key, tensor.detach(), size))

    def flush(self) -> None:
        """Waits until all that was taken is written."""
        self._waiting.join()

    def _write_all(self) -> None:
        while True:
            key, features, size = self._waiting.get()
            try:
                if self._is_open and not self.store.path(key).exists():
                    self._write(key, features.to("cpu"), size)
            except (OSError, RuntimeError) as error:  # the disk, or the device
                self._is_open = False
                self.say(f"warning: the feature cache cannot be written: {error}; training goes on without what it lacks")
            finally:
                self._waiting_bytes -= features.nbytes
                self._waiting.task_done()

    def _write(self, key: str, features: torch.Tensor, size: tuple[int, int]) -> None:
        if features.nbytes > self.room:
            self._is_open = False
            self.say("the feature cache is full (feature_cache_gib): features of further images are made whenever they are needed")
            return
        self.room -= self.store.write(key, features, size)


def used_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def make_room(folder: Path, most_bytes: int) -> int:
    """Removes the caches of other towers beside `folder`, the oldest first, until they fit `most_bytes` together with it; bytes that are left for it."""
    for scratch in folder.parent.rglob(".writing-*"):  # of runs that were killed
        if time.time() - scratch.stat().st_mtime > _ABANDONED_SECONDS:
            scratch.unlink(missing_ok=True)
    others = sorted((path for path in folder.parent.iterdir() if path.is_dir() and path != folder), key=lambda path: path.stat().st_mtime)
    used = {path: used_bytes(path) for path in (folder, *others)}
    while others and sum(used.values()) >= most_bytes:
        oldest = others.pop(0)
        shutil.rmtree(oldest, ignore_errors=True)
        del used[oldest]
    return max(0, most_bytes - sum(used.values()))
