"""Lengths -> an epoch's plan: optimizer steps, each a list of micro-batches made without knowing the ranks.

Every micro-batch holds at most `budget` tokens; every step has world size x accumulation of them. All epochs have the same number of steps, so the
plan's state is (epoch, step).
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from interlace.errors import InputError

MicroBatch = list[int]
_OPEN_BATCHES = 16  # how many unfilled micro-batches are kept to find a place for the next row


def token_budget(lengths: Sequence[int], rows_per_batch: int, max_tokens_per_batch: int | None) -> int:
    """Tokens per micro-batch: what the user says, else rows_per_batch times the mean length; never below the longest row."""
    wanted = max_tokens_per_batch or round(rows_per_batch * sum(lengths) / len(lengths))
    return max(wanted, max(lengths))


def pack(lengths: Sequence[int], budget: int, order: Sequence[int], rows_per_batch: int | None = None) -> list[MicroBatch]:
    """Rows in `order` -> micro-batches of at most `budget` tokens, each row into the fullest open batch it fits (best fit).

    With `rows_per_batch`, micro-batches hold exactly that many rows instead (the last one fewer), whatever their length.
    """
    if rows_per_batch is not None:
        return [list(order[start : start + rows_per_batch]) for start in range(0, len(order), rows_per_batch)]
    done: list[MicroBatch] = []
    open_batches: list[tuple[int, MicroBatch]] = []
    for row in order:
        length = lengths[row]
        fitting = [i for i, (used, _) in enumerate(open_batches) if used + length <= budget]
        if fitting:
            best = max(fitting, key=lambda i: open_batches[i][0])
            used, batch = open_batches[best]
            batch.append(row)
            open_batches[best] = (used + length, batch)
            continue
        if len(open_batches) == _OPEN_BATCHES:
            fullest = max(range(len(open_batches)), key=lambda i: open_batches[i][0])
            done.append(open_batches.pop(fullest)[1])
        open_batches.append((length, [row]))
    return done + [batch for _, batch in open_batches]


def split_to(batches: list[MicroBatch], count: int, shortest: int) -> list[MicroBatch]:
    """Splits the micro-batches with most rows until there are `count`; when all hold one row, adds `~shortest`: that row once more, at zero weight."""
    batches = [list(batch) for batch in batches]
    while len(batches) < count:
        largest = max(batches, key=len)
        half = len(largest) // 2
        batches.append(largest[half:] if half else [~shortest])
        if half:
            del largest[half:]
    return batches


class Plan:
    """Every epoch's optimizer steps, and each rank's share of them.

    Args:
        lengths: expanded tokens of each row.
        costs: relative cost of each row, to share a step's micro-batches evenly; any unit.
        budget: tokens per micro-batch.
        rows_per_batch: exact rows per micro-batch, or None to fill up to `budget`.
        epochs: how many epochs may be asked for.
        seed: of the order of rows and batches.
        world_size, accumulation: their product is the number of micro-batches in a step.
        shuffle: False keeps rows in order (evaluation).
        copies: how often each row comes in an epoch; of a fraction, that share of its source's rows is drawn anew each epoch; None for once each.
        sources: number of each row's source; None if all have the same.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        costs: Sequence[float],
        budget: int,
        rows_per_batch: int | None,
        epochs: int,
        seed: int,
        world_size: int = 1,
        accumulation: int = 1,
        shuffle: bool = True,
        copies: Sequence[float] | np.ndarray | None = None,
        sources: Sequence[int] | np.ndarray | None = None,
    ):
        self.lengths, self.costs, self.budget, self.rows_per_batch = lengths, costs, budget, rows_per_batch
        self.seed, self.world_size, self.accumulation, self.shuffle = seed, world_size, accumulation, shuffle
        self.copies = None if copies is None or all(copy == 1 for copy in copies) else np.asarray(copies)
        self.sources = np.zeros(len(lengths), np.int64) if sources is None else np.asarray(sources)
        most, step = max(len(self._packed(epoch)) for epoch in range(epochs)), world_size * accumulation
        self.batches_per_epoch = -(-most // step) * step  # whole steps, so that the plan does not depend on the ranks

    @property
    def fingerprint(self) -> str:
        """The same for the same micro-batches, however many ranks share them; the number of steps in an epoch is not part of it."""
        settings = (self.budget, self.rows_per_batch, self.seed, self.world_size * self.accumulation, self.shuffle)
        content = hashlib.sha256(repr(settings).encode())
        for values in (self.lengths, self.sources, () if self.copies is None else self.copies):
            content.update(np.asarray(values, np.float64).tobytes())
        return content.hexdigest()

    @property
    def batches_per_rank(self) -> int:
        """Micro-batches that each rank sees in an epoch."""
        return self.batches_per_epoch // self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return -(-self.batches_per_rank // self.accumulation)

    def _packed(self, epoch: int) -> list[MicroBatch]:
        order = self._drawn(epoch)
        if self.shuffle:
            random.Random(f"{self.seed} rows {epoch}").shuffle(order)
        return pack(self.lengths, self.budget, order, self.rows_per_batch)

    def _drawn(self, epoch: int) -> list[int]:
        """The rows of an epoch, in order of their numbers."""
        if self.copies is None:
            return list(range(len(self.lengths)))
        times = np.floor(self.copies).astype(np.int64)
        for source in np.unique(self.sources[self.copies != times]):
            rows = np.flatnonzero(self.sources == source)
            share = float(self.copies[rows[0]] - times[rows[0]])
            drawn = random.Random(f"{self.seed} copies {epoch} {source}").sample(rows.tolist(), max(1, round(len(rows) * share)))
            times[drawn] += 1
        return np.repeat(np.arange(len(times)), times).tolist()  # type: ignore[no-any-return]

    @property
    def rows_per_epoch(self) -> int:
        """Rows in the first epoch, copies counted."""
        return len(self._drawn(0))

    def steps(self, epoch: int) -> list[list[MicroBatch]]:
        """The epoch's optimizer steps; every row drawn for the epoch stands in it as often as it was drawn. `~row` is a filler: that row at zero weight."""
        shortest = min(range(len(self.lengths)), key=self.lengths.__getitem__)
        batches = split_to(self._packed(epoch), self.batches_per_epoch, shortest)
        if self.shuffle:
            random.Random(f"{self.seed} batches {epoch}").shuffle(batches)
        size = self.world_size * self.accumulation
        return [batches[start : start + size] for start in range(0, len(batches), size)]

    def share(self, epoch: int, rank: int) -> list[MicroBatch]:
        """One rank's micro-batches of an epoch, in order: of each step equally many, dealt by falling cost, back and forth."""
        mine = []
        for step in self.steps(epoch):
            by_cost = sorted(step, key=lambda batch: -sum(self.costs[max(row, ~row)] for row in batch))
            for start in range(0, len(by_cost), self.world_size):
                turn = by_cost[start : start + self.world_size]
                mine.append(turn[rank if (start // self.world_size) % 2 == 0 else -1 - rank])
        return mine


class PlanSampler(Sampler[MicroBatch]):
    """One rank's micro-batches of the epoch set by `set_epoch`, for a `DataLoader`'s `batch_sampler`."""

    def __init__(self, plan: Plan, rank: int):
        self.plan, self.rank, self.epoch = plan, rank, 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.plan.batches_per_rank

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self.plan.share(self.epoch, self.rank))


class PlanLoader(DataLoader[torch.Tensor]):
    """A `DataLoader` over a `PlanSampler` that takes the epoch, as trainers tell it, and raises the errors that its workers hand over."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, InputError):
                raise batch
            yield batch

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the next iteration."""
        assert isinstance(self.batch_sampler, PlanSampler)
        self.batch_sampler.set_epoch(epoch)
