"""A form that the user wrote down: PaddleMIX's `chat_template.json`, `{"system": "..", "conversation": ["..{{user}}..", "..{{bot}}.."], "query": ".."}`."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from interlace.data.sample import BadRow, Text, Turn
from interlace.data.styles import Piece, TextIds, image_ids, quoted
from interlace.data.vicuna import SentencePieceStyle
from interlace.errors import InputError


def read_form(path: Path) -> dict[str, str]:
    """The texts of a form: `system`, and `user` and `bot` with `{{user}}` and `{{bot}}` in them.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    try:
        written: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"chat_template: {path} cannot be read: {error}") from None
    form = 'expected {"system": "..", "conversation": ["..{{user}}..", "..{{bot}}.."]}'
    turns = written.get("conversation") if isinstance(written, dict) else None
    system = written.get("system") if isinstance(written, dict) else None
    system = "".join(system) if isinstance(system, list) else system or ""
    if not isinstance(turns, list) or len(turns) != 2 or not all(isinstance(text, str) for text in (*turns, system)):
        raise InputError(f"chat_template: {path}: {form}")
    for text, name in zip(turns, ("user", "bot"), strict=True):
        if len(re.findall(r"\{\{\s*" + name + r"\s*\}\}", text)) != 1:
            raise InputError(f"chat_template: {path}: {text!r} holds no {{{{{name}}}}}, or more than one; {form}")
    if "{{" in system:
        raise InputError(f"chat_template: {path}: a system text with fields, {system!r}; write it out, or give rows system turns of their own")
    if turns[1].split("{{")[0].strip():
        raise InputError(f"chat_template: {path}: {turns[1]!r}: what stands before the answer belongs to the end of the user's text; {form}")
    return {"system": system, "user": turns[0], "bot": turns[1]}


def form_of(entries: Sequence[Mapping[str, Any]], prompt_style: str | None) -> dict[str, str] | None:
    """The form that the entries of a data set name as `chat_template`, the same for all: a model is asked in one form. None if they name none.

    Raises:
        InputError: they differ, or prompt_style says another one.
    """
    forms = [read_form(Path(entry["chat_template"])) if entry.get("chat_template") else None for entry in entries]
    if any(form != forms[0] for form in forms):
        raise InputError("dataset: chat_template must be the same in all entries of train and eval: a model is trained and asked in one form")
    if forms[0] and prompt_style:
        raise InputError(f"prompt_style {prompt_style} and chat_template: choose one")
    return forms[0]


class Written(SentencePieceStyle):
    """Texts as the form has them; the tokenizer's own tokens in the form are control tokens, in the rows' text they are not.

    Args:
        form: see `read_form`.
    """

    name = "written"
    num_supervised = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_token_id: int, newline_after_image: bool = False, form: dict[str, str] | None = None):
        assert form is not None
        super().__init__(tokenizer, image_token_id, newline_after_image)
        self.form, self.default_system_prompt = form, form["system"]
        tokens = {str(token): int(number) for number, token in tokenizer.added_tokens_decoder.items()}
        self._tokens = {token: number for token, number in tokens.items() if number != image_token_id}
        self._user, self._bot = (re.split(r"\{\{\s*\w+\s*\}\}", form[name]) for name in ("user", "bot"))
        self._end = next((part for part in self._split(self._bot[1]) if isinstance(part, int)), None)

    @property
    def end(self) -> int | None:
        return self._end

    def _split(self, text: str) -> list[str | int]:
        """Control tokens and the texts between them."""
        pattern = "|".join(map(re.escape, sorted(self._tokens, key=len, reverse=True)))
        parts = re.split(f"({pattern})", text) if pattern else [text]
        return [self._tokens.get(part, part) for part in parts if part]

    def write(self, turns: Sequence[Turn], text_ids: TextIds) -> list[Piece]:
        """See `Style`."""
        pieces: list[Piece] = []
        before = self.beginning
        system: list[str | int] = []
        for number, turn in enumerate(turns):
            if turn.role == "system":
                if number or turn.media:
                    raise BadRow("bad_system_turn", "this form takes one system turn, the first, of text alone")
                system = self._split(turn.text) if turn.text == self.form["system"] else [turn.text]
                pieces.append(Piece([], [], []))
                continue
            is_behind = bool(number) and turns[number - 1].role == "assistant"
            if turn.role == "user":
                parts = [*system, *self._split(self._user[0]), *self._parts(turn), *self._split(self._user[1])]
                pieces.append(Piece(before, self._ids(parts, text_ids, is_behind), []))
            else:
                written = [*system, *self._split(self._bot[0]), turn.text]
                pieces.append(Piece(before, self._ids(written, text_ids, is_behind), self._ids(self._split(self._bot[1]), text_ids, is_behind=True)))
            before, system = [], []
        return pieces

    def _parts(self, turn: Turn) -> list[str | int]:
        found: list[str | int] = []
        for part in turn.parts:
            found += [part.text] if isinstance(part, Text) else [*image_ids(part, self.image_token_id), *(["\n"] if self.newline_after_image else [])]
        return found

    def _ids(self, parts: Sequence[str | int], text_ids: TextIds, is_behind: bool) -> list[int]:
        """Ids of texts, joined where they meet, and of control tokens; a text behind an image begins as one that begins a row."""
        ids: list[int] = []
        run, write = "", partial(text_ids, is_behind=is_behind)
        for part in parts:
            if isinstance(part, str):
                run += part
                continue
            ids += [*write(run), part]
            run, write = "", partial(text_ids, is_behind=part != self.image_token_id)
        return ids + write(run)

    def jinja(self, system_prompt: str, image_token: str) -> str:
        """See `Style`."""
        user, bot = ([quoted(text) for text in pair] for pair in (self._user, self._bot))
        image = quoted(image_token + "\n" * self.newline_after_image)
        parts = "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}{%- for part in message['content'] -%}"
        parts += f"{{{{- {image} if part['type'] in ['image', 'image_url'] else part['text'] -}}}}{{%- endfor -%}}{{%- endif -%}}"
        return (
            f"{{%- if messages[0]['role'] != 'system' -%}}{{{{- {quoted(system_prompt)} -}}}}{{%- endif -%}}{{%- for message in messages -%}}"
            f"{{%- if message['role'] == 'user' -%}}{{{{- {user[0]} -}}}}{parts}{{{{- {user[1]} -}}}}"
            f"{{%- elif message['role'] == 'assistant' -%}}{{{{- {bot[0]} -}}}}{{% generation %}}{parts}{{{{- {bot[1]} -}}}}{{% endgeneration %}}"
            f"{{%- else -%}}{parts}{{%- endif -%}}{{%- endfor -%}}"
        )
