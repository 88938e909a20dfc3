"""The chat in the terminal: questions, answers, and commands that begin with a slash."""

import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from itertools import zip_longest
from pathlib import Path
from typing import Any, get_type_hints

from interlace.data.download import is_url
from interlace.data.sample import Image, Text, media_of
from interlace.errors import InputError
from interlace.inference.completion import Completer
from interlace.inference.dialogue import Dialogue, save
from interlace.inference.generation import Generator, load_generator
from interlace.inference.sampling import Sampling
from interlace.inference.screen import Screen, Streams
from interlace.model.loading import base_of, load_processing, resolve_model_path

HELP = "/image PATH ..  /video PATH ..  attach media    /help  all commands    /exit or an empty line  leave    Ctrl-C  stop an answer"
SETTINGS = [field.name for field in dataclasses.fields(Sampling)]


def load_compared(generator: Generator, model_path: str, other: str, dtype: str | None = None, load_in_4bit: bool = False) -> tuple[Generator, bool]:
    """A model to compare with, and whether it is the one under the first one's adapter, whose weights both share.

    Args:
        generator, model_path: the first model. other: a path, as for the first; "base" for the model under its adapter.

    Raises:
        InputError: there is no such model.
    """
    path = resolve_model_path(model_path)
    base = base_of(path)
    if other == "base" and base == path:
        raise InputError(f"--compare-with base: {model_path} is no adapter; expected the path of another model")
    if base != path and (other == "base" or resolve_model_path(other) == base):
        return Generator(generator.model, load_processing(base), generator.device), True
    return load_generator(other, dtype, load_in_4bit), False


def run_terminal(*dialogues: Dialogue, names: Sequence[str] = ("model",)) -> None:
    """Reads questions and commands until an empty line, `/exit` or the end of input; a mistake is named and the dialogue goes on.

    Args:
        dialogues: one, or several, of different models, that are asked the same.
        names: of the models.
    """
    screen = Screen(names)
    chat = Chat(dialogues, screen)
    if sys.stdin.isatty():
        Completer(COMMANDS, SETTINGS).install()
    screen.say(HELP)
    while not chat.is_over:
        try:
            line = input("\nyou: ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            screen.say("\n(an empty line leaves)")
            continue
        try:
            chat.take(line or "/exit")
        except InputError as error:
            screen.say(str(error))
        except KeyboardInterrupt:
            screen.say("(stopped; what was said is kept)" if chat.has_answered else "(stopped before anything was said; the question is not kept)")


class Chat:
    """What the lines do that a person types.

    Args:
        dialogues: one, or several that are asked the same. screen: shows the answers.
    """

    def __init__(self, dialogues: Sequence[Dialogue], screen: Screen):
        self.dialogues, self.first, self.screen = dialogues, dialogues[0], screen
        self.has_answered = False
        self.is_over = False

    def take(self, line: str) -> None:
        """Does what a line says.

        Raises:
            InputError: it cannot be done; nothing has changed.
        """
        command, _, rest = line.partition(" ")
        if not command.startswith("/"):
            self._answer([dialogue.stream(line) for dialogue in self.dialogues])
        elif command in COMMANDS:
            COMMANDS[command][0](self, rest.strip())
        else:
            close = get_close_matches(command, COMMANDS, 1)
            raise InputError(f"unknown command {command}{f'; did you mean {close[0]}?' if close else ''} /help shows all commands")

    def _answer(self, streams: Streams) -> None:
        before = [(list(dialogue.turns), list(dialogue.frames), list(dialogue.waiting)) for dialogue in self.dialogues]
        self.has_answered = False
        try:
            self.screen.answer(streams)
        finally:
            if len({len(dialogue.turns) for dialogue in self.dialogues}) > 1:  # one could not answer, or had not begun to: they stay together
                for dialogue, state in zip(self.dialogues, before, strict=True):
                    dialogue.turns, dialogue.frames, dialogue.waiting = state
            self.has_answered = self.first.turns != before[0][0]

    def _image(self, rest: str) -> None:
        images = self.first.attachments.images(_words(rest, "/image"))
        for dialogue in self.dialogues:
            dialogue.waiting += images
        self._tell_waiting()

    def _video(self, rest: str) -> None:
        videos = self.first.attachments.videos(_words(rest, "/video"))
        for dialogue in self.dialogues:
            dialogue.waiting += videos
        self._tell_waiting()

    def _tell_waiting(self) -> None:
        images = sum(isinstance(item, Image) for item in self.first.waiting)
        videos = len(self.first.waiting) - images
        counts = [f"{count} {name}{'' if count == 1 else 's'}" for count, name in ((images, "image"), (videos, "video")) if count]
        self.screen.say(f"{' and '.join(counts)} waiting for your question")

    def _system(self, rest: str) -> None:
        before = self.first.system
        try:
            for dialogue in self.dialogues:
                dialogue.set_system(rest)
        except InputError:
            self.first.set_system(before)
            raise
        self.screen.say(f"system prompt: {rest or 'the one of the model'}")

    def _undo(self, rest: str) -> None:
        if self.first.waiting:
            for dialogue in self.dialogues:
                dialogue.waiting = []
            self.screen.say("nothing is attached any more")
        else:
            for dialogue in self.dialogues:
                parts = dialogue.undo()
            self.screen.say(f"taken back: {_told(parts)}")

    def _retry(self, rest: str) -> None:
        self._answer([dialogue.retry() for dialogue in self.dialogues])

    def _drop(self, rest: str) -> None:
        if not (rest or "1").isdecimal():
            raise InputError(f"/drop: expected a whole number of questions, got {rest!r}")
        for dialogue in self.dialogues:
            dialogue.drop_oldest(int(rest or 1))
        self.screen.say(f"{len(self.first.turns) // 2} questions are left")

    def _save(self, rest: str) -> None:
        words = _words(rest, "/save")
        if len(words) > 1:
            raise InputError(f"/save: expected one FILE, got {len(words)}; quote a name with spaces")
        file = Path(words[0]).expanduser()
        save(self.dialogues, file)
        media = media_of(self.first.turns)
        folders = [Path(item.path).resolve().parent for item in media if not is_url(item.path)]
        self.screen.say(f"written to {file}{f'; its media lie below image_folder {os.path.commonpath(folders)}' if folders else ''}")
        if len(folders) < len(media):
            self.screen.say("some are URLs, which are read with allow_urls")

    def _clear(self, rest: str) -> None:
        for dialogue in self.dialogues:
            dialogue.clear()
        self.screen.say("cleared")

    def _set(self, rest: str) -> None:
        words = rest.split()
        changes: dict[str, Any] = {}
        for name, value in zip_longest(words[::2], words[1::2], fillvalue=""):
            if name not in SETTINGS:
                close = get_close_matches(name, SETTINGS, 1)
                raise InputError(f"/set: no setting {name!r}; {f'did you mean {close[0]}?' if close else 'they are ' + ', '.join(SETTINGS)}")
            changes[name] = _value(name, value)
        sampling = dataclasses.replace(self.first.sampling, **changes)
        for dialogue in self.dialogues:
            dialogue.sampling = sampling
        self.screen.say("  ".join(f"{name} {getattr(sampling, name)}" for name in SETTINGS))
        if sampling.idle:
            self.screen.say(f"no effect at temperature 0: {', '.join(sampling.idle)}; /set temperature to something above 0")

    def _history(self, rest: str) -> None:
        if self.first.system:
            self.screen.say(f"system: {self.first.system}")
        for number, turn in enumerate(self.first.turns):
            if turn.role == "user":
                self.screen.say(f"you: {_told(turn.parts)}")
            else:
                for name, dialogue in zip(self.screen.names, self.dialogues, strict=True):
                    self.screen.say(f"{name}: {dialogue.turns[number].text}")

    def _help(self, rest: str) -> None:
        self.screen.table([(f"{name} {words}", meaning) for name, (_, words, meaning) in COMMANDS.items()])

    def _exit(self, rest: str) -> None:
        self.is_over = True


def _words(rest: str, command: str) -> list[str]:
    """Words as in a shell: quotes and backslashes keep white space in them."""
    try:
        words = shlex.split(rest)
    except ValueError as error:
        raise InputError(f"{command}: {error}") from None
    if not words:
        raise InputError(f"{command}: expected {COMMANDS[command][1]}")
    return words


def _value(name: str, text: str) -> int | float | None:
    if text.lower() == "none" and name == "seed":
        return None
    is_fraction = get_type_hints(Sampling)[name] is float
    try:
        return float(text) if is_fraction else int(text)
    except ValueError:
        raise InputError(f"/set {name}: expected {'a number' if is_fraction else 'a whole number'}, got {text!r}") from None


def _told(parts: Sequence[object]) -> str:
    return "".join(part.text if isinstance(part, Text) else f"[{part.path}]" for part in parts)  # type: ignore[attr-defined]


Command = Callable[[Chat, str], None]
COMMANDS: dict[str, tuple[Command, str, str]] = {  # what each does, takes, and says in the help
    "/image": (Chat._image, "PATH ..", "attach images to the next question: files, patterns (*.png), URLs; <image> in the question is an image's place"),
    "/video": (Chat._video, "PATH ..", "attach videos, or folders of frames; <video> is a video's place"),
    "/system": (Chat._system, "[TEXT]", "another system prompt; without a text the model's own"),
    "/undo": (Chat._undo, "", "take back what is attached, or else the last question and its answer"),
    "/retry": (Chat._retry, "", "answer the last question once more; another answer needs a temperature above 0 and no seed"),
    "/drop": (Chat._drop, "[N]", "forget the oldest question, or the N oldest, to make room"),
    "/save": (Chat._save, "FILE", "write the dialogue as a data file, which training, evaluation and the preview read"),
    "/clear": (Chat._clear, "", "forget everything that was asked and attached"),
    "/set": (Chat._set, "[NAME VALUE ..]", "how answers are drawn; without a name, the values"),
    "/history": (Chat._history, "", "show what was asked and answered"),
    "/help": (Chat._help, "", "show this"),
    "/exit": (Chat._exit, "", "leave; an empty line does so, too"),
}
