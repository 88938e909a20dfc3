"""Errors that are the user's to mend, and how a script turns them into an exit code."""

import atexit
import logging
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from types import TracebackType

from interlace.redaction import readable


class InputError(ValueError):
    """The user's input is wrong. The message says where, what was got, what was expected and what to do."""


class RunError(RuntimeError):
    """The run cannot go on, though nobody's input is to blame: the disk, the network, the numbers. The message says what is saved and what to do."""


class Stopped(Exception):
    """The run was asked to stop, and has saved itself; `code` is the exit code that says so."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def run_script(main: Callable[[], None]) -> None:
    """Runs `main` and exits: 0 done; 2 the input is wrong (its message on stderr, no traceback); 143 stopped and saved; 1 anything else."""
    warnings.simplefilter("ignore", FutureWarning)  # libraries telling each other about their next versions
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # a faster kernel for 4 bits on CPUs, missed by runs without 4 bits too
    sys.excepthook = _print_traceback
    code = 0
    try:
        main()
    except (InputError, RunError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once per machine, not once per process
            print(f"error: {readable(str(error))}", file=sys.stderr)
        code = 2 if isinstance(error, InputError) else 1
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(stopped, file=sys.stderr)
        code = stopped.code
    finally:
        _end_children()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):  # all is said and saved: one that comes late changes the exit code no more
        signal.signal(number, signal.SIG_IGN)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # the threads of a process group abort the interpreter's shutdown now and then, and a run that is done would seem to have failed
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _end_children() -> None:
    """Ends the processes that read data: they leave signals to this one, so that Python's own way, SIGTERM and waiting, would wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would take their end for an accident
    for child in multiprocessing.active_children():
        child.kill()


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What Python prints of an error that nobody caught, without the secrets that a library's message may repeat."""
    sys.stderr.write(readable("".join(traceback.format_exception(kind, error, trace))))
