"""A dialogue with images at their places, in the terminal."""

from collections.abc import Iterable
from pathlib import Path

from transformers import TextStreamer

from interlace.data.formats import PLACEHOLDER
from interlace.data.media import check_image
from interlace.data.sample import BadRow, Image, Part, Place, Text, Turn
from interlace.errors import InputError
from interlace.inference.generation import Generator

HELP = "/image PATH ...  attach images    /clear  start over    /exit or an empty line  leave"


class Dialogue:
    """The turns so far and the images waiting for the next question.

    Args:
        generator: answers.
        max_new_tokens: longest answer.
    """

    def __init__(self, generator: Generator, max_new_tokens: int):
        self.generator, self.max_new_tokens = generator, max_new_tokens
        self.turns: list[Turn] = []
        self.waiting: list[Image] = []

    def attach(self, paths: Iterable[str]) -> None:
        """Images for the next question.

        Raises:
            InputError: a path that is no readable image; nothing is attached then.
        """
        images = []
        for path in paths:
            if not Path(path).is_file():
                raise InputError(f"{path}: no such image")
            try:
                check_image(Place(path), 178_000_000)
            except BadRow as error:
                raise InputError(error.detail) from None
            images.append(Image(path))
        self.waiting += images

    def clear(self) -> None:
        """Forgets turns and waiting images."""
        self.turns, self.waiting = [], []

    def ask(self, question: str, stream: bool = False) -> str:
        """The answer to a question; waiting images stand where `<image>` is written, or in front of it, each on a line of its own.

        Raises:
            InputError: as many placeholders as images are needed, or none; or the text cannot be taken.
        """
        turn = Turn("user", self._parts(question))
        tokenizer = self.generator.processing.tokenizer
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None  # type: ignore[arg-type]
        try:
            (answer,) = self.generator.answer([self.generator.prompt([*self.turns, turn])], self.max_new_tokens, streamer)
        except BadRow as error:
            raise InputError(error.detail) from None
        self.turns += [turn, Turn("assistant", (Text(answer),))]
        self.waiting = []
        return answer

    def _parts(self, question: str) -> tuple[Part, ...]:
        texts = question.split(PLACEHOLDER)
        if len(texts) == 1:
            front = [part for image in self.waiting for part in (image, Text("\n"))]
            return (*front, Text(question))
        if len(texts) - 1 != len(self.waiting):
            raise InputError(f"{len(texts) - 1} {PLACEHOLDER} in the question, {len(self.waiting)} images attached; write one for each, or none")
        parts: list[Part] = []
        for i, text in enumerate(texts):
            parts += [Text(text)] if text else []
            parts += [self.waiting[i]] if i < len(self.waiting) else []
        return tuple(parts)


def run_terminal(dialogue: Dialogue) -> None:
    """Reads questions and commands until an empty line, `/exit` or the end of input; a mistake is named and the dialogue goes on."""
    print(HELP)
    while True:
        try:
            line = input("\nyou: ").strip()
        except EOFError:
            print()
            return
        command, _, rest = line.partition(" ")
        if command in ("", "/exit"):
            return
        try:
            if command == "/image":
                dialogue.attach(rest.split())
                print(f"{len(dialogue.waiting)} image{'' if len(dialogue.waiting) == 1 else 's'} waiting for your question")
            elif command == "/clear":
                dialogue.clear()
                print("cleared")
            elif command.startswith("/"):
                print(f"unknown command {command}; {HELP}")
            else:
                print("model: ", end="", flush=True)
                dialogue.ask(line, stream=True)
        except InputError as error:
            print(error)
