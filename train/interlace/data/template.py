"""`Sample` -> `input_ids` and labels, together, from one function; and the Jinja template that renders the same ids.

ChatML as LLaVA-NeXT-Interleave is trained and evaluated with, system prompt included. Text between control tokens is tokenized as one piece, as a
tokenizer does with the rendered template; the header of an answer (`assistant` and a newline) is a piece of its own, so that the prompt of
generation is a prefix of the training ids. For the same reason an answer's leading white space is left out when it holds a line break, which
would merge with the header's; other leading white space stays.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from interlace.data.sample import BadRow, Image, PreferencePair, Sample, Text, Turn

IGNORE_INDEX = -100
DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant."
LabelPolicy = Literal["assistant", "llava_next", "last_turn"]

_JINJA = """
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


@dataclass(frozen=True, slots=True)
class Encoded:
    """A row as ids; an image is one `image_token_id`, to be expanded when it is collated.

    `input_ids`, `labels` (-100 where unsupervised, not shifted), `weights` (of each label) are (length,) arrays; `num_images` counts image tokens;
    `answer_starts` are the positions where each answer begins, `exchange_ends` those behind it, where whole turns may be cut off. In a preference
    pair `leaf_starts` are the positions where the chosen and the rejected answer begin: both follow the prompt before them, which is empty when each
    answer brings its own.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    num_images: int
    exchange_ends: tuple[int, ...] = ()
    answer_starts: tuple[int, ...] = ()
    leaf_starts: tuple[int, ...] = ()


class ChatTemplate:
    """Writes conversations in ChatML for one tokenizer.

    Args:
        tokenizer: must know `<|im_start|>` and `<|im_end|>` as single tokens.
        image_token_id: the id that stands for an image.
        system_prompt: for rows without one; "" for none.
        label_policy: which tokens are supervised.

    Raises:
        ValueError: the tokenizer has no ChatML tokens.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, image_token_id: int, system_prompt: str = DEFAULT_SYSTEM_PROMPT, label_policy: LabelPolicy = "assistant"
    ):
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in ("<|im_start|>", "<|im_end|>") if token not in vocabulary]
        if missing:
            raise ValueError(f"the tokenizer has no {' and no '.join(missing)}; prompt_style chatml needs both")
        self.tokenizer, self.image_token_id = tokenizer, image_token_id
        self.system_prompt, self.label_policy = system_prompt, label_policy
        self.start, self.end = vocabulary["<|im_start|>"], vocabulary["<|im_end|>"]
        self.control = frozenset([self.start, self.end, image_token_id, *tokenizer.all_special_ids])
        self._known: dict[str, list[int]] = {}  # headers, system prompts and questions come again and again
        self.newline = self.text_ids("\n")

    def text_ids(self, text: str) -> list[int]:
        """Ids of plain text; control tokens written in it stay text.

        Raises:
            BadRow: the tokenizer makes a control token of it all the same.
        """
        if text not in self._known:
            if len(self._known) >= 10_000:
                self._known.clear()
            self._known[text] = self._tokenize(text)
        return list(self._known[text])

    def _tokenize(self, text: str) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow("bad_text", f"the text holds half a character at position {error.start}") from None
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] if text else []
        forged = self.control.intersection(ids)
        if forged:
            raise BadRow("control_token", f"the text holds {self.tokenizer.convert_ids_to_tokens(sorted(forged))}, which this tokenizer cannot take as text")
        return ids

    def encode(self, sample: Sample) -> Encoded:
        """Ids, labels and weights of a whole row; each of its images is one token, and its videos have become images before.

        Raises:
            BadRow: a control token in the text, or nothing supervised.
        """
        ids: list[int] = []
        labels: list[int] = []
        weights: list[float] = []
        starts, ends = [], []
        turns = self._with_system(sample.turns)
        last = max(i for i, turn in enumerate(turns) if turn.role == "assistant")
        for i, turn in enumerate(turns):
            header, body, tail = self._pieces(turn)
            piece = [*header, *body, *tail]
            supervised = turn.role == "assistant" and turn.weight > 0 and (self.label_policy != "last_turn" or i == last)
            ids += piece
            labels += self._labels(header, body, tail, supervised)
            weights += [turn.weight if turn.role == "assistant" and turn.weight > 0 else 1.0] * len(piece)
            if turn.role == "assistant":
                ends.append(len(ids))
                starts.append(len(ids) - len(body) - len(tail))
        if all(label == IGNORE_INDEX for label in labels[1:]):
            raise BadRow("nothing_supervised", "no token of this row would be learned: check `loss` and label_policy")
        return _encoded(ids, labels, weights, self.image_token_id, tuple(ends), tuple(starts))

    def encode_pair(self, pair: PreferencePair) -> Encoded:
        """Prompt, chosen and rejected answer one behind the other; the answers and their `<|im_end|>` are supervised.

        Raises:
            BadRow: a control token in the text.
        """
        prompt = self.encode_prompt(pair.prompt)
        answers = [[*self.text_ids(trim_answer(turn.text)), self.end] for turn in (pair.chosen, pair.rejected)]
        own = [[], []] if pair.rejected_prompt is None else [prompt, self.encode_prompt(pair.rejected_prompt)]
        ids, labels = (prompt, [IGNORE_INDEX] * len(prompt)) if pair.rejected_prompt is None else ([], [])
        starts = []
        for before, answer in zip(own, answers, strict=True):
            starts.append(len(ids))
            ids, labels = [*ids, *before, *answer], [*labels, *[IGNORE_INDEX] * len(before), *answer]
        return _encoded(ids, labels, [1.0] * len(ids), self.image_token_id, leaf_starts=tuple(starts))

    def encode_prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Ids up to where the next answer begins; the same ids that `encode` puts before that answer."""
        ids = [token for turn in self._with_system(turns) for piece in self._pieces(turn) for token in piece]
        return [*ids, self.start, *self.text_ids("assistant\n")]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that decides the ids and labels of a conversation."""
        settings = [self.system_prompt, self.label_policy, str(self.image_token_id), _JINJA]
        return hashlib.sha256("\0".join([*settings, self.tokenizer.backend_tokenizer.to_str()]).encode()).hexdigest()  # type: ignore[attr-defined]

    def jinja(self) -> str:
        """The template to save with the model: renders every conversation to the ids of `encode`."""
        image_token = str(self.tokenizer.convert_ids_to_tokens(self.image_token_id))
        head = f"{{%- set default_system_prompt = {_quoted(self.system_prompt)} -%}}{{%- set image_token = {_quoted(image_token)} -%}}"
        return head + "".join(line for line in _JINJA.strip().split("\n"))

    def _with_system(self, turns: Iterable[Turn]) -> list[Turn]:
        turns = list(turns)
        if self.system_prompt and turns and turns[0].role != "system":
            turns.insert(0, Turn("system", (Text(self.system_prompt),)))
        return turns

    def _pieces(self, turn: Turn) -> tuple[list[int], list[int], list[int]]:
        """Header, body and tail (`<|im_end|>` and newline) of a turn; the header's text runs on into a body that is no answer."""
        if turn.role == "assistant":
            return [self.start, *self.text_ids("assistant\n")], self.text_ids(trim_answer(turn.text)), [self.end, *self.newline]
        body: list[int] = []
        run = f"{turn.role}\n"
        for part in turn.parts:
            if isinstance(part, Text):
                run += part.text
                continue
            assert isinstance(part, Image), "a video becomes images before it is written"
            body += [*self.text_ids(run), self.image_token_id]
            run = ""
        return [self.start], body + self.text_ids(run), [self.end, *self.newline]

    def _labels(self, header: list[int], body: list[int], tail: list[int], supervised: bool) -> list[int]:
        ids = [*header, *body, *tail]
        if self.label_policy != "llava_next":
            return [*[IGNORE_INDEX] * len(header), *body, self.end, *[IGNORE_INDEX] * len(self.newline)] if supervised else [IGNORE_INDEX] * len(ids)
        # LLaVA-NeXT llava/train/train.py, preprocess_qwen: whole answers, and every newline, <|im_start|> and <|im_end|> anywhere
        always = {self.start, self.end, *self.newline}
        return [token if supervised or token in always else IGNORE_INDEX for token in ids]


def _encoded(
    ids: list[int],
    labels: list[int],
    weights: list[float],
    image_token_id: int,
    ends: tuple[int, ...] = (),
    starts: tuple[int, ...] = (),
    leaf_starts: tuple[int, ...] = (),
) -> Encoded:
    arrays = np.array(ids, np.int32), np.array(labels, np.int32), np.array(weights, np.float32)
    return Encoded(*arrays, ids.count(image_token_id), ends, starts, leaf_starts)


def trim_answer(text: str) -> str:
    """An answer without its leading white space if that holds a line break, which would merge with the header's."""
    bare = text.lstrip()
    lead = text[: len(text) - len(bare)]
    return bare if "\n" in lead or "\r" in lead else text


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"'{escaped}'"
