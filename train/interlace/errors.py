"""Errors that are the user's to mend, and how a script turns them into an exit code."""

import sys
from collections.abc import Callable


class InputError(ValueError):
    """The user's input is wrong. The message says where, what was got, what was expected and what to do."""


def run_script(main: Callable[[], None]) -> None:
    """Runs `main` and exits: 0 done; 2 the input is wrong (its message on stderr, no traceback); 1 anything else."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
