"""A dialogue with images and videos at their places: each turn costs what is new in it."""

import json
import re
from collections.abc import Generator as Stream
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from interlace.data.download import is_url
from interlace.data.sample import BadRow, Image, Part, Text, Turn, Video, media_of, with_frames
from interlace.errors import InputError
from interlace.inference.attaching import Attachments, Frame
from interlace.inference.context import Context, Token
from interlace.inference.generation import Generator
from interlace.inference.sampling import Sampling

_PLACEHOLDER = re.compile("(<image>|<video>)")
Parts = tuple[Part, ...]


class ContextFull(InputError):
    """A question does not fit behind the turns so far; `length` counts the tokens with it, `most` those that the model takes with the answer."""

    def __init__(self, length: int, sampling: Sampling, most: int):
        super().__init__(
            f"the context is full: with this question the dialogue has {length} tokens and its answer may have {sampling.max_new_tokens} (max_new_tokens), "
            f"the model takes {most}; ask with fewer images, or /drop the oldest questions, or /clear"
        )
        self.length, self.most = length, most


class NoMemory(InputError):
    """The device has no memory for a question."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What an answer took, in tokens: of the conversation before it; those of them that had been read in an earlier turn; its own, with the one that ends
    it. `is_cut`: it ended at `max_new_tokens`."""

    prompt: int = 0
    kept: int = 0
    answer: int = 0
    is_cut: bool = False


class Dialogue:
    """The turns so far, what waits for the next question, and what the model remembers of it all.

    Whatever goes wrong in a turn, the dialogue stays as it was before it.

    Args:
        generator: answers.
        sampling: how answers are drawn; a number is `max_new_tokens` of greedy ones.
        attachments: finds media; None for one with the defaults.
        without_adapter: asks the model under the adapter.
    """

    def __init__(self, generator: Generator, sampling: Sampling | int | None = None, attachments: Attachments | None = None, without_adapter: bool = False):
        self.generator = generator
        self.sampling = Sampling(sampling) if isinstance(sampling, int) else sampling or Sampling()
        self.attachments = attachments or Attachments()
        self.context = Context(generator, without_adapter)
        self.turns: list[Turn] = []  # questions and answers by turns
        self.frames: list[tuple[Frame, ...]] = []  # of each medium in them
        self.waiting: list[Image | Video] = []
        self.system = ""
        self.usage = Usage()  # of the last answer, as far as it has come

    def attach(self, names: Iterable[str]) -> None:
        """Images for the next question: paths, patterns, URLs.

        Raises:
            InputError: one that is no readable image; nothing is attached then.
        """
        self.waiting += self.attachments.images(names)

    def attach_videos(self, names: Iterable[str]) -> None:
        """Videos for the next question: files, folders of frames, patterns, URLs.

        Raises:
            InputError: one that is no readable video; nothing is attached then.
        """
        self.waiting += self.attachments.videos(names)

    def clear(self) -> None:
        """Forgets turns, waiting media, and what was made of them; the system prompt stays."""
        self.turns, self.frames, self.waiting = [], [], []
        self.context.clear()

    def set_system(self, text: str) -> None:
        """Another system prompt, for the turns so far too; "" for the model's own.

        Raises:
            InputError: the model's prompt has no place for one, or the text cannot be taken.
        """
        try:
            if text:
                self.generator.processing.template.encode_prompt([Turn("system", (Text(text),)), Turn("user", (Text("?"),))])
        except BadRow as error:
            raise InputError(error.detail) from None
        if _PLACEHOLDER.search(text):
            raise InputError("images and videos belong into questions; the system prompt holds a placeholder for one")
        self.system = text

    def go_on_from(self, turns: Sequence[Turn]) -> None:
        """Takes a conversation that somebody else has kept: a system prompt or none, then questions with their answers. What it has in common with what was
        read last is not read again.

        Raises:
            InputError: a medium cannot be found, or the system prompt cannot be taken; nothing has changed then.
        """
        rest = list(turns[1:] if turns and turns[0].role == "system" else turns)
        assert [turn.role for turn in rest] == ["user", "assistant"] * (len(rest) // 2)
        try:
            frames = [self.attachments.frames(item) for item in media_of(rest)]
        except BadRow as error:
            raise InputError(error.detail) from None
        self.set_system(turns[0].text if len(rest) < len(turns) else "")
        self.turns, self.frames = rest, frames

    def undo(self) -> Parts:
        """Takes the last question and its answer back; the question's parts.

        Raises:
            InputError: there is none.
        """
        if not self.turns:
            raise InputError("nothing has been asked yet")
        *self.turns, question, _ = self.turns
        self.frames = self.frames[: len(media_of(self.turns))]
        return question.parts

    def drop_oldest(self, count: int) -> None:
        """Forgets the oldest questions and their answers.

        Raises:
            InputError: there are not so many.
        """
        if not 1 <= count <= len(self.turns) // 2:
            raise InputError(f"expected a number from 1 to {len(self.turns) // 2}, of questions to forget; got {count}")
        self.frames = self.frames[len(media_of(self.turns[: 2 * count])) :]
        self.turns = self.turns[2 * count :]

    def parts(self, question: str) -> Parts:
        """A question with the waiting media where `<image>` and `<video>` stand in it, or in front of it, each on a line of its own.

        Raises:
            InputError: as many placeholders as media are needed, or none.
        """
        pieces = [piece for piece in _PLACEHOLDER.split(question) if piece]
        waiting: dict[str, list[Image | Video]] = {
            "<image>": [item for item in self.waiting if isinstance(item, Image)],
            "<video>": [item for item in self.waiting if isinstance(item, Video)],
        }
        if not set(pieces) & set(waiting):
            front = [part for item in self.waiting for part in (item, Text("\n"))]
            return (*front, Text(question))
        for name, items in waiting.items():
            if pieces.count(name) != len(items):
                raise InputError(f"{pieces.count(name)} {name} in the question, {len(items)} {name[1:-1]}s attached; write one for each, or none")
        return tuple(waiting[piece].pop(0) if piece in waiting else Text(piece) for piece in pieces)

    def ask(self, question: str | Sequence[Part]) -> str:
        """The whole answer; see `stream`."""
        return "".join(self.stream(question))

    def stream(self, question: str | Sequence[Part]) -> Stream[str, None, None]:
        """Yields the answer to a question piece by piece. Closing the iterator, or an exception while it runs (Ctrl-C), stops it; what was said is kept.

        Args:
            question: a text, see `parts`; or the parts themselves, with media that need not have been attached.

        Raises:
            InputError: at the first piece: a medium cannot be opened, the text cannot be taken, or the context is full.
        """
        with closing(self.steps(question)) as steps:
            yield from filter(None, steps)

    def steps(self, question: str | Sequence[Part]) -> Stream[str, None, None]:
        """The same with a piece for every token, which is empty where the token shows nothing yet: whoever takes them can stop behind any token."""
        turn = Turn("user", self.parts(question) if isinstance(question, str) else tuple(question))
        frames, sampling, answer, is_whole = self.frames, self.sampling, "", False
        self.usage = Usage()
        try:
            frames = [*frames, *(self.attachments.frames(item) for item in turn.media)]
            tokens = self._tokens([*self.turns, turn], frames)
            self._check_room(len(tokens), sampling)
            for text in self._texts(tokens, sampling):
                piece, answer = text[len(answer) :], text
                yield piece
            is_whole = True
        except BadRow as error:
            raise InputError(error.detail) from None
        except torch.OutOfMemoryError:
            raise NoMemory("the device has no memory for this question; fewer images or frames, /drop or /clear make room") from None
        finally:
            if is_whole or answer:
                self.turns += [turn, Turn("assistant", (Text(answer),))]
                self.frames = frames
                self.waiting = [] if isinstance(question, str) else self.waiting

    def retry(self) -> Stream[str, None, None]:
        """Streams another answer to the last question. If nothing comes of it, the old one stays.

        Raises:
            InputError: see `undo` and `stream`.
        """
        before = list(self.turns), list(self.frames)
        question = self.undo()
        try:
            yield from self.stream(question)
        finally:
            if len(self.turns) < len(before[0]):
                self.turns, self.frames = before

    def _tokens(self, turns: Sequence[Turn], frames: Sequence[tuple[Frame, ...]]) -> list[Token]:
        """A conversation up to where the next answer begins; a video is its frames, as in training."""
        if self.system:
            turns = [Turn("system", (Text(self.system),)), *turns]
        ids = self.generator.processing.template.encode_prompt(with_frames(turns, map(len, frames)))
        return self.context.spelt(ids, frames, [isinstance(item, Video) for item in media_of(turns)])

    def _check_room(self, length: int, sampling: Sampling) -> None:
        most: int = self.context.config.get_text_config().max_position_embeddings
        if length + sampling.max_new_tokens > most:
            raise ContextFull(length, sampling, most)

    def _texts(self, tokens: Sequence[Token], sampling: Sampling) -> Iterator[str]:
        """The answer so far, after each of its tokens; the last one is whole."""
        tokenizer, end = self.generator.processing.tokenizer, self.generator.processing.template.end
        end = tokenizer.eos_token_id if end is None else end
        draw = _Draw(sampling, [token for token, _ in tokens], self.generator.device)
        answer: list[int] = []
        shown, logits = "", self.context.read(tokens)
        self.usage = Usage(len(tokens), self.context.num_kept)
        while len(answer) < sampling.max_new_tokens:
            token = draw(logits, answer)
            self.usage = replace(self.usage, answer=len(answer) + 1, is_cut=token != end and len(answer) + 1 == sampling.max_new_tokens)
            if token == end:
                break
            answer.append(token)
            text = str(tokenizer.decode(answer, skip_special_tokens=True)).strip()
            if text.startswith(shown) and not text.endswith("\ufffd"):  # half a character waits for its other half
                shown = text
            yield shown
            if len(answer) < sampling.max_new_tokens:
                logits = self.context.follow(token)
        text = str(tokenizer.decode(answer, skip_special_tokens=True)).strip()
        if text.startswith(shown) and len(text) > len(shown):
            yield text

    def record(self) -> dict[str, Any]:
        """The dialogue as a row of LLaVA's format, which training, evaluation and the preview read; paths are absolute.

        Raises:
            InputError: nothing was asked, or it has no form there.
        """
        if not self.turns:
            raise InputError("nothing has been asked yet")
        media = media_of(self.turns)
        if any(item.data is not None or (isinstance(item, Video) and item.frames) for item in media):
            raise InputError("media that were handed over as bytes or frames lie in no file that a row could name")
        if any(_PLACEHOLDER.search(part.text) for turn in self.turns if turn.role == "user" for part in turn.parts if isinstance(part, Text)):
            raise InputError("a question holds the text <image> or <video>, which a row would take for a medium's place")
        names = {"user": "human", "assistant": "gpt"}
        turns = [{"from": "system", "value": self.system}] if self.system else []
        turns += [{"from": names[turn.role], "value": "".join(_written(part) for part in turn.parts)} for turn in self.turns]
        lists = {kind: [_absolute(item.path) for item in media if isinstance(item, of)] for kind, of in (("image", Image), ("video", Video))}
        return {"id": "dialogue", **{kind: paths for kind, paths in lists.items() if paths}, "conversations": turns}


def save(dialogues: Sequence[Dialogue], file: Path) -> None:
    """Writes dialogues as a data file of so many rows.

    Raises:
        InputError: the file is there already, cannot be written, or see `Dialogue.record`.
    """
    records = [dialogue.record() for dialogue in dialogues]
    try:
        with file.open("x", encoding="utf-8") as output:
            json.dump(records, output, ensure_ascii=False, indent=1)
            output.write("\n")
    except FileExistsError:
        raise InputError(f"{file} is there already; give another name") from None
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror}") from None


def _written(part: Part) -> str:
    return part.text if isinstance(part, Text) else "<image>" if isinstance(part, Image) else "<video>"


def _absolute(path: str) -> str:
    return path if is_url(path) else str(Path(path).resolve())


class _Draw:
    """The next token from logits, by transformers' own rules for sampling, in the order of `generate`."""

    def __init__(self, sampling: Sampling, prompt: list[int], device: torch.device):
        self.prompt, self.device, self.is_greedy = prompt, device, sampling.temperature == 0
        self.random = torch.Generator(device)
        if sampling.seed is None:
            self.random.seed()
        else:
            self.random.manual_seed(sampling.seed)
        rules: list[Any] = [RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))] if sampling.repetition_penalty != 1 else []
        if not self.is_greedy:
            rules += [TemperatureLogitsWarper(float(sampling.temperature))] if sampling.temperature != 1 else []
            rules += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
            rules += [TopPLogitsWarper(float(sampling.top_p))] if sampling.top_p < 1 else []
        self.rules = LogitsProcessorList(rules)

    def __call__(self, logits: torch.Tensor, answer: list[int]) -> int:
        scores = logits[None]
        if self.rules:
            scores = self.rules(torch.tensor([[*self.prompt, *answer]], device=self.device), scores)  # type: ignore[arg-type]
        if self.is_greedy:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self.random))
