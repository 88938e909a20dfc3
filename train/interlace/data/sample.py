"""The one canonical form of a row: turns whose parts stand in order."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]
# How the names of media end, where only the name can tell what a file is
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov")


@dataclass(frozen=True, slots=True)
class Text:
    """Text as the model should read it; nothing in it is a control token."""

    text: str


@dataclass(frozen=True, slots=True)
class Image:
    """One image at its place in the text: a path or URL as written in the data; with `data`, the encoded bytes themselves, and `path` is only their name."""

    path: str
    data: bytes | None = None


@dataclass(frozen=True, slots=True)
class Video:
    """One video at its place in the text: a file, a folder of frames or a URL as written in the data; with `frames`, one image for each frame."""

    path: str
    data: bytes | None = None
    frames: tuple[Image, ...] = ()


Part = Text | Image | Video


@dataclass(frozen=True, slots=True)
class Place:
    """Where the encoded bytes of an image or a video lie.

    `path` is absolute. `offset` and `size`, in bytes, say which part of the file (a tar member); size -1 is the whole file.
    `pts` names one frame of a video by its presentation time in units of the stream's time base; None is an image.
    """

    path: str
    offset: int = 0
    size: int = -1
    pts: int | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. `weight` scales the loss of an assistant turn's tokens; 0 leaves them unsupervised."""

    role: Role
    parts: tuple[Part, ...]
    weight: float = 1.0

    @property
    def media(self) -> tuple[Image | Video, ...]:
        """Images and videos, in order."""
        return tuple(part for part in self.parts if not isinstance(part, Text))

    @property
    def text(self) -> str:
        """The text of all parts, media left out."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))


@dataclass(frozen=True, slots=True)
class Sample:
    """One row: turns in order. `note` says what a format dropped ("opening assistant turn"), if anything."""

    turns: tuple[Turn, ...]
    identifier: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    note: str | None = None


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One prompt with a better and a worse answer. `rejected_prompt` is the prompt of the worse one where it differs (other images), else None."""

    prompt: tuple[Turn, ...]
    chosen: Turn
    rejected: Turn
    rejected_prompt: tuple[Turn, ...] | None = None
    identifier: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    note: str | None = None


def media_of(turns: Sequence[Turn]) -> list[Image | Video]:
    """Images and videos of some turns, in order."""
    return [part for turn in turns for part in turn.media]


def with_frames(turns: Iterable[Turn], counts: Iterable[int]) -> tuple[Turn, ...]:
    """Turns whose videos have as many frames as are seen of them; counts: how many images each medium is, in order."""
    left, changed = iter(counts), []
    for turn in turns:
        numbers = {at: next(left) for at, part in enumerate(turn.parts) if not isinstance(part, Text)}
        parts = (replace(part, frames=(Image(part.path),) * numbers[at]) if isinstance(part, Video) else part for at, part in enumerate(turn.parts))
        changed.append(replace(turn, parts=tuple(parts)))
    return tuple(changed)


class BadRow(Exception):
    """A row that cannot be trained on: a short reason for counting, and the detail for the person."""

    def __init__(self, reason: str, detail: str):
        detail = detail.encode("utf-8", "backslashreplace").decode()  # half a character in the data can be written nowhere
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail
