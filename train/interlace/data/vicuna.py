"""LLaVA-1.5's forms, as its own code writes them: "USER: .. ASSISTANT: ..", and a bare caption.

What stands between two images is one text for SentencePiece, which begins it with a space.
"""

import json
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from interlace.data.sample import BadRow, Turn
from interlace.data.styles import BODY, PARTS, Piece, Style, TextIds, image_ids, parts_ids, quoted


class SentencePieceStyle(Style):
    """What LLaMA's tokenizers have in common, for styles that write text as LLaVA-1.5's own code does; other tokenizers are taken as they are."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_token_id: int, newline_after_image: bool = False):
        super().__init__(tokenizer, image_token_id, newline_after_image)
        self.beginning = [] if tokenizer.bos_token_id is None or not self._is_sentencepiece else [int(tokenizer.bos_token_id)]

    @cached_property
    def _backend(self) -> dict[str, Any]:
        return json.loads(self.tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined, no-any-return]

    @cached_property
    def _is_sentencepiece(self) -> bool:
        return "▁" in json.dumps([self._backend["pre_tokenizer"], self._backend["normalizer"]], ensure_ascii=False)

    @cached_property
    def begins_every_text(self) -> bool:
        """Whether the tokenizer puts a space before every text behind a control token (LLaMA's `legacy`), not only before the first."""
        return (self._backend["pre_tokenizer"] or {}).get("prepend_scheme", "always") == "always"

    @cached_property
    def _with_space(self) -> Tokenizer:
        return self._raw(prepends=True)

    @cached_property
    def _without_space(self) -> Tokenizer:
        return self._raw(prepends=self.begins_every_text)

    def _raw(self, prepends: bool) -> Tokenizer:
        """The bare model: no token of the text is a control token."""
        steps = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
        steps = [{"type": "Prepend", "prepend": "▁"}, *steps] if prepends else steps
        normalizer = {"type": "Sequence", "normalizers": steps}
        return Tokenizer.from_str(json.dumps({**self._backend, "added_tokens": [], "post_processor": None, "pre_tokenizer": None, "normalizer": normalizer}))

    def tokenize(self, text: str, is_behind: bool = False) -> list[int]:
        """See `Style`; a text that begins a row or follows an image begins with a space."""
        if not self._is_sentencepiece:
            return super().tokenize(text)
        return (self._without_space if is_behind else self._with_space).encode(text, add_special_tokens=False).ids


class Vicuna(SentencePieceStyle):
    """LLaVA-1.5 and 1.6 (vicuna): a sentence, then `USER: .. ASSISTANT: ..</s>`, again and again."""

    name = "vicuna_v1"
    default_system_prompt = "A chat between a curious user and an artificial intelligence assistant. "
    default_system_prompt += "The assistant gives helpful, detailed, and polite answers to the user's questions."
    num_supervised = 1

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_token_id: int, newline_after_image: bool = False):
        super().__init__(tokenizer, image_token_id, newline_after_image)
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos_token; prompt_style vicuna_v1 ends answers with it")
        self._end = int(tokenizer.eos_token_id)

    @property
    def end(self) -> int:
        return self._end

    def write(self, turns: Sequence[Turn], text_ids: TextIds) -> list[Piece]:
        """See `Style`. Question and `ASSISTANT:` are one text."""
        pieces: list[Piece] = []
        run, before = "", self.beginning  # text that a turn leaves to the one behind it, and ids
        for number, turn in enumerate(turns):
            if turn.role == "system" and (number or turn.media):
                raise BadRow("bad_system_turn", "prompt_style vicuna_v1 takes one system turn, the first, of text alone")
            if turn.role == "system":
                run = f"{turn.text} "
                pieces.append(Piece([], [], []))
                continue
            is_behind = bool(number) and turns[number - 1].role == "assistant"
            if turn.role == "user":
                is_asked = number + 1 < len(turns) and turns[number + 1].role == "assistant"
                newline = self.tokenize("\n", is_behind=True) * self.newline_after_image
                ends = (f"{run}USER: ", " ASSISTANT:" if is_asked else " ")
                body = parts_ids(turn, text_ids, self.image_token_id, newline, *ends, partial(text_ids, is_behind=is_behind))
                pieces.append(Piece(before, body, []))
            else:
                asked = bool(number) and turns[number - 1].role == "user"
                header = [] if asked else text_ids(f"{run}ASSISTANT:", is_behind)
                pieces.append(Piece([*before, *header], text_ids(turn.text), [self.end]))
            run, before = "", []
        return pieces

    def jinja(self, system_prompt: str, image_token: str) -> str:
        """See `Style`. Without bos, which processors add. Tokenizers that are not `legacy` put no space before the text behind an image, which the original
        code does."""
        image = image_token + "\n" * self.newline_after_image
        head = f"{{%- set default_system_prompt = {quoted(system_prompt)} -%}}{{%- set image_token = {quoted(image)} -%}}"
        return head + "".join(_VICUNA.strip().split("\n"))


class Plain(SentencePieceStyle):
    """Projector pre-training: the images, then the caption and a newline, all of which is learned; the question is left out."""

    name = "plain"
    default_system_prompt = ""
    num_supervised = 0

    @property
    def end(self) -> None:
        return None

    def write(self, turns: Sequence[Turn], text_ids: TextIds) -> list[Piece]:
        """See `Style`."""
        turns = [turn for turn in turns if turn.role != "system"]
        if [turn.role for turn in turns] != ["user", "assistant"] or not turns[0].media:
            raise BadRow("not_a_caption", "prompt_style plain takes rows of one question with images and one answer, the caption")
        images = [token for medium in turns[0].media for token in image_ids(medium, self.image_token_id)]
        return [Piece(self.beginning, images, []), Piece([], text_ids(f"{turns[1].text}\n"), [])]

    def jinja(self, system_prompt: str, image_token: str) -> str:
        """See `Style`."""
        return f"{{%- set image_token = {quoted(image_token)} -%}}" + "".join(_PLAIN.strip().split("\n"))


_VICUNA = (
    """
{%- if messages[0]['role'] != 'system' and default_system_prompt -%}
{{- default_system_prompt + ' ' -}}
{%- endif -%}
{%- for message in messages -%}
"""
    + PARTS
    + """{{- {'system': '', 'user': 'USER: ', 'assistant': 'ASSISTANT:'}[message['role']] -}}
{%- if message['role'] == 'assistant' -%}
{% generation %}
{%- for part in parts -%}{{- ' ' + part['text'] if part['text'] else '' -}}{%- endfor -%}
{{- eos_token -}}
{% endgeneration %}
{%- else -%}
"""
    + BODY
    + """{{- ' ' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'ASSISTANT:' -}}
{%- endif -%}
"""
)

_PLAIN = """
{%- for message in messages -%}
{%- if message['role'] == 'user' and message['content'] is not string -%}
{%- for part in message['content'] -%}{{- image_token if part['type'] in ['image', 'image_url'] else '' -}}{%- endfor -%}
{%- elif message['role'] == 'assistant' -%}
{% generation %}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}{%- for part in message['content'] -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{{- '\\n' -}}
{% endgeneration %}
{%- endif -%}
{%- endfor -%}
"""
