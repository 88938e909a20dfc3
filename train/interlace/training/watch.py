"""Signs of life: each process says where it is, hears of the others, and ends with a message when one of them is gone or all of them are stuck.

Rank 0 holds a small store; every process writes a beat into it from a thread of its own, whatever the main thread waits for. So a process that died, a
host that was cut off and a collective that never returns are each noticed, on any backend, and named with the step and the rows they were at.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, TCPStore

from interlace.errors import RunError, Stopped
from interlace.ranks import Ranks

_VERDICT = "verdict"
_SHOWN = 8


@dataclass(frozen=True)
class Position:
    """Where a process is: the optimizer step, what it does there, and the rows in its hands, named when somebody asks."""

    step: int = 0
    doing: str = "preparing"
    rows: Callable[[], Sequence[str]] = tuple

    def __str__(self) -> str:
        names = self.rows()
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        return f"step {self.step}, {self.doing}" + (f", rows in flight: {'; '.join(names[:_SHOWN])}{more}" if names else "")


class Watch:
    """A run's processes as they look after each other; alone, a process only notices that it is stuck.

    Args:
        ranks: the processes.
        stuck_seconds: how long a process may stay at one position before it is reported, and after twice that given up (`ddp_timeout`).
        silent_seconds: how long a process may be without a beat before it counts as dead.
        beat_seconds: between two beats.
    """

    def __init__(self, ranks: Ranks, stuck_seconds: float, silent_seconds: float = 40, beat_seconds: float = 2):
        self.ranks, self.stuck_seconds, self.silent_seconds, self.beat_seconds = ranks, stuck_seconds, silent_seconds, beat_seconds
        self.position = Position()
        self._moved: float | None = None  # since when it has been there; preparing may take hours, and one rank may do it for all
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._main_thread = threading.main_thread().ident
        self._hosts: list[str] = []
        self._server: TCPStore | None = None
        self._address = ("", 0)

    def at(self, step: int, doing: str, rows: Callable[[], Sequence[str]] = tuple) -> None:
        """Says where the main thread is now; from the first time on, it has to get on."""
        self.position, self._moved = Position(step, doing, rows), time.monotonic()

    @contextlib.contextmanager
    def running(self) -> Iterator["Watch"]:
        """Watches until the end of the block; what goes wrong inside on one rank is told to the others, which end too."""
        self._meet()
        self._thread.start()
        try:
            yield self
            self.at(self.position.step, "waiting for the others to end")
            self.ranks.sum([0])
        except BaseException as error:
            if _is_lost_connection(error):
                gone = f"rank {self.ranks.rank} on {socket.gethostname()} lost its connection to another rank; {self._who_is_gone()}"
                self._is_over.set()
                raise RunError(f"{gone}. It was at {self.position}. The checkpoints stand: start again with resume_from_checkpoint: true") from error
            self._is_over.set()
            if not isinstance(error, Stopped):  # by all of them
                self._tell(f"rank {self.ranks.rank} on {socket.gethostname()} stopped at {self.position}: {type(error).__name__}: {error}")
            raise
        self._is_over.set()

    # --- what the ranks share ---

    def _meet(self) -> None:
        self._hosts = self.ranks.gather(socket.gethostname())
        if self.ranks.is_alone:
            return
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        if self.ranks.is_main:
            self._server = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self._address = (host, self.ranks.gather(None if self._server is None else self._server.port)[0])

    def _connect(self) -> TCPStore:
        return TCPStore(*self._address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5 * self.beat_seconds))

    def _tell(self, verdict: str) -> None:
        """Leaves a word for all ranks; the first one stands."""
        if self.ranks.is_alone:
            return
        with contextlib.suppress(RuntimeError):  # rank 0 has gone first
            store = self._connect()
            store.compare_set(_VERDICT, "", verdict)
            if self.ranks.is_main:
                time.sleep(2 * self.beat_seconds)  # the store goes with this process: let the others read

    def _who_is_gone(self) -> str:
        """Which ranks give no sign of life any more; takes some beats to listen."""
        try:
            store = self._connect()
            before = [self._beat_of(store, rank) for rank in range(self.ranks.world_size)]
            for _ in range(4):
                time.sleep(self.beat_seconds)
                self._write_beat(store)
            silent = [rank for rank, beat in enumerate(before) if rank != self.ranks.rank and self._beat_of(store, rank) == beat]
        except RuntimeError:
            return f"rank 0 on {self._hosts[0]} is gone"
        names = ", ".join(f"rank {rank} on {self._hosts[rank]}, last at {json.loads(before[rank])[1] if before[rank] else 'the start'}" for rank in silent)
        return f"gone: {names}" if silent else "all ranks are alive: a collective took longer than ddp_timeout, or the network failed for a moment"

    def _write_beat(self, store: TCPStore) -> None:
        store.set(f"beat {self.ranks.rank}", json.dumps([time.monotonic(), str(self.position)]))

    def _beat_of(self, store: TCPStore, rank: int) -> str:
        return store.get(f"beat {rank}").decode() if store.check([f"beat {rank}"]) else ""

    # --- the thread ---

    def _look(self) -> None:
        store = None if self.ranks.is_alone else self._reached()
        heard = [(time.monotonic(), "")] * self.ranks.world_size
        reported, last = False, time.monotonic()
        while not self._is_over.is_set():
            if time.monotonic() - last > self.silent_seconds / 2:  # this process slept, and so perhaps did the others
                heard = [(time.monotonic(), beat) for _, beat in heard]
            last = time.monotonic()
            try:
                if store is not None:
                    self._beat(store, heard)
            except RuntimeError:
                if not self._is_over.wait(2 * self.beat_seconds):  # at the end of a run rank 0 may be the first to leave
                    self._end(f"rank 0 on {self._hosts[0]} cannot be reached any more: it died, or the network did")
            still = 0.0 if self._moved is None else time.monotonic() - self._moved
            if still > self.stuck_seconds and not reported:
                reported = True
                self._report(still, heard)
            if still > 2 * self.stuck_seconds and store is not None:
                self._end(f"no progress for {still:.0f} seconds, ddp_timeout allows {2 * self.stuck_seconds:.0f}; {self._who_is_gone()}")
            self._is_over.wait(self.beat_seconds)

    def _reached(self) -> TCPStore | None:
        try:
            return self._connect()
        except RuntimeError:
            self._end(f"rank 0 on {self._hosts[0]} cannot be reached on port {self._address[1]}")
            return None

    def _beat(self, store: TCPStore, heard: list[tuple[float, str]]) -> None:
        """Writes this rank's beat, hears the others, ends when one is dead."""
        now, me = time.monotonic(), self.ranks.rank
        self._write_beat(store)
        if store.check([_VERDICT]):
            self._end(store.get(_VERDICT).decode())
        for rank in range(self.ranks.world_size) if self.ranks.is_main else (0,):
            beat = self._beat_of(store, rank)
            if beat != heard[rank][1]:
                heard[rank] = (now, beat)
            elif now - heard[rank][0] > self.silent_seconds and rank != me:
                at = json.loads(beat)[1] if beat else "the start"
                verdict = f"rank {rank} on {self._hosts[rank]} has given no sign of life for {self.silent_seconds:.0f} seconds; it was last at {at}"
                store.compare_set(_VERDICT, "", verdict)
                self._end(verdict)

    def _report(self, still: float, heard: list[tuple[float, str]]) -> None:
        """Says where everybody is and what this process waits for."""
        lines = [f"rank {self.ranks.rank} on {socket.gethostname()}: no progress for {still:.0f} seconds at {self.position}"]
        for rank, (_, beat) in enumerate(heard):
            if beat and rank != self.ranks.rank:
                lines.append(f"  rank {rank} on {self._hosts[rank]} is at {json.loads(beat)[1]}")
        frame: Any = sys._current_frames().get(self._main_thread or 0)
        lines += ["  it waits in:", *(f"    {line.rstrip()}" for line in traceback.format_stack(frame)[-4:])]
        print("\n".join(lines), file=sys.stderr, flush=True)

    def _end(self, verdict: str) -> None:
        """Ends this process, whose main thread may be stuck for good; what it has saved stands."""
        if self._is_over.is_set():
            return
        print(f"error: rank {self.ranks.rank} on {socket.gethostname()} at {self.position} ends: {verdict}", file=sys.stderr, flush=True)
        if self.ranks.is_main:
            time.sleep(2 * self.beat_seconds)  # the store goes with this process: let the others read why
        os._exit(1)


def _is_lost_connection(error: BaseException) -> bool:
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))
