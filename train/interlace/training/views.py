"""The same pairs with other images: does a preference look at what is shown?"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch

from interlace.data.batch import Collator, ProcessImages
from interlace.data.dataset import Rows
from interlace.data.packing import Plan, token_budget
from interlace.data.reading import Row
from interlace.data.store import Store
from interlace.model.forward import FrozenTower
from interlace.model.loading import Processing
from interlace.training.planned import PlannedRows


@dataclasses.dataclass(frozen=True)
class Chosen(Sequence[Row]):
    """Some rows of a data set, by their numbers; images: the row whose images each of them shows, itself or another one.

    `lengths`, `supervised` (N,), `stores`, `fingerprint`: see `Rows`.
    """

    rows: "Rows | Chosen"
    numbers: np.ndarray
    images: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return self.rows.lengths[self.numbers]

    @property
    def supervised(self) -> np.ndarray:
        return self.rows.supervised[self.numbers]

    @property
    def stores(self) -> list[Store]:
        return self.rows.stores

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.rows.fingerprint} {self.numbers.tolist()} {self.images.tolist()}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> Row:  # type: ignore[override]
        row = self.rows[int(self.numbers[place])]
        return row if self.numbers[place] == self.images[place] else dataclasses.replace(row, images=self.rows[int(self.images[place])].images)


@dataclasses.dataclass(frozen=True)
class BlankRows(PlannedRows):
    """Rows whose images are all of the mean colour."""

    def collator(self, processing: Processing, tower: FrozenTower | None) -> Collator:
        """See `PlannedRows`."""
        return dataclasses.replace(processing.collator(), process_images=_Blank(processing.process_images))


@dataclasses.dataclass(frozen=True)
class _Blank:
    process_images: ProcessImages

    def __call__(self, images: Sequence[PIL.Image.Image], image_tokens: Sequence[int] | None = None) -> torch.Tensor:
        return torch.zeros_like(self.process_images(images, image_tokens))  # normalised: zero is the mean colour


def some_of(planned: PlannedRows, numbers: np.ndarray, images: np.ndarray | None = None, rows_per_batch: int | None = None) -> PlannedRows:
    """These rows alone, in order, in micro-batches of the same kind.

    Args:
        images: the numbers of the rows whose images they show; None for their own.
        rows_per_batch: on average; None for as many tokens as the given plan allows.
    """
    assert isinstance(planned.rows, Rows | Chosen)
    rows = Chosen(planned.rows, numbers, numbers if images is None else images)
    lengths, plan = rows.lengths.tolist(), planned.plan
    budget = plan.budget if rows_per_batch is None else token_budget(lengths, rows_per_batch, None)
    costs = np.asarray(plan.costs)[numbers]
    return dataclasses.replace(planned, rows=rows, plan=Plan(lengths, costs, budget, None, 1, 0, plan.world_size, shuffle=False))


def sample(rows: Rows, count: int) -> np.ndarray:
    """Numbers of up to `count` rows with images, evenly spread."""
    with_images = np.flatnonzero(rows.num_images > 0)
    return with_images[np.unique(np.linspace(0, len(with_images) - 1, min(count, len(with_images))).astype(np.int64))] if len(with_images) else with_images


def partners(rows: Rows, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of these rows those that can show another one's images, which take as many tokens each, and the rows whose images they take."""
    known = {int(number): rows[int(number)] for number in numbers}
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, row in known.items():
        groups.setdefault(row.image_tokens, []).append(number)
    pairs = []
    for group in groups.values():
        for place, number in enumerate(group):
            others = (group[(place + step) % len(group)] for step in range(1, len(group)))
            other = next((other for other in others if not set(known[other].images) & set(known[number].images)), None)
            if other is not None:
                pairs.append((number, other))
    found = np.array(sorted(pairs), np.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1]
