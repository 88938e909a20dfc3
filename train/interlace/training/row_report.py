"""The row report: what training found out about single rows, as a table, a summary, and a list of rows that the next run may leave out."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch

from interlace.data.dataset import Rows
from interlace.data.duplicates import likeness
from interlace.data.packing import Plan
from interlace.data.row_lists import Excluded, write_list
from interlace.data.sources import Source
from interlace.data.store import SKIPPED
from interlace.training.row_flags import LIMIT, excesses, judged
from interlace.training.row_losses import RowLosses, row_sums
from interlace.training.trainer import PackedTrainer
from interlace.training.views import BlankRows, some_of
from interlace.training.views import sample as rows_with_images

TABLE, SUMMARY, DROP_LIST = "row_report.parquet", "row_report.json", "row_drop.json"
DROPPED = ("likely_mislabel", "duplicate")  # the flags that put a row on the list
MEANINGS = {
    "likely_mislabel": "far above rows like it after the first epoch, and less likely than not: look at its answer",
    "high_loss": "far above rows like it, in a run of one epoch",
    "duplicate": "says the same as an earlier row, with the same images",
    "conflict": "asks the same as another row, with the same images, and answers otherwise",
    "forgotten": "learned in one epoch, lost in a later one",
    "images_not_needed": "as easy with blank images: they do not help to answer it",
    "not_finite": "its loss was not finite",
    "not_trained": "the run ended before its turn",
}
_LISTED = 100  # rows of the summary
_EASIER = 1.05  # blank images cost less than this factor


@dataclass(frozen=True)
class Measured:
    """What all ranks have measured: losses of training, and mean losses with `own` and `blank` images of some rows (`numbers`)."""

    losses: RowLosses
    numbers: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    own: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    blank: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))


def measure(trainer: PackedTrainer, num_images: int) -> Measured:
    """Gathers every rank's row losses, and scores up to `num_images` rows with their own and with blank images; to be called by all ranks.

    Raises:
        InputError: an image cannot be read any more.
        Stopped: the run was asked to stop.
    """
    assert trainer.row_losses is not None
    rows, train = trainer.train_rows.rows, trainer.train_rows
    losses = _gathered(trainer, trainer.row_losses)
    numbers = rows_with_images(rows, num_images) if isinstance(rows, Rows) and num_images else np.zeros(0, np.int64)
    if not len(numbers):
        return Measured(losses)
    own = some_of(train, numbers)
    return Measured(losses, numbers, _scored(trainer, own), _scored(trainer, BlankRows(own.rows, own.plan)))


def _gathered(trainer: PackedTrainer, own: RowLosses) -> RowLosses:
    whole = RowLosses(own.num_rows, own.fingerprint)
    whole.is_whole = own.is_whole
    for parts in trainer.survival.ranks.gather(own.parts()):
        whole.take(parts)
    return whole


@torch.no_grad()
def _scored(trainer: PackedTrainer, planned: Any) -> np.ndarray:
    """(rows,) the trained model's mean loss per token."""
    packed, found = trainer.callable_model, RowLosses(len(planned.rows), "")
    training = packed.training
    packed.eval()
    for batch, values in trainer.batches(planned):
        log_probs = packed(**values).log_probs
        found.add(0, row_sums(log_probs, batch.weights, batch.sequence_index, len(batch.row_numbers)), batch.row_numbers)
    packed.train(training)
    return _gathered(trainer, found).means()[1][:, 0]


@dataclass(frozen=True)
class RowReport:
    """All (rows,) but `losses` (rows, epochs): means per supervised token, NaN where a row was not trained.

    epochs: counted from 0. index, files: where a row stands, `files` by the number of its store. score: see `row_flags`. duplicate_of, conflicts_with: row
    numbers, or -1. gap: how much blank images add to the loss; NaN where that was not measured. flags: name -> whether it is raised.
    """

    rows: Rows
    epochs: list[int]
    losses: np.ndarray
    index: np.ndarray
    score: np.ndarray
    duplicate_of: np.ndarray
    conflicts_with: np.ndarray
    gap: np.ndarray
    flags: dict[str, np.ndarray]

    @classmethod
    def of(cls, rows: Rows, plan: Plan, measured: Measured) -> "RowReport":
        """The report on the rows of a run that followed `plan`."""
        epochs, losses = measured.losses.means()
        steps = [_steps(plan, epoch, len(rows)) for epoch in epochs]
        columns = [excesses(losses[:, i], steps[i], rows.sources, rows.supervised) for i in range(len(epochs))]
        score, flags = judged(losses, np.stack(columns, 1) if columns else np.zeros((len(rows), 0)))
        index = np.concatenate([store.column("index")[store.column("status") != SKIPPED] for store in rows.stores])
        names = np.array([store.file for store in rows.stores])[rows.sources]
        alike = likeness(rows, show_progress=True)
        # a row that two entries name is no duplicate of itself
        itself = (alike.duplicate_of >= 0) & (index == index[alike.duplicate_of]) & (names == names[alike.duplicate_of])
        duplicate_of = np.where(itself, -1, alike.duplicate_of)
        gap = np.full(len(rows), np.nan, np.float32)
        gap[measured.numbers] = measured.blank - measured.own
        unneeded = np.zeros(len(rows), bool)
        unneeded[measured.numbers] = measured.blank < measured.own * _EASIER
        flags |= {"duplicate": duplicate_of >= 0, "conflict": alike.conflicts_with >= 0, "images_not_needed": unneeded}
        told = [name for name in MEANINGS if name != "not_trained" or measured.losses.is_whole]  # else the part before may have trained them
        return cls(rows, epochs, losses, index, score, duplicate_of, alike.conflicts_with, gap, {name: flags[name] for name in told})

    def file_of(self, number: int) -> str:
        """The file of a row."""
        return self.rows.stores[int(self.rows.sources[number])].file

    def name_of(self, number: int) -> str:
        """File and index of a row."""
        return f"{self.file_of(number)}: row {self.index[number]}"

    def suspects(self, most: int) -> list[int]:
        """Numbers of the rows to look at first: by flag in the order of `MEANINGS`, then by falling score; duplicates and what was not trained left out."""
        found: list[int] = []
        for name in ("likely_mislabel", "high_loss", "conflict", "forgotten", "not_finite"):
            raised = np.flatnonzero(self.flags[name])
            order = raised[np.argsort(-np.nan_to_num(self.score[raised], nan=-np.inf), kind="stable")]
            found += [number for number in order[:most].tolist() if number not in found]
        return found[:most]

    def entry(self, number: int) -> dict[str, Any]:
        """A row for reading; numbers that JSON has no word for are null."""
        found: dict[str, Any] = {"file": self.file_of(number), "index": int(self.index[number])}
        found |= {"losses": [_number(loss) for loss in self.losses[number]], "score": _number(self.score[number])}
        found |= {"supervised_tokens": int(self.rows.supervised[number]), "num_images": int(self.rows.num_images[number])}
        found["flags"] = [name for name, raised in self.flags.items() if raised[number]]
        for name, other in (("duplicate_of", self.duplicate_of[number]), ("conflicts_with", self.conflicts_with[number])):
            found |= {name: self.name_of(int(other))} if other >= 0 else {}
        return found | ({} if np.isnan(self.gap[number]) else {"image_gap": _number(self.gap[number])})

    def files(self) -> list[dict[str, Any]]:
        """Of each file its rows, and the median loss of a row in each epoch."""
        found = []
        for number, store in enumerate(self.rows.stores):
            losses = self.losses[self.rows.sources == number]
            medians = [_number(np.median(column[np.isfinite(column)])) if np.isfinite(column).any() else None for column in losses.T]
            found.append({"file": store.file, "rows": len(losses), "median_losses": medians})
        return found

    def counts(self) -> dict[str, int]:
        """How many rows raise each flag."""
        return {name: int(raised.sum()) for name, raised in self.flags.items()}

    def write(self, output_dir: Path, sources: Sequence[Source]) -> None:
        """Writes table, summary and drop list; the list also holds what this run has left out already.

        Raises:
            OSError: the disk refuses.
        """
        pa.parquet.write_table(self.table(), output_dir / TABLE)
        suspects = [self.entry(number) for number in self.suspects(_LISTED)]
        summary = {"rows": len(self.rows), "epochs": [epoch + 1 for epoch in self.epochs], "score_limit": LIMIT, "files": self.files()}
        summary |= {"flags": {name: {"rows": count, "meaning": MEANINGS[name]} for name, count in self.counts().items()}, "suspects": suspects}
        (output_dir / SUMMARY).write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        rows: dict[str, dict[int, str]] = {source.file: {} for source in sources}
        for source in sources:
            rows[source.file] |= source.excluded
        for number in np.flatnonzero(np.logical_or.reduce([self.flags[name] for name in DROPPED])).tolist():
            rows[self.file_of(number)].setdefault(int(self.index[number]), self._reason(number))
        fingerprints = {source.file: source.fingerprint for source in sources}
        write_list(output_dir / DROP_LIST, fingerprints, {file: [Excluded(*item) for item in sorted(found.items())] for file, found in rows.items()})

    def _reason(self, number: int) -> str:
        reasons = [f"duplicate of {self.name_of(int(self.duplicate_of[number]))}"] if self.duplicate_of[number] >= 0 else []
        if self.flags["likely_mislabel"][number]:
            losses = ", ".join(f"{loss:.2f}" for loss in self.losses[number] if not np.isnan(loss))
            reasons.append(f"likely mislabel: loss by epoch {losses}")
        return "; ".join(reasons)

    def table(self) -> pa.Table:
        """A line for each row that was admitted."""
        names = pa.array([store.file for store in self.rows.stores])
        columns: dict[str, Any] = {"file": pa.DictionaryArray.from_arrays(pa.array(self.rows.sources.astype(np.int32)), names), "index": self.index}
        columns |= {"supervised_tokens": self.rows.supervised, "num_images": self.rows.num_images}
        columns |= {f"loss_epoch_{epoch + 1}": pa.array(self.losses[:, i], from_pandas=True) for i, epoch in enumerate(self.epochs)}
        columns |= {"score": pa.array(self.score, from_pandas=True), "image_gap": pa.array(self.gap, from_pandas=True)}
        for name, others in (("duplicate_of", self.duplicate_of), ("conflicts_with", self.conflicts_with)):
            columns[name] = pa.array(others, mask=others < 0)  # the number of a line of this table
        return pa.table(columns | self.flags)


def _steps(plan: Plan, epoch: int, num_rows: int) -> np.ndarray:
    """(rows,) the step of an epoch that a row comes in, the last one if there are several."""
    steps = np.zeros(num_rows, np.int64)
    for number, step in enumerate(plan.steps(epoch)):
        steps[[row for batch in step for row in batch if row >= 0]] = number
    return steps


def _number(value: Any) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None
