"""Loss spikes with their rows: micro-batches whose mean loss per token stands far above what the run has lately seen.

Losses stay on the device until the trainer logs; looking at them then costs one transfer for all, and a running step nothing.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from interlace.data.reading import Row
from interlace.training.row_losses import row_sums

WINDOW = 256  # micro-batches whose losses are remembered
FEWEST = 32  # of them before anything is called a spike
DEVIATIONS = 6.0  # robust standard deviations above the median, of logarithms
LEAST_FACTOR = 1.5  # above the median: losses that hardly vary raise no alarm over trifles
MOST_WAITING = 4096  # micro-batches between two looks: a run that never logs keeps no more
_SMALLEST_LOSS = 1e-6
_MAD_TO_DEVIATION = 1.4826  # of a normal distribution


@dataclass(frozen=True)
class RowLoss:
    """A row of a spike: its place in the data, its mean loss per token, and how much weight its tokens have."""

    file: str
    index: int
    loss: float
    weight: float


@dataclass(frozen=True)
class Spike:
    """A micro-batch whose mean `loss` per token is above `threshold`; `rows` by falling loss."""

    step: int
    rank: int
    loss: float
    threshold: float
    rows: tuple[RowLoss, ...]

    def line(self) -> str:
        """One line for people."""
        worst = self.rows[0]
        others = f", and {len(self.rows) - 1} more in the micro-batch" if len(self.rows) > 1 else ""
        return (
            f"loss spike at step {self.step}, rank {self.rank}: {self.loss:.3f} is above {self.threshold:.3f}; "
            f"highest in {worst.file}: row {worst.index} ({worst.loss:.3f}){others}"
        )


@dataclass
class LossWindow:
    """Logarithms of the losses of late, and the threshold that follows: their median plus six robust standard deviations, by the median absolute deviation.

    Losses are positive and vary by factors, more so with small micro-batches: their logarithms are near a normal distribution where they themselves have a
    long tail, which would be false alarms. Median and deviation ignore outliers, so one spike does not hide the next, as it would by raising a mean and a
    variance. A level that the loss has risen to for good becomes the new normal once it fills half of the window.
    """

    logarithms: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def threshold(self) -> float:
        """The highest loss that is no spike; infinite while too few are known."""
        if len(self.logarithms) < FEWEST:
            return math.inf
        median = statistics.median(self.logarithms)
        deviation = _MAD_TO_DEVIATION * statistics.median(abs(loss - median) for loss in self.logarithms)
        return math.exp(median + max(DEVIATIONS * deviation, math.log(LEAST_FACTOR)))

    def spikes(self, losses: Iterable[float]) -> Iterable[tuple[int, float]]:
        """(number, threshold) of the losses above the threshold of those before them; takes all into the window. What is not finite is no spike."""
        for number, loss in enumerate(losses):
            limit = self.threshold()
            if limit < loss < math.inf:
                yield number, limit
            if math.isfinite(loss):
                self.logarithms.append(math.log(max(loss, _SMALLEST_LOSS)))


@dataclass
class LossRecord:
    """What one rank has trained on since the last log: sums of loss and weight of each row, on the device.

    Args:
        rank: of this process.
    """

    rank: int
    window: LossWindow = field(default_factory=LossWindow)
    _waiting: deque[tuple[int, torch.Tensor, tuple[int, ...]]] = field(default_factory=lambda: deque(maxlen=MOST_WAITING))

    def add(self, step: int, log_probs: torch.Tensor, weights: torch.Tensor, sequence_index: torch.Tensor, row_numbers: Sequence[int]) -> torch.Tensor:
        """Notes a micro-batch; nothing waits for the device. Returns (2, sequences) sums of loss and of weight.

        Args:
            step: the optimizer step that it belongs to.
            log_probs, weights, sequence_index: (N,) as in `PackedBatch` and `RowScores`.
            row_numbers: data set row of each sequence; a filler's is negative, and it has no weight.
        """
        sums = row_sums(log_probs, weights, sequence_index, len(row_numbers))
        self._waiting.append((step, sums, tuple(row_numbers)))
        return sums

    def look(self, dataset: Sequence[Row]) -> list[Spike]:
        """The spikes among the micro-batches since the last look, in order; forgets these.

        Args:
            dataset: the rows that `row_numbers` counts.
        """
        waiting = list(self._waiting)
        self._waiting.clear()
        if not waiting:
            return []
        sizes = [len(rows) for _, _, rows in waiting]
        parts = torch.cat([sums for _, sums, _ in waiting], 1).cpu().double().split(sizes, 1)
        weighed = [(number, part) for number, part in enumerate(parts) if part[1].sum() > 0]
        found = []
        for place, threshold in self.window.spikes([float(part[0].sum() / part[1].sum()) for _, part in weighed]):
            number, (losses, weights) = weighed[place][0], weighed[place][1].tolist()
            step, _, numbers = waiting[number]
            rows = [
                RowLoss(dataset[row].file, dataset[row].index, loss / weight, weight)
                for row, loss, weight in zip(numbers, losses, weights, strict=True)
                if weight > 0
            ]
            found.append(Spike(step, self.rank, sum(losses) / sum(weights), threshold, tuple(sorted(rows, key=lambda row: -row.loss))))
        return found


def report_spikes(spikes: Iterable[Spike], path: Path) -> None:
    """Prints a line for each spike and appends it to a file, one JSON object per line; steps that a resumed run makes again are written again."""
    for spike in spikes:
        tqdm.write(spike.line())
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(spike), ensure_ascii=False) + "\n")
