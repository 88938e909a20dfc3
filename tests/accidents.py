"""Runs in processes of their own that can be killed, filled up, cut short: forked from a server that has imported everything, so that each costs a second."""

import errno
import importlib
import multiprocessing
import os
import resource
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "train"), str(ROOT), os.environ.get("PYTHONPATH", "")])  # where the server finds what it imports
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["interlace.training.supervised", "tests.accidents"])


@dataclass(frozen=True)
class Accident:
    """What happens at the `count`-th call of `function` ("module:name"): the process is killed before or after it, or an error of the system, or a change
    of what it returns."""

    function: str
    count: int = 1
    when: str = "before"
    error: int | None = None
    change: Callable[[Any], Any] | None = None

    def arrange(self) -> None:
        """Puts the accident in the function's place; called in the process that is to have it."""
        module_name, name = self.function.split(":")
        owner: Any = importlib.import_module(module_name)
        *owners, name = name.split(".")
        for part in owners:
            owner = getattr(owner, part)
        original, calls = getattr(owner, name), 0

        def replacement(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            is_now = calls == self.count
            if is_now and self.error is not None:
                raise OSError(self.error, os.strerror(self.error))
            if is_now and self.change is None and self.when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if is_now and self.change is not None:
                return self.change(result)
            if is_now:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, replacement)


DISK_FULL = errno.ENOSPC


def run_in_process(
    arguments: dict[str, Any],
    log: Path,
    accidents: Sequence[Accident] = (),
    largest_file: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> BaseProcess:
    """Begins a supervised run in a process of its own; its exit code is the script's.

    Args:
        largest_file: bytes beyond which the system refuses to write any file.
        environment: what a launcher would set.
    """
    process = SERVER.Process(target=_run, args=(arguments, log, tuple(accidents), largest_file, dict(environment or {})))
    process.start()
    return process


def run_ranks(arguments: dict[str, Any], logs: Path, count: int, accidents: Mapping[int, Sequence[Accident]] | None = None) -> list[BaseProcess]:
    """Begins a run of several ranks; rank r writes to `logs`/r."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs.mkdir(exist_ok=True)
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = ({**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count))
    return [run_in_process(arguments, logs / str(rank), (accidents or {}).get(rank, ()), environment=environment) for rank, environment in enumerate(ranks)]


def _run(arguments: dict[str, Any], log: Path, accidents: Sequence[Accident], largest_file: int | None, environment: Mapping[str, str]) -> None:
    from interlace.errors import run_script
    from interlace.training.supervised import finetune

    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored by what runs in the background, which tests may
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for accident in accidents:
        accident.arrange()
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    run_script(lambda: finetune(arguments))


def finish(process: BaseProcess, seconds: float = 180) -> int:
    """Waits for the end; the exit code, negative for a signal."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"still running after {seconds} seconds")
    return process.exitcode
