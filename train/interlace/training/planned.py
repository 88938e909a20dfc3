"""What feeds a trainer: rows as the plan packs them, a micro-batch at a time."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import TrainingArguments

from interlace.data.batch import Collator, NumberedRows, PackedBatch
from interlace.data.packing import Plan, PlanLoader, PlanSampler
from interlace.data.reading import Row
from interlace.errors import InputError
from interlace.model.forward import FrozenTower, model_inputs
from interlace.model.loading import Processing
from interlace.model.tuning import TunedModel
from interlace.training.durable import DurableTrainer
from interlace.training.restoring import Survival
from interlace.training.stopping import leave_signals_to_parent


@dataclass(frozen=True)
class PlannedRows:
    """Rows and the plan that batches them."""

    rows: Sequence[Row]
    plan: Plan

    def collator(self, processing: Processing, tower: FrozenTower | None) -> Collator:
        """What makes a batch of some of them."""
        cache = None if tower is None else tower.cache
        shares = self.plan.prefixes is not None
        return processing.collator(shares, None if cache is None else cache.store)

    def loader(self, collator: Collator, args: TrainingArguments, pin: bool) -> PlanLoader:
        """This rank's micro-batches, epoch by epoch."""
        workers = args.dataloader_num_workers
        return PlanLoader(
            NumberedRows(self.rows),  # type: ignore[arg-type]
            batch_sampler=PlanSampler(self.plan, args.process_index),
            collate_fn=collator,
            num_workers=workers,
            pin_memory=pin and args.device.type == "cuda",
            persistent_workers=workers > 0 and args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=leave_signals_to_parent,
            multiprocessing_context=args.dataloader_multiprocessing_context if workers else None,
        )


class PlannedTrainer(DurableTrainer):
    """A `Trainer` whose batches are those of a plan.

    Args:
        tuned, processing, survival: see `DurableTrainer`.
        train, evaluation: rows with their plans.
        others: arguments of `Trainer`.
    """

    def __init__(self, tuned: TunedModel, processing: Processing, survival: Survival, train: PlannedRows, evaluation: PlannedRows | None, **others: Any):
        self.train_rows, self.eval_rows = train, evaluation
        placeholder = NumberedRows(train.rows)
        super().__init__(tuned, processing, survival, train_dataset=placeholder, eval_dataset=placeholder if evaluation else None, **others)

    def get_train_dataloader(self) -> PlanLoader:  # type: ignore[override]
        """This rank's micro-batches; the plan has already shared them, so accelerate must not."""
        return self.train_rows.loader(self.train_rows.collator(self.processing, self.tuned.tower), self.args, self.args.dataloader_pin_memory)

    def num_examples(self, dataloader: Any) -> int:
        """Rows of the training set."""
        return len(self.train_rows.rows)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: Hugging Face's estimate knows neither images nor packing."""
        return 0

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs.to(self.args.device)

    def names_of(self, row_numbers: Sequence[int]) -> Sequence[str]:
        """File and index of training rows."""
        return names(self.train_rows.rows, row_numbers)

    def batches(self, planned: PlannedRows) -> Iterator[tuple[PackedBatch, dict[str, Any]]]:
        """This rank's micro-batches of some rows in order, on its device, with what the model is called with; a wish to stop ends them on all ranks at once."""
        batches = iter(planned.loader(planned.collator(self.processing, self.tuned.tower), self.args, pin=False))
        for _ in range(planned.plan.batches_per_rank):
            taken, problem = take(batches, 1)
            self.check_stop(problem)
            self.survival.watch.at(self.state.global_step, "evaluating", partial(names, planned.rows, taken[0].row_numbers))
            batch = taken[0].to(self.args.device)
            yield batch, model_inputs(batch, self.tuned.tower)


def take(batches: Iterator[PackedBatch | InputError], count: int) -> tuple[list[PackedBatch], str | None]:
    """The next batches, or what is wrong with one of them: loaders raise it, and Hugging Face's, after a resume inside an epoch, hand it over."""
    try:
        taken = list(itertools.islice(batches, count))
    except InputError as error:
        return [], str(error)
    problem = next((str(batch) for batch in taken if isinstance(batch, InputError)), None)
    return ([], problem) if problem else (taken, None)  # type: ignore[return-value]


def names(rows: Sequence[Row], numbers: Sequence[int]) -> list[str]:
    """File and index of rows; `~row` is a filler of the plan."""
    chosen = [rows[max(number, ~number)] for number in numbers]
    return [f"{row.file}: row {row.index}" for row in chosen]
