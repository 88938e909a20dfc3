"""The conversations of one model with whoever asks. Each request brings its whole conversation; what was read of it before is found again."""

from collections.abc import Generator as Stream
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from interlace.data.sample import BadRow, Image, Text, Turn, Video, media_of
from interlace.errors import InputError
from interlace.inference.attaching import Attachments, Frame
from interlace.inference.dialogue import Dialogue, NoMemory, Usage
from interlace.inference.endpoint import Asked, Held
from interlace.inference.generation import Generator

MOST_PIXELS = 50_000_000  # of an image, as in training


class Uploads(Attachments):
    """Media that come as bytes, and only so: each lies in a file of a folder of our own while a conversation needs it, named by its content."""

    def __init__(self, num_frames: int = 16, video_fps: float | None = None):
        super().__init__(num_frames, video_fps, MOST_PIXELS)
        self._known: dict[Image | Video, tuple[Frame, ...]] = {}

    def keep(self, item: Image | Video) -> Image | Video:
        """The same medium as a file."""
        assert item.data is not None  # a path or an address from outside is never opened
        path = self._kept.keep(item.data).path
        return Image(path) if isinstance(item, Image) else Video(path)

    def frames(self, item: Image | Video) -> tuple[Frame, ...]:
        """See `Attachments`; looked at once."""
        if item not in self._known:
            self._known[item] = super().frames(item)
        return self._known[item]

    def forget_others(self, items: set[Image | Video]) -> None:
        """Deletes all but these."""
        paths = {item.path for item in items}
        self._known = {item: frames for item, frames in self._known.items() if item in items}
        for file in Path(self._folder.name).glob("*/*"):
            if str(file) not in paths:
                file.unlink()


@dataclass(frozen=True, slots=True)
class Said:
    """The next piece of an answer, which may be empty; the tokens so far; and on the last one, why it ended: stop or length."""

    text: str
    usage: Usage
    reason: str | None = None


@dataclass(eq=False)
class _Conversation:
    dialogue: Dialogue
    turns: list[Turn] = field(default_factory=list)  # as they were asked and told, the system's before them


class Conversations:
    """Answers requests from the conversations of before. To be used from one thread; several answers may be under way in it.

    Args:
        generator: the model.
        uploads: finds media.
        most_kept: conversations that are remembered between requests, those used last; together they have no more tokens than the model takes in one.
    """

    def __init__(self, generator: Generator, uploads: Uploads, most_kept: int = 8):
        self.generator, self.uploads, self.most_kept = generator, uploads, most_kept
        self._idle: list[_Conversation] = []  # the one used last at the end
        self._busy: list[_Conversation] = []

    def answer(self, asked: Asked) -> Stream[Said, None, None]:
        """The answer, token by token; closing the iterator stops it.

        Raises:
            InputError: at the first piece: a medium cannot be read, the text cannot be taken, or the context is full.
        """
        names: dict[str, str] = {}
        try:
            turns = self._kept_turns(asked.turns, names)
            conversation = self._nearest(turns)
            self._busy.append(conversation)
            try:
                yield from self._answer(conversation, turns, asked)
            except NoMemory:
                if not self._idle or conversation.dialogue.usage.answer:  # nothing to give back, or words are out already
                    raise
                self._idle.clear()
                conversation.dialogue.clear()
                self.generator.free_memory()
                yield from self._answer(conversation, turns, asked)
            finally:
                self._busy.remove(conversation)
                if conversation.dialogue.context.tokens:
                    conversation.dialogue.context.forget_other_images()
                    self._idle.append(conversation)
        except InputError as error:
            if type(error) is not InputError:
                raise
            raise InputError(_named(str(error), names)) from None
        finally:
            self._tidy()

    def _answer(self, conversation: _Conversation, turns: list[Turn], asked: Asked) -> Stream[Said, None, None]:
        dialogue, held, text = conversation.dialogue, Held(asked.stop), ""
        dialogue.sampling = asked.sampling
        dialogue.go_on_from(turns[:-1])
        conversation.turns = turns
        with closing(dialogue.steps(turns[-1].parts)) as steps:
            for piece in steps:
                out = held.take(piece)
                text += out
                conversation.turns = [*turns, Turn("assistant", (Text(text),))]
                if held.is_over:
                    break
                yield Said(out, dialogue.usage)
        rest = out if held.is_over else held.text
        conversation.turns = [*turns, Turn("assistant", (Text(text if held.is_over else text + rest),))]
        yield Said(rest, dialogue.usage, "length" if dialogue.usage.is_cut and not held.is_over else "stop")

    def _kept_turns(self, turns: Sequence[Turn], names: dict[str, str]) -> list[Turn]:
        """With media as files; fills `names`, what the request calls each file."""
        problems = []
        found = []
        for turn in turns:
            parts = []
            for part in turn.parts:
                if not isinstance(part, Text):
                    name, part = part.path, self.uploads.keep(part)
                    names.setdefault(part.path, name)
                    try:
                        self.uploads.frames(part)
                    except BadRow as error:
                        problems.append(_named(error.detail, {part.path: name}))
                parts.append(part)
            found.append(Turn(turn.role, tuple(parts)))
        if problems:
            raise InputError("\n".join(problems))
        return found

    def _nearest(self, turns: Sequence[Turn]) -> _Conversation:
        """The idle conversation that begins with most of these turns, which is no longer idle; a new one where none begins with a question of them."""
        lengths = [_common(conversation.turns, turns) for conversation in self._idle]
        best = max(range(len(lengths)), key=lambda number: (lengths[number], number), default=None)
        if best is None or all(turn.role == "system" for turn in turns[: lengths[best]]):
            return _Conversation(Dialogue(self.generator, attachments=self.uploads))
        return self._idle.pop(best)

    def _tidy(self) -> None:
        """Forgets what has not been used for longest, and the files that nobody needs."""
        most: int = self.generator.model.config.get_text_config().max_position_embeddings
        while len(self._idle) > self.most_kept or sum(len(conversation.dialogue.context.tokens) for conversation in self._idle) > most:
            self._idle.pop(0)
        self.uploads.forget_others({item for conversation in (*self._idle, *self._busy) for item in media_of(conversation.turns)})


def _common(turns: Sequence[Turn], others: Sequence[Turn]) -> int:
    """How many turns both begin with."""
    most = min(len(turns), len(others))
    return next((number for number in range(most) if turns[number] != others[number]), most)


def _named(text: str, names: dict[str, str]) -> str:
    """With what the request calls a file in place of the file's own name."""
    for path, name in names.items():
        text = text.replace(path, name)
    return text
