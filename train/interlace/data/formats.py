"""One small function per record format: record -> `Sample`. Raises `BadRow`; opens no file."""

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

from interlace.data.sample import BadRow, Image, Part, Role, Sample, Text, Turn

PLACEHOLDER = "<image>"
ROLES: dict[str, Role] = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def recognise(record: Any) -> str:
    """The name of a record's format.

    Raises:
        BadRow: neither `conversations` nor `messages` is there, or is a list.
    """
    if not isinstance(record, dict):
        raise BadRow("not_an_object", f"expected an object, got {type(record).__name__}")
    if isinstance(record.get("messages"), list):
        return "messages"
    turns = record.get("conversations")
    if not isinstance(turns, list):
        raise BadRow("unknown_format", f"expected `conversations` or `messages`, a list; got the keys {sorted(map(str, record))[:8]}")
    first = turns[0] if turns else None
    if isinstance(first, list):
        return "chatml"
    return "messages" if isinstance(first, dict) and "role" in first else "llava"


def from_llava(record: dict[str, Any]) -> Sample:
    """`{id, image: str | [str], conversations: [{from: human | gpt | system, value}]}`, `<image>` at its place in human turns."""
    images = _image_paths(record)
    turns = []
    for turn in _list(record, "conversations"):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise BadRow("bad_turn", f"expected {{from, value}} with a text value, got {str(turn)[:80]}")
        role = _role(turn.get("from"))
        parts = _parts(turn["value"], images) if role == "user" else (Text(turn["value"]),)
        turns.append(Turn(role, parts, _weight(turn)))
    return _finish(record, turns, images)


def from_chatml(record: dict[str, Any]) -> Sample:
    """PaddleMIX: `{image: path | [path], conversations: [[question, answer], ..]}`."""
    images = _image_paths(record)
    turns = []
    for pair in _list(record, "conversations"):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise BadRow("bad_turn", f"expected a pair of texts [question, answer], got {str(pair)[:80]}")
        turns += [Turn("user", _parts(pair[0], images)), Turn("assistant", (Text(pair[1]),))]
    return _finish(record, turns, images)


def from_messages(record: dict[str, Any]) -> Sample:
    """Hugging Face / OpenAI: `messages: [{role, content: str | [{type, ..}], loss?}]`, images inline or in an `images` column."""
    images = _image_paths(record)
    turns = []
    for message in _list(record, "messages" if "messages" in record else "conversations"):
        if not isinstance(message, dict):
            raise BadRow("bad_turn", f"expected {{role, content}}, got {str(message)[:80]}")
        role, content = _role(message.get("role")), message.get("content")
        if isinstance(content, str):
            parts = _parts(content, images) if role == "user" else (Text(content),)
        elif isinstance(content, list):
            parts = tuple(_content_part(item, images) for item in content)
        else:
            raise BadRow("bad_turn", f"expected content as text or as a list of parts, got {type(content).__name__}")
        if role != "user" and any(isinstance(part, Image) for part in parts):
            raise BadRow("image_outside_user_turn", f"an image stands in a turn of the {role}")
        turns.append(Turn(role, parts, _weight(message)))
    return _finish(record, turns, images)


FORMATS: dict[str, Callable[[dict[str, Any]], Sample]] = {"llava": from_llava, "chatml": from_chatml, "messages": from_messages}


def _list(record: dict[str, Any], name: str) -> list[Any]:
    value = record.get(name)
    if not isinstance(value, list):
        raise BadRow("unknown_format", f"expected `{name}`, a list; got {type(value).__name__}")
    return value


def _role(name: Any) -> Role:
    if not isinstance(name, str) or name not in ROLES:
        raise BadRow("unknown_role", f"expected one of {', '.join(ROLES)}; got {name!r}")
    return ROLES[name]


def _weight(turn: dict[str, Any]) -> float:
    weight = turn.get("loss", True)
    if not isinstance(weight, (bool, int, float)) or not 0 <= weight < float("inf"):
        raise BadRow("bad_weight", f"expected `loss` as true, false or a weight of at least 0, got {weight!r}")
    return float(weight)


def _image_paths(record: dict[str, Any]) -> Iterator[str]:
    if record.get("video") or record.get("videos"):
        raise BadRow("video", "videos are not supported by this version; use frames as several images")
    value = record.get("image") if record.get("image") is not None else record.get("images")
    paths = [] if value is None or value == "" else value if isinstance(value, list) else [value]
    for path in paths:
        if not isinstance(path, str) or not path:
            raise BadRow("bad_image", f"expected image paths, got {str(path)[:80]}")
    return iter(paths)


def _next_image(images: Iterator[str]) -> Image:
    path = next(images, None)
    if path is None:
        raise BadRow("placeholder_mismatch", f"more {PLACEHOLDER} placeholders than images")
    return Image(path)


def _parts(text: str, images: Iterator[str]) -> tuple[Part, ...]:
    pieces = re.split(f"({re.escape(PLACEHOLDER)})", text)
    return tuple(_next_image(images) if piece == PLACEHOLDER else Text(piece) for piece in pieces if piece)


def _content_part(item: Any, images: Iterator[str]) -> Part:
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "text" and isinstance(item.get("text"), str):
        return Text(item["text"])
    if kind == "image":
        path = next((item[name] for name in ("image", "path", "url") if item.get(name) is not None), None)
        if path is None:
            return _next_image(images)
        if not isinstance(path, str):
            raise BadRow("bad_image", f"expected a path, got {str(path)[:80]}")
        return Image(path)
    if kind == "image_url" and isinstance(item.get("image_url"), dict) and isinstance(item["image_url"].get("url"), str):
        return Image(item["image_url"]["url"])
    raise BadRow("bad_turn", f"expected a part of type text, image or image_url; got {str(item)[:80]}")


def _finish(record: dict[str, Any], turns: list[Turn], images: Iterator[str]) -> Sample:
    left = len(list(images))
    if left:
        raise BadRow("placeholder_mismatch", f"{left} more image{'s' if left > 1 else ''} than {PLACEHOLDER} placeholders")
    note = None
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
    if body[-1].role != "assistant":
        raise BadRow("no_answer", "the row ends without an answer")
    if not any(turn.text.strip() for turn in body if turn.role == "assistant"):
        raise BadRow("empty_answer", "every answer is empty")
    identifier, metadata = record.get("id", record.get("sample_id")), record.get("metadata")
    return Sample(tuple(turns), None if identifier is None else str(identifier), metadata if isinstance(metadata, dict) else {}, note)
