"""Asking a run to stop: the signals that mean it, and what the processes that only help do with them."""

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGHUP: 129, signal.SIGINT: 130}


class StopSignals:
    """From `listen` to the end of the `with` block, SIGTERM, SIGUSR1, a closed terminal and Ctrl-C only ask for a stop: `requested` is the exit code to end
    with, or None. A second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.requested: int | None = None
        self._is_interrupted = False
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        return self

    def listen(self) -> None:
        """Begins to take signals as questions: from here on there is something to save."""
        heard = [number for number in EXIT_CODES if signal.getsignal(number) is not signal.SIG_IGN]  # nohup has a closed terminal ignored
        self._before = {number: signal.signal(number, self._ask) for number in heard}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a process that was forked in the meantime
            os._exit(128 + number)
        if number == signal.SIGINT:
            if self._is_interrupted:
                os._exit(EXIT_CODES[signal.SIGINT])
            self._is_interrupted = True
            sys.stderr.write("\nfinishing this step, then saving; Ctrl-C again quits at once\n")
        self.requested = self.requested or EXIT_CODES[signal.Signals(number)]


def leave_signals_to_parent(_: int = 0) -> None:
    """In a process that prepares data: the training process decides when to stop, and this one ends with it."""
    for number in EXIT_CODES:
        signal.signal(number, signal.SIG_IGN)
