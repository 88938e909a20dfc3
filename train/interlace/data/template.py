"""`Sample` -> `input_ids` and labels, together, from one function; how turns are written is in `styles`."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from interlace.data.gemma import Gemma
from interlace.data.llama_3 import Llama3
from interlace.data.mistral import Mistral
from interlace.data.sample import BadRow, PreferencePair, Sample, Text, Turn, Video
from interlace.data.smolvlm import SmolVLM
from interlace.data.styles import IS_IMAGE, ChatML, InternVL, Piece, Style, StyleName, quoted
from interlace.data.vicuna import Plain, Vicuna
from interlace.data.written import Written

IGNORE_INDEX = -100
LabelPolicy = Literal["assistant", "llava_next", "last_turn"]
Placement = Literal["interleaved", "in_front", "mixed", "llava_next"]
STYLES: dict[StyleName, type[Style]] = {
    **{"chatml": ChatML, "vicuna_v1": Vicuna, "mistral": Mistral, "llama_3": Llama3},
    **{"internvl": InternVL, "smolvlm": SmolVLM, "gemma": Gemma, "plain": Plain},
}


@dataclass(frozen=True, slots=True)
class Encoded:
    """A row as ids; an image, or a frame of a video, is one `image_token_id`, to be expanded when it is collated.

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
    """Writes conversations for one tokenizer.

    Args:
        tokenizer: must know the control tokens of the style.
        image_token_id: the id that stands for an image.
        system_prompt: for rows without one; "" for none, None for the style's own.
        label_policy: which tokens are supervised.
        prompt_style: see `styles`.
        image_placement: where the images of a turn stand; see `placed`. image_placement_ratio: for `mixed`.
        newline_after_image: a line break, a token of its own, behind every image.
        form: see `read_form`; in place of a style.
        image_text: what the template to save writes for an image; None for the text of `image_token_id`.
        video_token_id: the id that stands for a video, of a model that sees it as one medium; None for one to which its frames are images.

    Raises:
        ValueError: the tokenizer does not go with the style.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_token_id: int,
        system_prompt: str | None = None,
        label_policy: LabelPolicy = "assistant",
        prompt_style: StyleName = "chatml",
        image_placement: Placement = "interleaved",
        image_placement_ratio: float = 0.5,
        newline_after_image: bool = False,
        form: dict[str, str] | None = None,
        image_text: str | None = None,
        video_token_id: int | None = None,
    ):
        self.tokenizer, self.image_token_id, self.label_policy = tokenizer, image_token_id, label_policy
        written = None if form is None else Written(tokenizer, image_token_id, newline_after_image, form)
        self.style: Style = written or STYLES[prompt_style](tokenizer, image_token_id, newline_after_image)
        self.form, self.image_text = form, image_text or str(tokenizer.convert_ids_to_tokens(image_token_id))
        self.style.trims_answers = label_policy != "llava_next"
        self.system_prompt = self.style.default_system_prompt if system_prompt is None else system_prompt
        self.image_placement, self.image_placement_ratio = image_placement, image_placement_ratio
        self.video_token_id = video_token_id
        self.control = frozenset([*self.style.control(), *([] if video_token_id is None else [video_token_id])])
        self._known: dict[tuple[str, bool], list[int]] = {}  # headers, system prompts and questions come again and again

    @property
    def end(self) -> int | None:
        """The id that ends an answer; None if the style has none."""
        return self.style.end

    @property
    def video_text(self) -> str | None:
        """The text of `video_token_id`; None where there is none."""
        found: Any = None if self.video_token_id is None else self.tokenizer.convert_ids_to_tokens(self.video_token_id)
        return found  # type: ignore[no-any-return]

    @property
    def settings(self) -> dict[str, Any]:
        """What a model must be asked in, as it was trained: the arguments of this class that decide about prompts."""
        names = ["system_prompt", "image_placement", "image_placement_ratio", *(["form"] if self.form else [])]
        return {
            "prompt_style": self.style.name,
            **{name: getattr(self, name) for name in names},
            "newline_after_image": self.style.newline_after_image,
        }

    def text_ids(self, text: str, is_behind: bool = False) -> list[int]:
        """Ids of plain text; control tokens written in it stay text. is_behind: it follows the end of an answer.

        Raises:
            BadRow: the tokenizer makes a control token of it all the same.
        """
        if (text, is_behind) not in self._known:
            if len(self._known) >= 10_000:
                self._known.clear()
            self._known[text, is_behind] = self._tokenize(text, is_behind)
        return list(self._known[text, is_behind])

    def _tokenize(self, text: str, is_behind: bool) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow("bad_text", f"the text holds half a character at position {error.start}") from None
        ids = self.style.tokenize(text, is_behind) if text else []
        forged = self.control.intersection(ids)
        if forged:
            raise BadRow("control_token", f"the text holds {self.tokenizer.convert_ids_to_tokens(sorted(forged))}, which this tokenizer cannot take as text")
        return ids

    def encode(self, sample: Sample) -> Encoded:
        """Ids, labels and weights of a whole row; each of its images is one token, and each frame of its videos, which must be in them.

        Raises:
            BadRow: a control token in the text, turns that have no form in the style, or nothing supervised.
        """
        ids: list[int] = []
        labels: list[int] = []
        weights: list[float] = []
        starts, ends = [], []
        turns = self._prepared(sample.turns)
        last = max(i for i, turn in enumerate(turns) if turn.role == "assistant")
        for i, (turn, piece) in enumerate(zip(turns, self.style.write(turns, self.text_ids), strict=True)):
            supervised = turn.role == "assistant" and turn.weight > 0 and (self.label_policy != "last_turn" or i == last)
            ids += piece.ids
            labels += self._labels(piece, supervised)
            weights += [turn.weight if turn.role == "assistant" and turn.weight > 0 else 1.0] * len(piece.ids)
            if turn.role == "assistant":
                ends.append(len(ids))
                starts.append(len(ids) - len(piece.body) - len(piece.tail))
        if all(label == IGNORE_INDEX for label in labels[1:]):
            raise BadRow("nothing_supervised", "no token of this row would be learned: check `loss` and label_policy")
        return _encoded(ids, labels, weights, self.image_token_id, tuple(ends), tuple(starts))

    def encode_pair(self, pair: PreferencePair) -> Encoded:
        """Prompt, chosen and rejected answer one behind the other; the answers and what ends them are supervised.

        Raises:
            BadRow: a control token in the text, turns that have no form in the style, or two equal answers.
        """
        prompt = self.encode_prompt(pair.prompt)
        answers = [self._answer_ids(pair.prompt, pair.chosen), self._answer_ids(pair.rejected_prompt or pair.prompt, pair.rejected)]
        if answers[0] == answers[1] and pair.rejected_prompt is None:
            raise BadRow("equal_answers", "the chosen and the rejected answer are the same tokens on the same images: there is nothing to prefer")
        own = [[], []] if pair.rejected_prompt is None else [prompt, self.encode_prompt(pair.rejected_prompt)]
        ids, labels = (prompt, [IGNORE_INDEX] * len(prompt)) if pair.rejected_prompt is None else ([], [])
        starts = []
        for before, answer in zip(own, answers, strict=True):
            starts.append(len(ids))
            ids, labels = [*ids, *before, *answer], [*labels, *[IGNORE_INDEX] * len(before), *answer]
        return _encoded(ids, labels, [1.0] * len(ids), self.image_token_id, leaf_starts=tuple(starts))

    def with_answer(self, encoded: Encoded, answer: Turn) -> Encoded:
        """A row with another answer in the place of its last one, which alone is supervised.

        Raises:
            BadRow: a control token in the text.
        """
        prompt = encoded.input_ids[: encoded.answer_starts[-1]].tolist()
        found = self._answer_ids((Turn("user", (Text("?"),)),), answer)
        ids, labels = [*prompt, *found], [*[IGNORE_INDEX] * len(prompt), *found]
        return _encoded(ids, labels, [1.0] * len(ids), self.image_token_id, (len(ids),), encoded.answer_starts[-1:])

    def _answer_ids(self, prompt: Sequence[Turn], answer: Turn) -> list[int]:
        piece = self.style.write(self._prepared([*prompt, answer]), self.text_ids)[-1]
        return [*piece.body, *piece.tail[: self.style.num_supervised]]

    def encode_prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Ids up to where the next answer begins; the same ids that `encode` puts before that answer.

        Raises:
            BadRow: see `encode`.
        """
        *before, answer = self.style.write(self._prepared([*turns, Turn("assistant", (Text(""),))]), self.text_ids)
        return [token for piece in before for token in piece.ids] + answer.header

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that decides the ids and labels of a conversation."""
        settings = [repr(self.settings), self.label_policy, str(self.image_token_id), self.jinja()]
        return hashlib.sha256("\0".join([*settings, self.tokenizer.backend_tokenizer.to_str()]).encode()).hexdigest()  # type: ignore[attr-defined]

    def jinja(self) -> str:
        """The template to save with the model: renders every conversation to the ids of `encode`, images where the messages have them."""
        template = self.style.jinja(self.system_prompt, self.image_text)
        if self.video_text is None:
            return template
        video = quoted(self.video_text + "\n" * self.style.newline_after_image)
        return template.replace(f"{IS_IMAGE} else ", f"{IS_IMAGE} else {video} if part['type'] == 'video' else ")

    def _prepared(self, turns: Iterable[Turn]) -> list[Turn]:
        """With a system turn, and images where they are to stand; videos as their frames, unless the model sees them as one medium."""
        turns = list(turns) if self.video_token_id is not None else [_in_frames(turn) for turn in turns]
        if self.image_placement != "interleaved":
            placement = self._placement_of(turns)
            turns = [placed(turn, placement) for turn in turns]
        if self.system_prompt and turns and turns[0].role != "system":
            turns.insert(0, Turn("system", (Text(self.system_prompt),)))
        return turns

    def _labels(self, piece: Piece, supervised: bool) -> list[int]:
        if self.label_policy != "llava_next" or not isinstance(self.style, ChatML):
            learned = [*piece.body, *piece.tail[: self.style.num_supervised]]
            rest = len(piece.body) + len(piece.tail) - len(learned)
            return [*[IGNORE_INDEX] * len(piece.header), *learned, *[IGNORE_INDEX] * rest] if supervised else [IGNORE_INDEX] * len(piece.ids)
        # LLaVA-NeXT llava/train/train.py, preprocess_qwen: whole answers, and every newline, <|im_start|> and <|im_end|> anywhere
        always = {self.style.start, self.style.end, *self.style.newline}
        return [token if supervised or token in always else IGNORE_INDEX for token in piece.ids]

    def _placement_of(self, turns: Sequence[Turn]) -> Placement:
        """`mixed` draws a row's form from its first question, which a prompt and the row that it begins have in common: the same in every run."""
        if self.image_placement != "mixed":
            return self.image_placement
        first = next((turn.parts for turn in turns if turn.role == "user"), ())
        content = "\0".join(part.text if isinstance(part, Text) else part.path for part in first)
        share = int.from_bytes(hashlib.sha256(content.encode("utf-8", "replace")).digest()[:8]) / 2**64
        return "in_front" if share < self.image_placement_ratio else "interleaved"


def _in_frames(turn: Turn) -> Turn:
    """A turn whose videos have become images."""
    return replace(turn, parts=tuple(one for part in turn.parts for one in ((part.frames or (part,)) if isinstance(part, Video) else (part,))))


def placed(turn: Turn, placement: Placement) -> Turn:
    """A turn with its images (and videos that are one medium) where they are to stand.

    interleaved: where they are. in_front: before its text, each on a line of its own. llava_next: LLaVA-NeXT's rule (llava/train/train.py,
    preprocess_multimodal): an only image that does not begin its turn goes to the front.
    """
    images = turn.media
    if placement == "interleaved" or not images or (placement == "llava_next" and (len(images) > 1 or turn.parts[0] is images[0])):
        return turn
    parts = [part for image in images for part in (image, Text("\n"))]
    text = turn.text.strip()
    return replace(turn, parts=(*parts, Text(text)) if text else tuple(parts[:-1]))


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
