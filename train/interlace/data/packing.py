"""Lengths and costs -> an epoch's plan: optimizer steps, each a list of micro-batches made without knowing the ranks.

Every micro-batch holds at most `budget` tokens; every step has world size x accumulation of them, of nearly equal cost. All epochs have the same number of
steps, so the plan's state is (epoch, step).
"""

import hashlib
import heapq
import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from interlace.errors import InputError

MicroBatch = list[int]
_OPEN_BATCHES = 64  # how many unfilled micro-batches are kept to find a place for the next row
_WINDOW = 8  # steps whose micro-batches are sorted by cost, so that those of a step take equally long


def token_budget(lengths: Sequence[int] | np.ndarray, rows_per_batch: int, max_tokens_per_batch: int | None) -> int:
    """Tokens per micro-batch: what the user says, else rows_per_batch times the mean length; never below the longest row."""
    wanted = max_tokens_per_batch or round(rows_per_batch * sum(lengths) / len(lengths))
    return max(wanted, int(max(lengths)))


def pack(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Items of these sizes, in order -> groups of at most `budget` together, as positions; each goes into the fullest open group it fits (best fit)."""
    done: list[list[int]] = []
    rooms: list[int] = []  # what is left in each open group, ascending
    groups: list[list[int]] = []
    for item, size in enumerate(sizes):
        place = bisect_left(rooms, size)
        if place < len(rooms):
            room, group = rooms.pop(place) - size, groups.pop(place)
            group.append(item)
        else:
            if len(rooms) == _OPEN_BATCHES:
                done.append(groups.pop(0))
                del rooms[0]
            room, group = budget - size, [item]
        place = bisect_left(rooms, room)
        rooms.insert(place, room)
        groups.insert(place, group)
    return done + groups


def pack_rows(order: Sequence[int], lengths: Sequence[int], budget: int, prefixes: "Prefixes | None" = None) -> list[MicroBatch]:
    """Rows in `order` -> micro-batches of at most `budget` tokens, rows that share a prefix together."""
    if prefixes is None:
        return [[order[item] for item in group] for group in pack([lengths[row] for row in order], budget)]
    units, sizes = prefixes.units(order, lengths, budget)
    return [[row for item in group for row in units[item]] for group in pack(sizes, budget)]


def split_to(batches: list[MicroBatch], count: int, shortest: int) -> list[MicroBatch]:
    """Splits the micro-batches with most rows until there are `count`; when all hold one row, adds `~shortest`: that row once more, at zero weight."""
    batches = list(batches)
    largest = [(-len(batch), i) for i, batch in enumerate(batches)] if len(batches) < count else []
    heapq.heapify(largest)
    while len(batches) < count:
        size, i = heapq.heappop(largest)
        half = -size // 2
        if not half:
            return batches + [[~shortest]] * (count - len(batches))
        batches[i], rest = batches[i][:half], batches[i][half:]
        heapq.heappush(largest, (-half, i))
        heapq.heappush(largest, (-len(rest), len(batches)))
        batches.append(rest)
    return batches


@dataclass(frozen=True)
class Prefixes:
    """Which rows begin alike and may share what they begin with in a micro-batch.

    groups: (N,) number of each row's prefix, -1 for a row that shares nothing. lengths, num_images, costs: of the prefixes, by their numbers; the rows' own
    contain them. max_rows: how many rows may share one in a micro-batch.
    """

    groups: np.ndarray
    lengths: np.ndarray
    num_images: np.ndarray
    costs: np.ndarray
    max_rows: int

    def units(self, order: Sequence[int], lengths: Sequence[int], budget: int) -> tuple[list[list[int]], list[int]]:
        """Rows in order -> rows that share a prefix together, where the first of them stood; and the tokens of each such unit, at most `budget`."""
        groups, prefix_lengths = self.groups.tolist(), self.lengths.tolist()
        units: list[list[int]] = []
        sizes: list[int] = []
        open_units: dict[int, int] = {}
        for row in order:
            group, length = groups[row], lengths[row]
            if group >= 0:
                unit = open_units.get(group)
                if unit is not None and len(units[unit]) < self.max_rows and sizes[unit] + length - prefix_lengths[group] <= budget:
                    units[unit].append(row)
                    sizes[unit] += length - prefix_lengths[group]
                    continue
                open_units[group] = len(units)
            units.append([row])
            sizes.append(length)
        return units, sizes

    def shared(self, batch: MicroBatch, values: np.ndarray) -> float:
        """What a micro-batch saves of a value of the prefixes (their lengths or costs) by having each only once."""
        counts = Counter(self.groups[max(row, ~row)] for row in batch)
        return float(sum((count - 1) * values[group] for group, count in counts.items() if group >= 0))


class Plan:
    """Every epoch's optimizer steps, and each rank's share of them.

    Args:
        lengths: expanded tokens of each row.
        costs: of each row, in any unit, to make the micro-batches of a step equally long.
        budget: tokens per micro-batch.
        rows_per_batch: exact rows per micro-batch, or None to fill up to `budget`.
        epochs: how many epochs may be asked for.
        seed: of the order of rows and batches.
        world_size, accumulation: their product is the number of micro-batches in a step.
        shuffle: False keeps rows in order (evaluation).
        copies: how often each row comes in an epoch; of a fraction, that share of its source's rows is drawn anew each epoch; None for once each.
        sources: number of each row's source; None if all have the same.
        prefixes: what rows may share; None if nothing.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        costs: Sequence[float] | np.ndarray,
        budget: int,
        rows_per_batch: int | None,
        epochs: int,
        seed: int,
        world_size: int = 1,
        accumulation: int = 1,
        shuffle: bool = True,
        copies: Sequence[float] | np.ndarray | None = None,
        sources: Sequence[int] | np.ndarray | None = None,
        prefixes: Prefixes | None = None,
    ):
        self.lengths, self.budget, self.rows_per_batch, self.prefixes = lengths, budget, rows_per_batch, prefixes
        self.costs: list[float] = np.asarray(costs, np.float64).tolist()
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
        shared = () if self.prefixes is None else (self.prefixes.groups, self.prefixes.lengths, self.prefixes.costs, [self.prefixes.max_rows])
        for values in (self.lengths, self.costs, self.sources, () if self.copies is None else self.copies, *shared):
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
        if self.rows_per_batch is None:
            return pack_rows(order, self.lengths, self.budget, self.prefixes)
        if self.prefixes is not None:
            order = [row for unit in self.prefixes.units(order, self.lengths, sum(self.lengths))[0] for row in unit]
        return [order[start : start + self.rows_per_batch] for start in range(0, len(order), self.rows_per_batch)]

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

    def cost(self, batch: MicroBatch) -> float:
        """What a micro-batch costs, in the unit of `costs`."""
        total = float(sum(self.costs[max(row, ~row)] for row in batch))
        return total if self.prefixes is None else total - self.prefixes.shared(batch, self.prefixes.costs)

    def num_tokens(self, batch: MicroBatch) -> int:
        """Tokens of a micro-batch, what its rows share counted once."""
        total = sum(self.lengths[max(row, ~row)] for row in batch)
        return total if self.prefixes is None else total - int(self.prefixes.shared(batch, self.prefixes.lengths))

    def steps(self, epoch: int) -> list[list[MicroBatch]]:
        """The epoch's optimizer steps; every row drawn for the epoch stands in it as often as it was drawn. `~row` is a filler: that row at zero weight.

        Micro-batches are shuffled, and sorted by cost within windows of some steps, so that those of one step cost nearly the same; then steps are shuffled.
        The very first step is the one with the costliest micro-batch: what does not fit into memory ends a run at once, not after a day.
        """
        shortest = min(range(len(self.lengths)), key=self.lengths.__getitem__)
        batches, size = split_to(self._packed(epoch), self.batches_per_epoch, shortest), self.world_size * self.accumulation
        if self.shuffle:
            random.Random(f"{self.seed} batches {epoch}").shuffle(batches)
        if size > 1:
            windows = (batches[start : start + _WINDOW * size] for start in range(0, len(batches), _WINDOW * size))
            batches = [batch for window in windows for batch in sorted(window, key=self.cost)]
        steps = [batches[start : start + size] for start in range(0, len(batches), size)]
        if self.shuffle:
            random.Random(f"{self.seed} steps {epoch}").shuffle(steps)
        if self.shuffle and epoch == 0:
            steps.insert(0, steps.pop(max(range(len(steps)), key=lambda number: max(map(self.cost, steps[number])))))
        return steps

    def share(self, epoch: int, rank: int) -> list[MicroBatch]:
        """One rank's micro-batches of an epoch, in order: of each step equally many, dealt by falling cost, back and forth."""
        mine = []
        for step in self.steps(epoch):
            by_cost = sorted(step, key=self.cost, reverse=True)
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
