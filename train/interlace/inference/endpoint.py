"""Chat completions in OpenAI's form: what is asked, and what is answered. Needs neither a model nor a server.

Fields that would change the answer and that we cannot honour are refused; those that would not are passed over.
"""

import base64
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from interlace.data.sample import Image, Part, Role, Text, Turn, Video, media_of
from interlace.errors import InputError
from interlace.inference.sampling import Sampling

MOST_MEDIA = 128  # images and videos of a conversation
_MOST_STOPS = 16
_DATA_URL = re.compile(r"data:(?P<kind>image|video)/[\w.+-]+(;[\w.+-]+=[\w.+-]+)*;base64,")
_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_NUMBERS = {"temperature": float, "top_p": float, "top_k": int, "repetition_penalty": float, "seed": int}
_READ = {"messages", "model", "stream", "stream_options", "stop", "max_tokens", "max_completion_tokens", *_NUMBERS}
_HARMLESS = {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
# The only values that leave an answer as it is; null, which is every field's "not given", too
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "audio": (),
    "prediction": (),
    "verbosity": (),
    "web_search_options": (),
}


class Refusal(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP. param: the field that is to blame. code: OpenAI's word for it, if it has one.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 500: "server_error", 503: "server_error"}.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, slots=True)
class Asked:
    """A request: a system turn or none, questions with their answers, and the question that is to be answered.

    A medium is its bytes; its `path` says where in the request it stands. `tells_usage`: a stream ends with the counts of tokens.
    """

    turns: tuple[Turn, ...]
    sampling: Sampling
    stop: tuple[str, ...] = ()
    stream: bool = False
    tells_usage: bool = False


def read_request(body: Any, model: str, defaults: Sampling, system: str = "") -> Asked:
    """What a request asks for.

    Args:
        body: as JSON was read. model: the name of the only one. defaults, system: where the request says nothing.

    Raises:
        Refusal: it cannot be done as it is asked.
    """
    if not isinstance(body, dict):
        raise Refusal(400, "expected a JSON object")
    body = {name: value for name, value in body.items() if value is not None}
    _check_fields(body)
    if body.get("model", model) != model:
        raise Refusal(404, f"the model {str(body['model'])[:200]!r} is not served here; this is {model!r}", "model", "model_not_found")
    stop = body.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > _MOST_STOPS or not all(isinstance(text, str) and text for text in stop):
        raise Refusal(400, f"expected a text, or a list of at most {_MOST_STOPS} texts, none empty", "stop")
    options = body.get("stream_options", {})
    if not isinstance(body.get("stream", False), bool) or not isinstance(options, dict):
        raise Refusal(400, "expected true or false, and an object", "stream")
    turns = _turns(body.get("messages"))
    if system and turns[0].role != "system":
        turns.insert(0, Turn("system", (Text(system),)))
    return Asked(tuple(turns), _sampling(body, defaults), tuple(stop), body.get("stream", False), options.get("include_usage") is True)


def _check_fields(body: Mapping[str, Any]) -> None:
    for name, value in body.items():
        if name in _NEUTRAL and (value not in _NEUTRAL[name] or (value is True)):  # True would pass for n = 1
            expected = f"; expected {' or '.join(map(repr, _NEUTRAL[name]))}, or nothing" if _NEUTRAL[name] else ""
            raise Refusal(400, f"{name}: {str(value)[:80]!r} is not supported{expected}", name, "unsupported_parameter")
        if name not in _NEUTRAL and name not in _READ and name not in _HARMLESS:
            close = get_close_matches(name, _READ, 1)
            raise Refusal(400, f"unknown field {name[:80]!r}{f'; did you mean {close[0]}?' if close else ''}", name[:80], "unknown_parameter")


def _sampling(body: Mapping[str, Any], defaults: Sampling) -> Sampling:
    changes: dict[str, Any] = {}
    for name, kind in _NUMBERS.items():
        if name in body:
            changes[name] = kind(_number(body, name, kind is int))
    lengths = {name: _number(body, name, True) for name in ("max_completion_tokens", "max_tokens") if name in body}
    if len(set(lengths.values())) > 1:
        raise Refusal(400, f"max_tokens and max_completion_tokens differ: {lengths}; give one", "max_tokens")
    for length in lengths.values():
        changes["max_new_tokens"] = length
    try:
        return replace(defaults, **changes)
    except InputError as error:
        raise Refusal(400, str(error), str(error).partition(":")[0].replace("max_new_tokens", next(iter(lengths), "max_tokens"))) from None


def _number(body: Mapping[str, Any], name: str, is_whole: bool) -> int | float:
    value = body[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e18 or (is_whole and value != int(value)):
        raise Refusal(400, f"{name}: expected a {'whole ' if is_whole else ''}number, got {str(value)[:80]!r}", name)
    return int(value) if is_whole else value


def _turns(messages: Any) -> list[Turn]:
    if not isinstance(messages, list) or not messages:
        raise Refusal(400, "expected a list of messages, at least one", "messages")
    turns = [_turn(message, f"messages[{number}]") for number, message in enumerate(messages)]
    roles = [turn.role for turn in turns]
    questions = roles[1:] if roles[0] == "system" else roles
    if not questions or questions != ["user", "assistant"] * (len(questions) // 2) + ["user"]:
        expected = "a system message or none, then the user's and the assistant's by turns, the user's last: the model has seen no others"
        raise Refusal(400, f"expected {expected}; got {', '.join(roles)}"[:1000], "messages")
    if len(media_of(turns)) > MOST_MEDIA:
        raise Refusal(400, f"{len(media_of(turns))} images and videos; at most {MOST_MEDIA} are taken", "messages")
    return turns


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, dict):
        raise Refusal(400, f"{where}: expected an object with role and content", where)
    message = {name: value for name, value in message.items() if value not in (None, [])}
    role = _ROLES.get(str(message.get("role")))
    if role is None:
        raise Refusal(400, f"{where}: expected the role system, user or assistant, got {str(message.get('role'))[:80]!r}", f"{where}.role")
    more = sorted(set(message) - {"role", "content", "name", "refusal", "annotations"})
    if more:
        raise Refusal(400, f"{where}: {', '.join(more)[:200]} is not supported", where, "unsupported_parameter")
    content = message.get("content", "")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}] if content else []
    if not isinstance(content, list):
        raise Refusal(400, f"{where}: expected content as a text or a list of parts", f"{where}.content")
    parts = tuple(_part(item, f"{where}.content[{number}]") for number, item in enumerate(content))
    if role == "user" and not parts:
        raise Refusal(400, f"{where}: the user's message is empty", f"{where}.content")
    if role != "user" and not all(isinstance(part, Text) for part in parts):
        raise Refusal(400, f"{where}: images and videos belong into the user's messages", f"{where}.content")
    return Turn(role, parts or (Text(""),))


def _part(item: Any, where: str) -> Part:
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "text" and isinstance(item.get("text"), str):
        return Text(item["text"])
    if kind not in ("image_url", "video_url"):
        raise Refusal(400, f"{where}: expected a part of type text (with a text), image_url or video_url; got {str(kind)[:80]!r}", where)
    value = item.get(kind)
    url = value.get("url") if isinstance(value, dict) else value
    of = kind.removesuffix("_url")
    if not isinstance(url, str):
        raise Refusal(400, f"{where}: expected {{{kind!r}: {{'url': 'data:{of}/..;base64,..'}}}}", where)
    head = _DATA_URL.match(url, 0, 200)
    if head is None or head["kind"] != of:
        raise Refusal(400, f"{where}: {url[:60]!r}: expected the {of} itself, as data:{of}/..;base64,..; no address is fetched and no file is opened", where)
    try:
        data = base64.b64decode(url[head.end() :], validate=True)
    except ValueError as error:
        raise Refusal(400, f"{where}: the {of} is no base64: {error}", where) from None
    return Image(where, data) if of == "image" else Video(where, data)


class Held:
    """Text on its way out that ends before the first of some stop texts: what may be the beginning of one is held back."""

    def __init__(self, stops: tuple[str, ...]):
        self.stops, self.text, self.is_over = stops, "", False

    def take(self, piece: str) -> str:
        """What may go out once `piece` has come."""
        self.text += piece
        found = [place for stop in self.stops if (place := self.text.find(stop)) >= 0]
        self.is_over = bool(found)
        length = min(found) if found else len(self.text) - max((_overlap(self.text, stop) for stop in self.stops), default=0)
        out, self.text = self.text[:length], "" if found else self.text[length:]
        return out


def _overlap(text: str, stop: str) -> int:
    """How long the end of a text is that begins `stop`."""
    return next((length for length in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:length])), 0)


def model_list(model: str, created: int) -> dict[str, Any]:
    """The answer to /v1/models."""
    return {"object": "list", "data": [{"id": model, "object": "model", "created": created, "owned_by": "interlace"}]}


@dataclass(frozen=True, slots=True)
class Answer:
    """Writes one answer: whole, or in chunks."""

    identifier: str
    model: str

    def whole(self, text: str, reason: str, usage: dict[str, Any]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage}

    def chunk(self, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk"), "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]}

    def last_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.identifier, "object": kind, "created": int(time.time()), "model": self.model}
