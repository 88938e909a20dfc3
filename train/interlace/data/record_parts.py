"""What all record formats share: taking media out of a record, putting them at their placeholders, and the order of turns."""

import base64
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any

from interlace.data.sample import IMAGE_SUFFIXES, BadRow, Image, Part, Role, Text, Turn, Video

ROLES: dict[str, Role] = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# How the encoded bytes of images begin in base64: JPEG, PNG, GIF, WebP, BMP
_BASE64_HEADS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk")
_LONGEST_NAME = 1024
_LARGEST_WEIGHT = 1e6
_PLACEHOLDER = re.compile("(<image>|<video>)")


class RecordMedia:
    """The media that a record lists, handed out in order as placeholders ask for them.

    Raises:
        BadRow: a list that is none, or both `image` and `images` (`video` and `videos`) with different content.
    """

    def __init__(self, record: Mapping[str, Any], image_names: Sequence[str] = ("image", "images"), video_names: Sequence[str] = ("video", "videos")):
        if record.get("audio") or record.get("audios"):
            raise BadRow("audio", "the row holds audio; only images and videos are understood")
        self.images = [as_image(item) for item in _listed(record, image_names)]
        self.videos = _videos(_listed(record, video_names))
        self.listed = len(self.images) + len(self.videos)
        self.placed = 0
        self.image_means_video = bool(self.videos) and not self.images

    def take(self, kind: str) -> Image | Video:
        """The next image for `<image>`, the next video for `<video>`; `<image>` also stands for a video in a row without images, as LLaVA-NeXT writes it."""
        self.placed += 1
        supply: list[Any] = self.videos if kind == "<video>" or self.image_means_video else self.images
        if not supply:
            raise BadRow("placeholder_mismatch", f"more {kind} placeholders than {'videos' if kind == '<video>' else 'images'}")
        first: Image | Video = supply.pop(0)
        return first

    def parts(self, text: str) -> tuple[Part, ...]:
        """A user's text with media at its placeholders."""
        return tuple(self.take(piece) if piece in ("<image>", "<video>") else Text(piece) for piece in _PLACEHOLDER.split(text) if piece)

    def finish(self, turns: list[Turn], in_front: bool) -> None:
        """Checks that all media have been placed; with `in_front`, media of a record without any placeholder go to the front of its first user turn.

        Raises:
            BadRow: fewer placeholders than media.
        """
        left: list[Image | Video] = [*self.images, *self.videos]
        user = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
        if left and in_front and self.placed == 0 and user is not None:
            front: list[Part] = []
            for item in left:
                front += [item, Text("\n")]
            turns[user] = Turn("user", (*front, *turns[user].parts), turns[user].weight)
        elif left:
            raise BadRow("placeholder_mismatch", f"{self.listed} images or videos listed, {self.listed - len(left)} placeholders in the text")


def _listed(record: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    given = [record[name] for name in names if record.get(name) not in (None, "", [])]
    if len(given) == 2 and given[0] != given[1]:
        raise BadRow("ambiguous", f"`{names[0]}` and `{names[1]}` are both there and differ; keep one")
    return [] if not given else list(given[0]) if isinstance(given[0], (list, tuple)) else [given[0]]


def as_image(item: Any) -> Image:
    """An image from a path or URL, encoded bytes, base64 text, or a mapping that holds one of them (`bytes`, `path`, `url`, `base64`).

    Raises:
        BadRow: none of these.
    """
    name, data = _named_bytes(item, "image")
    return Image(name, data)


def as_video(item: Any) -> Video:
    """A video from the same forms, or from a list of frames.

    Raises:
        BadRow: none of these.
    """
    if isinstance(item, (list, tuple)):
        frames = tuple(as_image(frame) for frame in item)
        if not frames:
            raise BadRow("empty_video", "a video with an empty list of frames")
        return Video(frames[0].path, frames=frames)
    name, data = _named_bytes(item, "video")
    return Video(name, data)


def _videos(items: list[Any]) -> list[Video]:
    """A list of image files is one video given by its frames; any other list is several videos."""
    if items and all(isinstance(item, str) and PurePosixPath(item).suffix.lower() in IMAGE_SUFFIXES for item in items):
        return [as_video(items)]
    return [as_video(item) for item in items]


def _named_bytes(item: Any, kind: str) -> tuple[str, bytes | None]:
    if isinstance(item, bytes):
        return f"embedded {kind}", item
    if isinstance(item, str) and item:
        return _decoded(item, kind)
    if isinstance(item, Mapping):
        name = next((item[key] for key in ("path", "url", kind, "base64") if isinstance(item.get(key), str) and item[key]), "")
        data = item.get("bytes")
        if isinstance(data, bytes):
            return name or f"embedded {kind}", data
        if isinstance(data, str):
            return name or f"embedded {kind}", _base64(data, kind)
        if name:
            return (f"embedded {kind}", _base64(name, kind)) if item.get("base64") == name else _decoded(name, kind)
    raise BadRow(f"bad_{kind}", f"expected a path, bytes, or {{path | url | bytes | base64}}; got {str(item)[:80]}")


def _decoded(text: str, kind: str) -> tuple[str, bytes | None]:
    if text.startswith("data:"):
        head, comma, body = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise BadRow(f"bad_{kind}", f"{text[:60]!r}: a data URL must read data:TYPE;base64,...")
        return f"embedded {kind}", _base64(body, kind)
    if len(text) > _LONGEST_NAME and text.startswith(_BASE64_HEADS):
        return f"embedded {kind}", _base64(text, kind)
    return text, None


def _base64(text: str, kind: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:  # binascii.Error, or characters beyond ASCII
        raise BadRow(f"bad_{kind}", f"the embedded {kind} is no base64: {error}") from None


def role_of(name: Any) -> Role:
    """The role behind a name.

    Raises:
        BadRow: not one of `ROLES`.
    """
    if not isinstance(name, str) or name not in ROLES:
        raise BadRow("unknown_role", f"expected one of {', '.join(ROLES)}; got {name!r}")
    return ROLES[name]


def loss_weight(turn: Mapping[str, Any]) -> float:
    """`loss` of a message: true, false or a weight; 1 without it.

    Raises:
        BadRow: anything else, NaN and infinity included.
    """
    weight = turn.get("loss") if turn.get("loss") is not None else turn.get("weight")
    weight = True if weight is None else weight
    if not isinstance(weight, (bool, int, float)) or not 0 <= weight <= _LARGEST_WEIGHT:
        raise BadRow("bad_weight", f"expected `loss` as true, false or a weight of at least 0, got {weight!r}")
    return float(weight)


def text_turn(role: Role, text: str, media: RecordMedia, weight: float = 1.0) -> Turn:
    """A turn written as text: placeholders count in the user's turns; in answers they are plain text.

    Raises:
        BadRow: a placeholder in a system prompt, or too many in a user's turn.
    """
    if role == "system" and _PLACEHOLDER.search(text):
        raise BadRow("image_outside_user_turn", "a placeholder stands in the system prompt; images belong into turns of the user")
    return Turn(role, media.parts(text) if role == "user" else (Text(text),), weight)


def with_system(record: Mapping[str, Any], turns: list[Turn]) -> list[Turn]:
    """The turns with the record's own `system` text in front, where it has one and no system turn."""
    system = record.get("system")
    if system and not isinstance(system, str):
        raise BadRow("bad_turn", f"expected `system` as a text, got {str(system)[:80]}")
    if system and turns and turns[0].role == "system" and turns[0].text != system:
        raise BadRow("ambiguous", "`system` and the system turn differ; keep one")
    if system and not (turns and turns[0].role == "system"):
        if _PLACEHOLDER.search(system):
            raise BadRow("image_outside_user_turn", "a placeholder stands in the system prompt; images belong into turns of the user")
        return [Turn("system", (Text(system),)), *turns]
    return turns


def checked_order(turns: Sequence[Turn]) -> tuple[list[Turn], str | None]:
    """Turns in the order system?, user, assistant, user, ...; an opening assistant turn is left out.

    Returns:
        The turns, and a note of what was left out.

    Raises:
        BadRow: a system turn elsewhere, two turns of one role in a row, or nothing at all.
    """
    turns, note = list(turns), None
    body = [turn for turn in turns if turn.role != "system"]
    if body and body[0].role == "assistant":
        turns.remove(body[0])
        body, note = body[1:], "opening assistant turn dropped"
    if any(turn.role == "system" for turn in turns[1:]):
        raise BadRow("bad_order", "a system turn stands behind another turn")
    if not body:
        raise BadRow("empty", "no question and answer")
    for before, after in pairwise(body):
        if before.role == after.role:
            raise BadRow("bad_order", f"two turns of the {before.role} in a row")
    return turns, note


def identity(record: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """A record's identifier and metadata, if it has any."""
    name = next((record[key] for key in ("id", "sample_id", "idx") if record.get(key) is not None), None)
    metadata = record.get("metadata")
    return None if name is None else str(name), metadata if isinstance(metadata, dict) else {}
