"""One small function per record format: record -> `Sample` or `PreferencePair`. Raises `BadRow`; opens no file.

Media stand where the text has `<image>` or `<video>`. Formats whose authors leave the place open (messages, query and response, instructions,
preference rows) put the media of a row without any placeholder in front of its first question, each on a line of its own.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from interlace.data.record_parts import (
    RecordMedia,
    as_image,
    as_video,
    checked_order,
    identity,
    loss_weight,
    role_of,
    text_turn,
    with_system,
)
from interlace.data.sample import BadRow, Part, PreferencePair, Role, Sample, Text, Turn, Video

PLACEHOLDER = "<image>"
Format = Callable[[Mapping[str, Any]], Sample | PreferencePair]


def recognise(record: Any) -> tuple[str, str]:
    """The name of a record's format, and the reason in a few words.

    Raises:
        BadRow: no object, no known keys, or keys of two formats.
    """
    if not isinstance(record, Mapping):
        raise BadRow("not_an_object", f"expected an object, got {type(record).__name__}")
    has = {name for name, value in record.items() if value is not None}
    if has & {"rejected", "rejected_response", "rejected_messages"} or (isinstance(record.get("text"), str) and "rejected" in _json_object(record["text"])):
        return "preference", "a chosen and a rejected answer"
    found = []
    for name in ("conversations", "messages", "conversation"):
        if isinstance(record.get(name), list):
            found.append(_recognise_turns(name, record[name]))
    if {"prompt", "completion"} <= has:
        found.append(("prompt_completion", "`prompt` and `completion`"))
    if "response" in has and "query" in has:
        found.append(("swift", "`query` and `response`"))
    if {"instruction", "output"} <= has:
        found.append(("alpaca", "`instruction` and `output`"))
    if len(found) > 1:
        raise BadRow("ambiguous", f"the row has {' and also '.join(why for _, why in found)}; say which with `format` in the dataset entry")
    if not found and "chosen" in has:
        return "preference", "a chosen answer"
    if not found:
        raise BadRow("unknown_format", f"expected `conversations`, `messages` or another known form; got the keys {sorted(map(str, record))[:8]}")
    return found[0]


def _recognise_turns(name: str, turns: list[Any]) -> tuple[str, str]:
    first = turns[0] if turns else None
    if isinstance(first, list):
        return "chatml", f"`{name}` of [question, answer] pairs"
    if isinstance(first, dict) and "human" in first:
        return "swift", f"`{name}` of {{human, assistant}} pairs"
    if name == "messages" or (isinstance(first, dict) and first.get("role") is not None):
        return "messages", f"`{name}` of {{role, content}}"
    return "llava", f"`{name}` of {{from, value}}"


def from_llava(record: Mapping[str, Any]) -> Sample:
    """LLaVA and ShareGPT: `{id, image, video, conversations: [{from: human | gpt | system, value}], system}`; every medium has its placeholder."""
    media = RecordMedia(record)
    return _sample(record, with_system(record, _llava_turns(_list(record, "conversations"), media)), media, in_front=False)


def from_chatml(record: Mapping[str, Any]) -> Sample:
    """PaddleMIX: `{image, conversations: [[question, answer], ..]}`; every medium has a placeholder."""
    media = RecordMedia(record)
    turns: list[Turn] = []
    for pair in _list(record, "conversations"):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise BadRow("bad_turn", f"expected a pair of texts [question, answer], got {str(pair)[:80]}")
        turns += [text_turn("user", pair[0], media), text_turn("assistant", pair[1], media)]
    return _sample(record, with_system(record, turns), media, in_front=False)


def from_messages(record: Mapping[str, Any]) -> Sample:
    """Hugging Face, OpenAI, TRL and SWIFT: `{messages: [{role, content: str | [{type, ..}], loss}], images, videos}`, media inline or in their columns."""
    media = RecordMedia(record)
    turns = _message_turns(_list(record, "messages" if record.get("messages") is not None else "conversations"), media)
    return _sample(record, with_system(record, turns), media, in_front=True)


def from_swift(record: Mapping[str, Any]) -> Sample:
    """SWIFT: `{query, response, history: [[question, answer], ..], system, images, videos}`, or `conversation` of `{human, assistant}`."""
    media = RecordMedia(record)
    if isinstance(record.get("conversation"), list):
        pairs = [(turn.get("human"), turn.get("assistant")) if isinstance(turn, dict) else (None, None) for turn in record["conversation"]]
    else:
        pairs = [*_history(record), (record.get("query"), record.get("response"))]
    return _sample(record, with_system(record, _pair_turns(pairs, media)), media, in_front=True)


def from_alpaca(record: Mapping[str, Any]) -> Sample:
    """Instructions: `{instruction, input, output, history, system, images, videos}`; `input` follows the instruction on a new line."""
    media = RecordMedia(record)
    return _sample(record, with_system(record, _pair_turns([*_history(record), (_instruction(record), record.get("output"))], media)), media, in_front=True)


def from_prompt_completion(record: Mapping[str, Any]) -> Sample:
    """TRL: `{prompt, completion, images}`, both as text or both as messages; the loss covers the completion."""
    media = RecordMedia(record)
    turns = with_system(record, _prompt_turns(record.get("prompt"), media))
    turns = [Turn(turn.role, turn.parts, 0.0) for turn in turns]
    turns.append(_answer(record.get("completion"), "completion", media))
    return _sample(record, turns, media, in_front=True)


def from_preference(record: Mapping[str, Any]) -> PreferencePair:
    """Every preference form: a prompt (`prompt`, `question`, `query`, `instruction`, `messages` or `conversations`) with two answers.

    TRL plain, conversational and with the prompt inside both answers; LLaVA-NeXT `{image | video, prompt, chosen, rejected}`; LLaVA-Hound;
    RLHF-V and RLAIF-V (also with the three texts as JSON in `text`); ShareGPT and instruction forms; SWIFT's `rejected_response`, `rejected_messages`
    and `rejected_images`.
    """
    if isinstance(record.get("text"), str) and record.get("chosen") is None:
        record = {**record, **_json_object(record["text"])}
    media = RecordMedia(record)
    chosen_value, rejected_value = record.get("chosen"), record.get("rejected")
    rejected_media = RecordMedia(record, ("rejected_image", "rejected_images"), ()) if record.get("rejected_image") or record.get("rejected_images") else None
    prompt_value = _preference_prompt(record)
    if record.get("rejected_response") is not None or record.get("rejected_messages") is not None:
        if not isinstance(prompt_value, list) or not prompt_value:
            prompt_value, chosen_value = record.get("query"), record.get("response")
        else:
            prompt_value, chosen_value = prompt_value[:-1], [prompt_value[-1]]
        rejected_value = record.get("rejected_response") if record.get("rejected_response") is not None else record.get("rejected_messages")
    if prompt_value is None and isinstance(chosen_value, list) and isinstance(rejected_value, list):
        prompt_value = _common_start(chosen_value, rejected_value)
        if not prompt_value:
            raise BadRow("different_prompts", "the chosen and the rejected conversation do not begin with the same prompt")
    if prompt_value is None:
        raise BadRow("unknown_format", f"a preference row without a prompt; got the keys {sorted(map(str, record))[:8]}")
    prompt, note = _finished_prompt(record, prompt_value, media)
    other = _finished_prompt(record, prompt_value, rejected_media)[0] if rejected_media is not None else prompt
    chosen, rejected = (_answer(_without_prompt(value, prompt_value), name, media) for value, name in ((chosen_value, "chosen"), (rejected_value, "rejected")))
    identifier, metadata = identity(record)
    return PreferencePair(tuple(prompt), chosen, rejected, None if other == prompt else tuple(other), identifier, metadata, note)


FORMATS: dict[str, Format] = {
    "llava": from_llava,
    "chatml": from_chatml,
    "messages": from_messages,
    "swift": from_swift,
    "alpaca": from_alpaca,
    "prompt_completion": from_prompt_completion,
    "preference": from_preference,
}


def _list(record: Mapping[str, Any], name: str) -> list[Any]:
    value = record.get(name)
    if not isinstance(value, list):
        raise BadRow("unknown_format", f"expected `{name}`, a list; got {type(value).__name__}")
    return value


def _llava_turns(values: list[Any], media: RecordMedia) -> list[Turn]:
    turns = []
    for turn in values:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise BadRow("bad_turn", f"expected {{from, value}} with a text value, got {str(turn)[:80]}")
        turns.append(text_turn(role_of(turn.get("from")), turn["value"], media, loss_weight(turn)))
    return turns


def _message_turns(values: list[Any], media: RecordMedia) -> list[Turn]:
    turns = []
    for message in values:
        if not isinstance(message, dict):
            raise BadRow("bad_turn", f"expected {{role, content}}, got {str(message)[:80]}")
        role, content, weight = role_of(message.get("role")), message.get("content"), loss_weight(message)
        if isinstance(content, str):
            turns.append(text_turn(role, content, media, weight))
        elif isinstance(content, list):
            turn = Turn(role, tuple(part for item in content for part in _content_parts(item, role, media)), weight)
            if role != "user" and turn.media:
                raise BadRow("image_outside_user_turn", f"an image or a video stands in a turn of the {role}")
            turns.append(turn)
        else:
            raise BadRow("bad_turn", f"expected content as text or as a list of parts, got {type(content).__name__}")
    return turns


def _content_parts(item: Any, role: Role, media: RecordMedia) -> tuple[Part, ...]:
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "text" and isinstance(item.get("text"), str):
        return text_turn(role, item["text"], media).parts
    if kind in ("image", "image_url", "video", "video_url"):
        value = item.get(kind)
        if kind.endswith("_url") and isinstance(value, dict):
            value = value.get("url")
        elif value is None:
            value = next((item[name] for name in ("path", "url", "base64", "bytes") if item.get(name) is not None), None)
            value = {"base64": value} if value is not None and value == item.get("base64") else value
        is_video = kind.startswith("video")
        if value is None:
            if item.get("index") not in (None, media.placed):
                raise BadRow("placeholder_mismatch", f"medium {media.placed} of the text has the index {item['index']}; list media in its order")
            return (media.take("<video>" if is_video else "<image>"),)
        media.placed += 1
        return (as_video(value) if is_video else as_image(value),)
    raise BadRow("bad_turn", f"expected a part of type text, image, image_url, video or video_url; got {str(item)[:80]}")


def _history(record: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in history):
        raise BadRow("bad_turn", "expected `history` as a list of [question, answer] pairs")
    return [(pair[0], pair[1]) for pair in history]


def _pair_turns(pairs: list[tuple[Any, Any]], media: RecordMedia) -> list[Turn]:
    turns = []
    for question, answer in pairs:
        if not isinstance(question, str) or not isinstance(answer, str):
            raise BadRow("bad_turn", f"expected a question and an answer as texts, got {str(question)[:40]} and {str(answer)[:40]}")
        turns += [text_turn("user", question, media), text_turn("assistant", answer, media)]
    return turns


def _instruction(record: Mapping[str, Any]) -> str:
    instruction, more = record.get("instruction"), record.get("input")
    if not isinstance(instruction, str) or not isinstance(more, (str, type(None))):
        raise BadRow("bad_turn", f"expected `instruction` and `input` as texts, got {str(instruction)[:40]} and {str(more)[:40]}")
    return f"{instruction}\n{more}" if more else instruction


def _prompt_turns(value: Any, media: RecordMedia) -> list[Turn]:
    """The turns of a prompt given as text, as messages, or as `{from, value}` turns."""
    if isinstance(value, str):
        return [text_turn("user", value, media)]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return _llava_turns(value, media) if value[0].get("from") is not None else _message_turns(value, media)
    raise BadRow("bad_turn", f"expected the prompt as text or as a list of messages, got {str(value)[:80]}")


def _answer(value: Any, name: str, media: RecordMedia) -> Turn:
    """One assistant turn from a text, a message, or a list that holds one."""
    if value is None:
        raise BadRow("missing_answer", f"`{name}` is missing")
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list) and value:
        raise BadRow("different_prompts", f"`{name}` holds {len(value)} messages; expected one answer, or the row's prompt and one answer")
    if isinstance(value, str):
        turn = Turn("assistant", (Text(value),))
    elif isinstance(value, dict):
        turn = _prompt_turns([value], media)[0]
    else:
        raise BadRow("bad_turn", f"expected `{name}` as a text or one message of the assistant, got {str(value)[:80]}")
    if turn.role != "assistant":
        raise BadRow("bad_order", f"`{name}` is a turn of the {turn.role}")
    if not turn.text.strip():
        raise BadRow("empty_answer", f"`{name}` is empty")
    return Turn("assistant", turn.parts)


def _preference_prompt(record: Mapping[str, Any]) -> Any:
    if isinstance(record.get("instruction"), str):
        return _instruction(record)
    return next((record[name] for name in ("prompt", "messages", "conversations", "question", "query") if record.get(name) is not None), None)


def _common_start(chosen: list[Any], rejected: list[Any]) -> list[Any]:
    """The messages that both answers begin with, their last ones excepted."""
    count = 0
    while count < min(len(chosen), len(rejected)) - 1 and chosen[count] == rejected[count]:
        count += 1
    return chosen[:count]


def _without_prompt(value: Any, prompt: Any) -> Any:
    """An answer given as a whole conversation, without the prompt it repeats."""
    if not isinstance(value, list) or len(value) < 2:
        return value
    if isinstance(prompt, list) and value[: len(prompt)] == prompt:
        return value[len(prompt) :]
    if isinstance(prompt, str) and isinstance(value[0], dict) and value[0].get("content", value[0].get("value")) == prompt:
        return value[1:]
    return value


def _finished_prompt(record: Mapping[str, Any], value: Any, media: RecordMedia) -> tuple[list[Turn], str | None]:
    turns = with_system(record, [*_pair_turns(_history(record), media), *_prompt_turns(value, media)])
    media.finish(turns, in_front=True)
    turns, note = checked_order(turns)
    if turns[-1].role != "user":
        raise BadRow("bad_order", "the prompt of a preference row ends with a turn of the assistant")
    return turns, note


def _json_object(text: str) -> dict[str, Any]:
    if not text.lstrip().startswith("{"):
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _sample(record: Mapping[str, Any], turns: list[Turn], media: RecordMedia, in_front: bool) -> Sample:
    unwanted = [name for name in ("kto_tag", *(["label"] if in_front else [])) if record.get(name) is False]  # TRL's and SWIFT's `label`, LLaMA-Factory's tag
    if unwanted:
        raise BadRow("unwanted_answer", f"`{unwanted[0]}` is false: the answer is an example of what not to say")
    media.finish(turns, in_front)
    if any(isinstance(part, Video) and turn.role != "user" for turn in turns for part in turn.parts):
        raise BadRow("image_outside_user_turn", "a video stands outside the user's turns")
    turns, note = checked_order(turns)
    if turns[-1].role != "assistant":
        raise BadRow("no_answer", "the row ends without an answer")
    if not any(turn.text.strip() for turn in turns if turn.role == "assistant"):
        raise BadRow("empty_answer", "every answer is empty")
    identifier, metadata = identity(record)
    return Sample(tuple(turns), identifier, metadata, note)
