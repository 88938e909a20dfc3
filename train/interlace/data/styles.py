"""How turns are written, as ids and as the Jinja template that other tools render: what all styles have in common, and ChatML.

ChatML is what LLaVA-NeXT-Interleave is trained and evaluated with, system prompt included. Text between control tokens is tokenized as one piece, as a
tokenizer does with the rendered template; the header of an answer (`assistant` and a newline) is a piece of its own, so that the prompt of generation is a
prefix of the training ids. For the same reason an answer's leading white space is left out when it holds a line break, which would merge with the header's;
other leading white space stays.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from transformers import PreTrainedTokenizerBase

from interlace.data.sample import Image, Part, Text, Turn, Video

StyleName = Literal["chatml", "vicuna_v1", "mistral", "llama_3", "internvl", "plain", "smolvlm", "gemma", "written"]


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
    num_supervised: int | None  # how many tokens of an answer's tail are learned; None for all

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


def known_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int | None:
    """The id of a token, None if the tokenizer has none; to copy a vocabulary of 150,000 for that takes a tenth of a second."""
    number: Any = tokenizer.convert_tokens_to_ids(token)
    return number if number is not None and tokenizer.convert_ids_to_tokens(number) == token else None


class MarkedStyle(Style):
    """A style with a control token that starts and one that ends, and a line break behind the end.

    `tokens`: the two; `template`: its Jinja, a line each, to which `default_system_prompt` and `image_token` are told.
    """

    num_supervised = 1
    tokens: tuple[str, str]
    template: str

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_token_id: int, newline_after_image: bool = False):
        super().__init__(tokenizer, image_token_id, newline_after_image)
        found = [known_id(tokenizer, token) for token in self.tokens]
        missing = [token for token, number in zip(self.tokens, found, strict=True) if number is None]
        if missing:
            raise ValueError(f"the tokenizer has no {' and no '.join(missing)}; prompt_style {self.name} needs both")
        self.start, self._end = (number for number in found if number is not None)
        self.newline = self.tokenize("\n")

    @property
    def end(self) -> int:
        return self._end

    def control(self) -> list[int]:
        return [self.start, self.end, *super().control()]

    def jinja(self, system_prompt: str, image_token: str) -> str:
        """See `Style`. Where an image's own newline meets one of the text, tokenizers make one token of the rendered two."""
        image = image_token + "\n" * self.newline_after_image
        head = f"{{%- set default_system_prompt = {quoted(system_prompt)} -%}}{{%- set image_token = {quoted(image)} -%}}"
        return head + "".join(self.template.strip().split("\n"))


# Pieces of Jinja that the styles' templates share: a message's content as `parts`; an answer's text as `answer.text`, without leading white space as `bare`,
# which is written where `lead`, the white space, breaks a line (see `trim_answer`); a body of text and images, each where `IS_IMAGE`
PARTS = """{%- if message['content'] is string -%}
{%- set parts = [{'type': 'text', 'text': message['content']}] -%}
{%- else -%}
{%- set parts = message['content'] -%}
{%- endif -%}
"""
ANSWER = """{%- set answer = namespace(text='') -%}
{%- for part in parts -%}{%- set answer.text = answer.text + part['text'] -%}{%- endfor -%}
{%- set bare = answer.text.lstrip() -%}
{%- set lead = answer.text[:answer.text|length - bare|length] -%}
"""
IS_IMAGE = "part['type'] in ['image', 'image_url']"
BODY = f"""{{%- for part in parts -%}}
{{{{- image_token if {IS_IMAGE} else part['text'] -}}}}
{{%- endfor -%}}
"""

# The same with a line break behind every image, see `with_line_breaks`
LINED_BODY = f"""{{%- for part in parts -%}}
{{{{- image_token if {IS_IMAGE} else part['text'] -}}}}
{{%- if {IS_IMAGE} and not (loop.nextitem is defined and loop.nextitem['type'] == 'text' and loop.nextitem['text'].startswith('\\n')) -%}}
{{{{- '\\n' -}}}}
{{%- endif -%}}
{{%- endfor -%}}
"""

_CHATML = (
    """
{%- if messages[0]['role'] != 'system' and default_system_prompt -%}
{{- '<|im_start|>system\\n' + default_system_prompt + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
"""
    + PARTS
    + """{%- if message['role'] == 'assistant' -%}
"""
    + ANSWER
    + """{% generation %}
{{- bare if '\\n' in lead or '\\r' in lead else answer.text -}}
{{- '<|im_end|>' -}}
{% endgeneration %}
{%- else -%}
"""
    + BODY
    + """{{- '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
)


class ChatML(MarkedStyle):
    """`<|im_start|>role`, a newline, the text, `<|im_end|>`, a newline."""

    name: StyleName = "chatml"
    default_system_prompt = "You are a helpful assistant."
    tokens = ("<|im_start|>", "<|im_end|>")
    template = _CHATML

    def write(self, turns: Sequence[Turn], text_ids: TextIds) -> list[Piece]:
        """See `Style`; the header's text runs on into a body that is no answer."""
        return [self._piece(turn, text_ids) for turn in turns]

    def _piece(self, turn: Turn, text_ids: TextIds) -> Piece:
        tail = [self.end, *self.newline]
        if turn.role == "assistant" and (self.trims_answers or trim_answer(turn.text) == turn.text):
            return Piece([self.start, *text_ids("assistant\n")], text_ids(trim_answer(turn.text)), tail)
        return Piece([self.start], parts_ids(turn, text_ids, self.image_token_id, self.newline * self.newline_after_image, f"{turn.role}\n"), tail)


class LineBroken(Style):
    """A style with a line break behind every image, which is one text with what follows: as published chat templates write, but that a line break which the
    data has there already, as LLaVA's rows do, is not doubled."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_token_id: int, newline_after_image: bool = False):
        super().__init__(tokenizer, image_token_id, newline_after_image)
        if newline_after_image:
            raise ValueError(f"newline_after_image does not go with prompt_style {self.name}: it has a line break behind images already")


class InternVL(LineBroken, ChatML):
    """ChatML with a line break behind every image."""

    name = "internvl"
    default_system_prompt = ""
    template = _CHATML.replace(BODY, LINED_BODY)

    def write(self, turns: Sequence[Turn], text_ids: TextIds) -> list[Piece]:
        """See `Style`."""
        return super().write([with_line_breaks(turn) for turn in turns], text_ids)


def with_line_breaks(turn: Turn) -> Turn:
    """A turn with a line break behind every image that has none there."""
    parts: list[Part] = []
    for part, following in zip(turn.parts, (*turn.parts[1:], None), strict=True):
        has_one = isinstance(part, Text) or (isinstance(following, Text) and following.text.startswith("\n"))
        parts += [part] if has_one else [part, Text("\n")]
    return replace(turn, parts=tuple(parts))


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
        ids += [*write(run), *image_ids(part, image_token_id), *behind_image]
        run, write = "", text_ids
    return ids + write(run + end)


def image_ids(part: Part, image_token_id: int) -> list[int]:
    """An image is one token; a video that its model sees as one medium is one for each frame."""
    assert isinstance(part, Image) or (isinstance(part, Video) and part.frames), "a video has its frames before it is written"
    return [image_token_id] * (1 if isinstance(part, Image) else len(part.frames))


def trim_answer(text: str) -> str:
    """An answer without its leading white space if that holds a line break, which would merge with the header's."""
    bare = text.lstrip()
    lead = text[: len(text) - len(bare)]
    return bare if "\n" in lead or "\r" in lead else text


def quoted(text: str) -> str:
    """A text as a Jinja literal."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"'{escaped}'"
