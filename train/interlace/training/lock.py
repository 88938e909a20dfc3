"""One run at a time in a folder."""

import fcntl
import os
from pathlib import Path
from types import TracebackType

from interlace.errors import InputError


class FolderLock:
    """Holds a folder from `take` to the end of the `with` block or of the process, whichever way it ends; writes nothing.

    By `flock(2)`: on a shared file system that passes it on, between machines too; where there is none, nothing is held.
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def __enter__(self) -> "FolderLock":
        os.register_at_fork(after_in_child=self._leave)  # a process that reads data may outlive this one by seconds
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._leave()

    def take(self, folder: Path) -> None:
        """Takes a folder, if it is there and not taken already.

        Raises:
            InputError: another run has it.
        """
        if self._descriptor is not None or not folder.is_dir():
            return
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise InputError(f"output_dir: another run is writing into {folder}; wait for its end, stop it, or choose another folder") from None
        except OSError:  # a file system without locks
            os.close(descriptor)
            return
        self._descriptor = descriptor

    def _leave(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
