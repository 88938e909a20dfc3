"""Tab completion of what is typed into the chat: commands, settings, paths."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from interlace.data.sample import IMAGE_SUFFIXES, VIDEO_SUFFIXES

_LAST_WORD = re.compile(r"(?:\\.|[^\s\\])*$", re.DOTALL)
_WANTED = {"/image": IMAGE_SUFFIXES, "/video": VIDEO_SUFFIXES, "/save": (".json",)}


def completions(line: str, commands: Iterable[str], settings: Sequence[str]) -> list[str]:
    """What the last word of a line may become, in full, white space in paths behind a backslash."""
    command, space, _ = line.partition(" ")
    if not space:
        return [f"{name} " for name in commands if name.startswith(command)] if command.startswith("/") else []
    found = _LAST_WORD.search(line)
    word = found.group() if found else ""
    if command == "/set":
        return [f"{name} " for name in settings if name.startswith(word)] if line.count(" ") == 1 else []
    if command not in _WANTED:
        return []
    return _paths(re.sub(r"\\(.)", r"\1", word), _WANTED[command])


def _paths(start: str, suffixes: tuple[str, ...]) -> list[str]:
    """Folders, and files that end so."""
    before, slash, name = start.rpartition("/")
    folder = before + slash
    try:
        entries = sorted(Path(folder or ".").expanduser().iterdir(), key=lambda path: path.name)
    except OSError:
        return []
    matches = []
    for path in entries:
        if path.name.startswith(name) and (name.startswith(".") or not path.name.startswith(".")):
            if path.is_dir():
                matches.append(f"{folder}{path.name}/")
            elif path.suffix.lower() in suffixes:
                matches.append(f"{folder}{path.name} ")
    return [re.sub(r"([\s\\'\"])(?!$)", r"\\\1", match) for match in matches]


class Completer:
    """For `readline`.

    Args:
        commands, settings: what may be typed besides paths.
    """

    def __init__(self, commands: Iterable[str], settings: Sequence[str]):
        self.commands, self.settings = list(commands), settings

    def install(self) -> None:
        """Makes Tab complete."""
        import readline  # not there on every system; the caller asks for it at a terminal only

        self._readline = readline
        readline.set_completer_delims(" \t\n")
        readline.set_completer(self)
        readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")

    def __call__(self, text: str, state: int) -> str | None:
        line = self._readline.get_line_buffer()[: self._readline.get_endidx()]
        found = _LAST_WORD.search(line)
        shown = len(found.group()) - len(text) if found else 0  # what of the word stands before the white space that readline ends words at
        words = [word[shown:] for word in completions(line, self.commands, self.settings)]
        return words[state] if state < len(words) else None
