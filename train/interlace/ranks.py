"""The processes of a run, and what they agree on: over a channel of their own between CPUs, so that no GPU waits for it."""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from interlace.errors import InputError

Answer = TypeVar("Answer")
_A_DAY = 86_400.0


def join() -> "Ranks":
    """The processes that torchrun started to share work that needs no gradients; this one alone without it.

    Those that are done wait for the others as long as it takes: torchrun ends all if one of them fails.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        distributed.init_process_group(timeout=timedelta(seconds=_A_DAY))
    return Ranks(_A_DAY)


class Ranks:
    """Rank and number of the processes of a run; alone if no launcher started several.

    Args:
        timeout_seconds: how long an agreement may take before it is given up.
    """

    def __init__(self, timeout_seconds: float = 1800):
        self.is_alone = not distributed.is_initialized()
        self.rank = 0 if self.is_alone else distributed.get_rank()
        self.world_size = 1 if self.is_alone else distributed.get_world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self._group: Any = None
        if not self.is_alone:
            self._group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the ranks, in float64."""
        if self.is_alone:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(total, group=self._group)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in order of the ranks; anything that pickles."""
        if self.is_alone:
            return [value]
        values: list[Any] = [None] * self.world_size
        distributed.all_gather_object(values, value, group=self._group)
        return values

    def on_main(self, function: Callable[[], Answer]) -> Answer:
        """What `function` returns on the main process, on every rank.

        Raises:
            InputError: on every rank, if it was raised there.
        """
        answer: list[Any] = [None, None]
        if self.is_main:
            try:
                answer = [function(), None]
            except InputError as error:
                answer = [None, str(error)]
        if not self.is_alone:
            distributed.broadcast_object_list(answer, src=0, group=self._group)
        if answer[1] is not None:
            raise InputError(answer[1])
        return answer[0]  # type: ignore[no-any-return]
