"""The one canonical form of a row: turns whose parts stand in order."""

from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Text:
    """Text as the model should read it; nothing in it is a control token."""

    text: str


@dataclass(frozen=True, slots=True)
class Image:
    """One image at its place. `path` is as written in the data until `media.locate` makes it absolute."""

    path: str


Part = Text | Image


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. `weight` scales the loss of an assistant turn's tokens; 0 leaves them unsupervised."""

    role: Role
    parts: tuple[Part, ...]
    weight: float = 1.0

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(part for part in self.parts if isinstance(part, Image))

    @property
    def text(self) -> str:
        """The text of all parts, images left out."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))


@dataclass(frozen=True, slots=True)
class Sample:
    """One row: turns in order. `note` says what a format dropped ("opening assistant turn"), if anything."""

    turns: tuple[Turn, ...]
    identifier: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    note: str | None = None

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(image for turn in self.turns for image in turn.images)


class BadRow(Exception):
    """A row that cannot be trained on: a short reason for counting, and the detail for the person."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail
