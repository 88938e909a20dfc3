"""Where the media of a row lie: confined to their folders, in an archive, embedded in the data, or behind a URL."""

import hashlib
import io
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

from interlace.data.download import UrlPolicy, download, is_url
from interlace.data.sample import IMAGE_SUFFIXES, BadRow, Image, Place, Video
from interlace.files import set_default_mode

_LONGEST_PATH = 1024


@dataclass(frozen=True, slots=True)
class MediaFolder:
    """Keeps media that are no files yet: embedded bytes under the hash of their content, downloads under the hash of their URL.

    Args:
        folder: made on first use.
        urls: what may be downloaded; None for nothing.
    """

    folder: Path
    urls: UrlPolicy | None = None

    def keep(self, data: bytes) -> Place:
        """The place of some bytes, written once whatever asks for them."""
        return self._keep(hashlib.sha256(data).hexdigest(), data)

    def fetch(self, url: str) -> Place:
        """The place of what is behind a URL, downloaded once.

        Raises:
            BadRow: URLs are not allowed, or the download fails.
        """
        if self.urls is None:
            raise BadRow("url", f"{url[:200]}: URLs are opened only with allow_urls: true")
        name = f"url-{hashlib.sha256(url.encode()).hexdigest()}"
        path = self._path(name)
        return Place(str(path)) if path.is_file() else self._keep(name, download(url, self.urls))

    def forget(self, place: Place) -> None:
        """Throws a download away that turned out to be no medium: a later run asks again."""
        path = Path(place.path)
        if path.name.startswith("url-") and path.is_relative_to(self.folder):
            path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / name[-2:] / name

    def _keep(self, name: str, data: bytes) -> Place:
        path = self._path(name)
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, scratch = tempfile.mkstemp(dir=path.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            set_default_mode(Path(scratch))  # the cache may be shared
            Path(scratch).replace(path)  # whole or not at all, whoever else writes it
        return Place(str(path))


@dataclass(frozen=True, slots=True)
class Finder:
    """Finds the media of one source's rows.

    Args:
        image_roots, video_roots: the folders that paths may lie in, the declared one first.
        kept: for media that are no files.
        members: what an archive holds beside the row, by name.
        followed: gets the paths that led to a medium over a link, which may lead elsewhere one day.
    """

    image_roots: tuple[Path, ...]
    video_roots: tuple[Path, ...]
    kept: MediaFolder
    members: Mapping[str, Place | bytes] = field(default_factory=dict)
    followed: list[str] = field(default_factory=list)

    def find(self, item: Image | Video, kind: Literal["image", "video"]) -> Place:
        """The place of an image, or of a video or one of its frames (`kind` video); a folder of frames has the folder's path.

        Raises:
            BadRow: outside its folders, missing, no regular file, or a URL that may not or cannot be fetched.
        """
        if item.data is not None:
            return self.kept.keep(item.data)
        if item.path in self.members:
            member = self.members[item.path]
            return self.kept.keep(member) if isinstance(member, bytes) else member
        if is_url(item.path) and is_text(item.path):
            return self.kept.fetch(item.path)
        roots = self.video_roots if kind == "video" else self.image_roots
        place = locate(item.path, roots, kind)
        written = [os.path.join(_real_folder(str(root), ""), item.path) for root in roots]
        if place not in written:
            self.followed.extend(path for path in written if os.path.realpath(path) == place)
        return Place(place)


def is_text(name: str) -> bool:
    """Whether a name can be written as UTF-8: no half characters."""
    return name.encode("utf-8", "replace").decode() == name


class _Slice(io.RawIOBase):
    """A part of a file as a file of its own; what lies around it is out of reach."""

    def __init__(self, file: BinaryIO, offset: int, size: int):
        self.file, self.offset, self.size, self.position = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = max(0, offset + (0, self.position, self.size)[whence])
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.offset + self.position)
        data = self.file.read(min(len(buffer), max(0, self.size - self.position)))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


@contextmanager
def open_bytes(place: Place) -> Iterator[BinaryIO]:
    """The encoded bytes of a medium as a seekable file; the rest of the file around a slice is out of reach."""
    with Path(place.path).open("rb") as file:
        if place.size < 0:
            yield file
        else:
            yield io.BufferedReader(_Slice(file, place.offset, place.size))


@lru_cache(maxsize=100_000)
def locate(path: str, roots: tuple[Path, ...], kind: str = "image") -> str:
    """The absolute path of a medium written as `path`: under the first of `roots` that has it, never outside all of them.

    Args:
        kind: image or video; a video may be a folder of frames.

    Raises:
        BadRow: outside the roots; missing; no regular file.
    """
    if "\0" in path or not is_text(path) or len(path.encode()) > _LONGEST_PATH:
        raise BadRow(f"bad_{kind}", f"{path[:80]!r} is no file name")
    try:
        folders = [_real_folder(str(root), "") for root in roots]
        candidates = [_real(folder, path) for folder in folders]
        inside = [place for place in candidates if any(place == folder or place.startswith(os.path.join(folder, "")) for folder in folders)]
        for place in inside:
            if os.path.isfile(place) or (kind == "video" and os.path.isdir(place)):
                return place
            if os.path.exists(place):
                raise BadRow("not_a_file", f"{place} is no regular file")
    except OSError as error:
        raise BadRow(f"bad_{kind}", f"{path[:80]!r} is no file name: {error.strerror}") from None
    if not inside:
        folder = f"{kind}_folder"
        raise BadRow("outside_folder", f"{path!r} lies outside {', '.join(map(str, roots))}; name its folder in `{folder}` or `media_roots`")
    raise BadRow(f"missing_{kind}", f"{inside[0]} does not exist")


def _real(folder: str, path: str) -> str:
    """The path with every symbolic link followed; folders are looked up once, so that a file costs one look."""
    head, tail = os.path.split(path)
    full = os.path.join(_real_folder(folder, head), tail)
    return os.path.realpath(full) if tail in ("", ".", "..") or os.path.islink(full) else full


@lru_cache(maxsize=10_000)
def _real_folder(folder: str, path: str) -> str:
    return os.path.realpath(os.path.join(folder, path))


def frame_folder(folder: Path) -> list[Path]:
    """The image files of a folder of frames, in natural order (frame_2 before frame_10); other files are passed over.

    Raises:
        BadRow: there is none, or one is a link that leads out of the folder.
    """
    try:
        frames = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()]
    except OSError as error:
        raise BadRow("broken_video", f"{folder} cannot be listed: {error.strerror}") from None
    if not frames:
        raise BadRow("empty_video", f"{folder} holds no image files")
    if len(kinds := {path.suffix.lower().replace("jpeg", "jpg") for path in frames}) > 1:
        raise BadRow("bad_video", f"{folder} holds frames of several kinds ({', '.join(sorted(kinds))}): pictures beside depth maps, perhaps; keep one kind")
    for path in frames:
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise BadRow("outside_folder", f"{path} is a link that leads out of its folder")
    return sorted(frames, key=lambda path: ([int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", path.name))], path.name))
