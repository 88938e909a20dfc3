"""How turns are written: ChatML, Vicuna's "USER: .. ASSISTANT: ..", or a bare caption; each as ids, and as the Jinja template that other tools render.

ChatML is what LLaVA-NeXT-Interleave is trained and evaluated with, system prompt included. Text between control tokens is tokenized as one piece, as a
tokenizer does with the rendered template; the header of an answer (`assistant` and a newline) is a piece of its own, so that the prompt of generation is a
prefix of the training ids. For the same reason an answer's leading white space is left out when it holds a line break, which would merge with the header's;
other leading white space stays.

Vicuna and plain are written as LLaVA-1.5's own code writes them: what stands between two images is one text for SentencePiece, which begins it with a space.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, Protocol

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from interlace.data.sample import BadRow, Image, Text, Turn

StyleName = Literal["chatml", "vicuna_v1", "plain"]


class TextIds(Protocol):
    """Plain text -> ids; is_behind: it follows the end of an answer."""

    def __call__(self, text: str, is_behind: bool = False) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """Ids of one turn: what comes before its text, the text with its images, what comes behind."""

    header: list[int]
    body: list[int]
    tail: list[int]

    @property
    def ids(self) -> list[int]:
        """All of it."""
        return [*self.header, *self.body, *self.tail]


class Style(ABC):
    """One way of writing turns, for one tokenizer.

    Args:
        tokenizer: of the model. image_token_id: stands for an image. newline_after_image: a line break behind every image, as a token of its own.

    Raises:
        ValueError: the tokenizer does not go with this style.
    """

    name: StyleName
    default_system_prompt: str
    num_supervised: int  # how many tokens of an answer's tail are learned

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_token_id: int, newline_after_image: bool = False):
        self.tokenizer, self.image_token_id = tokenizer, image_token_id
        self.newline_after_image = newline_after_image
        self.trims_answers = True  # of white space that would merge with the header's

    @property
    @abstractmethod
    def end(self) -> int | None:
        """The id that ends an answer; None if nothing does."""

    @abstractmethod
    def write(self, turns: Sequence[Turn], text_ids: TextIds) -> list[Piece]:
        """Ids of each turn; text_ids: plain text -> ids. An answer's header and what comes before it do not depend on the answer.

        Raises:
            BadRow: the turns have no form in this style.
        """

    @abstractmethod
    def jinja(self, system_prompt: str, image_token: str) -> str:
        """The same as a Jinja template."""

    def tokenize(self, text: str, is_behind: bool = False) -> list[int]:
        """Ids of plain text; control tokens written in it stay text. is_behind: it follows the end of an answer."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    def control(self) -> list[int]:
        """Ids that no text may become."""
        return [self.image_token_id, *self.tokenizer.all_special_ids]


class ChatML(Style):
    """`<|im_start|>role`, a newline, the text, `<|im_end|>`, a newline."""

    name = "chatml"
    default_system_prompt = "You are a helpful assistant."
    num_supervised = 1

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_token_id: int, newline_after_image: bool = False):
        super().__init__(tokenizer, image_token_id, newline_after_image)
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in ("<|im_start|>", "<|im_end|>") if token not in vocabulary]
        if missing:
            raise ValueError(f"the tokenizer has no {' and no '.join(missing)}; prompt_style chatml needs both")
        self.start, self._end = vocabulary["<|im_start|>"], vocabulary["<|im_end|>"]
        self.newline = self.tokenize("\n")

    @property
    def end(self) -> int:
        return self._end

    def control(self) -> list[int]:
        return [self.start, self.end, *super().control()]

    def write(self, turns: Sequence[Turn], text_ids: TextIds) -> list[Piece]:
        """See `Style`; the header's text runs on into a body that is no answer."""
        return [self._piece(turn, text_ids) for turn in turns]

    def _piece(self, turn: Turn, text_ids: TextIds) -> Piece:
        tail = [self.end, *self.newline]
        if turn.role == "assistant" and (self.trims_answers or trim_answer(turn.text) == turn.text):
            return Piece([self.start, *text_ids("assistant\n")], text_ids(trim_answer(turn.text)), tail)
        return Piece([self.start], parts_ids(turn, text_ids, self.image_token_id, self.newline * self.newline_after_image, f"{turn.role}\n"), tail)

    def jinja(self, system_prompt: str, image_token: str) -> str:
        """See `Style`. Where an image's own newline meets one of the text, tokenizers make one token of the rendered two."""
        image = image_token + "\n" * self.newline_after_image
        head = f"{{%- set default_system_prompt = {_quoted(system_prompt)} -%}}{{%- set image_token = {_quoted(image)} -%}}"
        return head + "".join(_CHATML.strip().split("\n"))


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
        head = f"{{%- set default_system_prompt = {_quoted(system_prompt)} -%}}{{%- set image_token = {_quoted(image)} -%}}"
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
        images = [self.image_token_id for part in turns[0].parts if isinstance(part, Image)]
        return [Piece(self.beginning, images, []), Piece([], text_ids(f"{turns[1].text}\n"), [])]

    def jinja(self, system_prompt: str, image_token: str) -> str:
        """See `Style`."""
        return f"{{%- set image_token = {_quoted(image_token)} -%}}" + "".join(_PLAIN.strip().split("\n"))


STYLES: dict[StyleName, type[Style]] = {"chatml": ChatML, "vicuna_v1": Vicuna, "plain": Plain}


def parts_ids(
    turn: Turn, text_ids: TextIds, image_token_id: int, behind_image: list[int], start: str = "", end: str = "", first: Callable[[str], list[int]] | None = None
) -> list[int]:
    """Text and images of a turn in order.

    Args:
        behind_image: ids that follow every image. start, end: text before and behind, one piece with the turn's own. first: writes the first piece.
    """
    ids: list[int] = []
    run = start
    write: Callable[[str], list[int]] = first or text_ids
    for part in turn.parts:
        if isinstance(part, Text):
            run += part.text
            continue
        assert isinstance(part, Image), "a video becomes images before it is written"
        ids += [*write(run), image_token_id, *behind_image]
        run, write = "", text_ids
    return ids + write(run + end)


def trim_answer(text: str) -> str:
    """An answer without its leading white space if that holds a line break, which would merge with the header's."""
    bare = text.lstrip()
    lead = text[: len(text) - len(bare)]
    return bare if "\n" in lead or "\r" in lead else text


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"'{escaped}'"


_CHATML = """
{%- if messages[0]['role'] != 'system' and default_system_prompt -%}
{{- '<|im_start|>system\\n' + default_system_prompt + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{%- set parts = [{'type': 'text', 'text': message['content']}] -%}
{%- else -%}
{%- set parts = message['content'] -%}
{%- endif -%}
{%- if message['role'] == 'assistant' -%}
{%- set answer = namespace(text='') -%}
{%- for part in parts -%}{%- set answer.text = answer.text + part['text'] -%}{%- endfor -%}
{%- set bare = answer.text.lstrip() -%}
{%- set lead = answer.text[:answer.text|length - bare|length] -%}
{% generation %}
{{- bare if '\\n' in lead or '\\r' in lead else answer.text -}}
{{- '<|im_end|>' -}}
{% endgeneration %}
{%- else -%}
{%- for part in parts -%}
{{- image_token if part['type'] in ['image', 'image_url'] else part['text'] -}}
{%- endfor -%}
{{- '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

_VICUNA = """
{%- if messages[0]['role'] != 'system' and default_system_prompt -%}
{{- default_system_prompt + ' ' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set parts = [{'type': 'text', 'text': message['content']}] -%}
{%- else -%}
{%- set parts = message['content'] -%}
{%- endif -%}
{{- {'system': '', 'user': 'USER: ', 'assistant': 'ASSISTANT:'}[message['role']] -}}
{%- if message['role'] == 'assistant' -%}
{% generation %}
{%- for part in parts -%}{{- ' ' + part['text'] if part['text'] else '' -}}{%- endfor -%}
{{- eos_token -}}
{% endgeneration %}
{%- else -%}
{%- for part in parts -%}
{{- image_token if part['type'] in ['image', 'image_url'] else part['text'] -}}
{%- endfor -%}
{{- ' ' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'ASSISTANT:' -}}
{%- endif -%}
"""

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
