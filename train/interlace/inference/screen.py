"""How a chat looks: formatted text at a terminal, growing while it comes; plain text in a pipe.

Markdown's rules are not those of answers: they drop <ref> and <box>, the stars of 2*3*4, and the rest of a table's row that is too long. So blocks are
formatted, and what stands in a line is shown as it is, but for the stars of **bold words**.
"""

import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing

from rich.box import SIMPLE
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

Streams = Sequence[Generator[str, None, None]]
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a model's words move no cursor
_FENCE = re.compile(r"\s*(```+)\s*([\w+#.-]*)[^`]*")
_HEADING = re.compile(r"#{1,6} ")
_RULE = re.compile(r"(?=.*-)(?=.*\|)[ \t|:-]+")  # between a table's head and body
# code as it is, or bold: the stars stand at the edges of words. Chinese has no spaces there
_BOLD = re.compile(r"""`[^`]+`|(?<![^\s("'|[\x80-\U0010ffff])\*\*([^\W_](?:[^*]*[\w.,:;!?%)])?)\*\*(?![^\s[)"'|\].,:;!?\x80-\U0010ffff])""")
_LEAST_COLUMN = 8


class Screen:
    """Shows the answers of one model, or of several side by side.

    Args:
        names: of the models.
        console: for tests; None for the terminal, or whatever standard output is.
    """

    def __init__(self, names: Sequence[str], console: Console | None = None):
        self.names, self.console = names, console or Console()

    def say(self, text: str) -> None:
        """A message; a terminal's lines end between words."""
        if self.console.is_terminal:
            self.console.print(Text(_CONTROL.sub("", text)))
        else:
            print(text)

    def table(self, rows: Sequence[tuple[str, str]]) -> None:
        """Names, and what they mean."""
        if not self.console.is_terminal:
            print("\n".join(f"{name:<20}  {meaning}" for name, meaning in rows))
            return
        table = Table.grid(padding=(0, 2, 0, 0))
        for name, meaning in rows:
            table.add_row(Text(name, style="bold"), Text(meaning))
        self.console.print(table)

    def answer(self, streams: Streams) -> None:
        """Shows answers while they come, each model's next piece in turn. When it ends, by an exception too, the streams are closed.

        Args:
            streams: one for each model.
        """
        texts = [""] * len(streams)
        with ExitStack() as stack:
            for stream in streams:
                stack.enter_context(closing(stream))
            if self.console.is_terminal:
                self._show_growing(streams, texts)
            else:
                self._print(streams, texts)
        if not any(texts):
            self.say("(the model ended its answer before the first word)")

    def _show_growing(self, streams: Streams, texts: list[str]) -> None:
        try:
            with Live(_Tail(self, texts), console=self.console, transient=True, refresh_per_second=10):
                for number, piece in _by_turns(streams):
                    texts[number] += piece
        finally:
            if any(texts):
                self.console.print(self.shown(texts))

    def _print(self, streams: Streams, texts: list[str]) -> None:
        """One model's words as they come; several models' one after the other at the end."""
        try:
            for number, piece in _by_turns(streams):
                if len(texts) == 1:
                    print(f"{'' if texts[0] else f'{self.names[0]}: '}{_CONTROL.sub('', piece)}", end="", flush=True)
                texts[number] += piece
        finally:
            if len(texts) > 1:
                print("\n".join(f"{name}: {_CONTROL.sub('', text)}" for name, text in zip(self.names, texts, strict=True)))
            elif any(texts):
                print()

    def shown(self, texts: Sequence[str]) -> RenderableType:
        """Formatted answers under the models' names: one, or columns."""
        answers = [_formatted(_CONTROL.sub("", text)) for text in texts]
        if len(answers) == 1:
            return Group(Text(f"{self.names[0]}:", style="bold"), answers[0])
        table = Table(expand=True)
        for name in self.names:
            table.add_column(Text(name), ratio=1, overflow="fold")
        table.add_row(*answers)
        return table


def _formatted(text: str) -> Group:
    """An answer's fenced code coloured, its tables laid out, its headings bold; every other line is a line."""
    blocks: list[RenderableType] = []
    lines, at = text.split("\n"), 0
    while at < len(lines):
        end = at + 1
        if fence := _FENCE.fullmatch(lines[at]):
            end = next((number for number in range(end, len(lines)) if lines[number].strip() == fence[1]), len(lines))
            code = [Syntax("\n".join(lines[at + 1 : end]), fence[2] or "text", word_wrap=True)] if end > at + 1 else []
            blocks += [Text(lines[at], "dim"), *code, *(Text(line, "dim") for line in lines[end : end + 1])]
            end += 1
        elif "|" in lines[at] and _RULE.fullmatch("".join(lines[end : end + 1])):
            end = next((number for number in range(end, len(lines)) if "|" not in lines[number]), len(lines))
            blocks.append(_Table(lines[at:end]))
        else:
            blocks.append(_inline(lines[at]))
        at = end
    return Group(*blocks)


def _inline(line: str) -> Text:
    text, at = Text(style="bold" if _HEADING.match(line) else ""), 0
    for found in _BOLD.finditer(line):
        text.append(line[at : found.start()])
        text.append(found[0]) if found[1] is None else text.append(found[1], "bold")
        at = found.end()
    return text.append(line[at:])


class _Table:
    """The lines of a table; as they are where their columns have no room."""

    def __init__(self, lines: list[str]):
        self.lines = lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        head, _, *body = ([_inline(cell.strip()) for cell in re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|"))] for line in self.lines)
        width = max(map(len, (head, *body)))
        if options.max_width < _LEAST_COLUMN * width:
            yield from map(_inline, self.lines)
            return
        table = Table(box=SIMPLE)
        for number in range(width):
            table.add_column(head[number] if number < len(head) else "", overflow="fold")
        for row in body:
            table.add_row(*row)
        yield table


class _Tail:
    """Answers as they stand, the last lines where the terminal is too low for all."""

    def __init__(self, screen: Screen, texts: list[str]):
        self.screen, self.texts = screen, texts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self.screen.shown(self.texts), options.update(height=None), pad=False)
        for line in lines[-(console.height - 1) :]:
            yield from line
            yield Segment.line()


def _by_turns(streams: Streams) -> Iterator[tuple[int, str]]:
    """(number, piece) from all streams, one after the other until each has ended."""
    open_streams = dict(enumerate(streams))
    while open_streams:
        for number, stream in list(open_streams.items()):
            piece = next(stream, None)
            if piece is None:
                del open_streams[number]
            else:
                yield number, piece
