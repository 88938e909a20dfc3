"""What the trainers share: packed batches and their plan under Hugging Face's `Trainer`."""

import hashlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import speed_metrics

from interlace.data.batch import Collator, NumberedRows, PackedBatch
from interlace.data.packing import Plan, PlanLoader, PlanSampler
from interlace.data.reading import Row
from interlace.errors import InputError
from interlace.model.forward import RowScores, model_inputs
from interlace.model.loading import Processing
from interlace.model.losses import supervised_loss
from interlace.model.tuning import TunedModel, parameter_groups
from interlace.training.durable import DurableTrainer
from interlace.training.restoring import Survival
from interlace.training.spikes import report_spikes
from interlace.training.stopping import leave_signals_to_parent
from interlace.training.tracking import ProgressBar


@dataclass(frozen=True)
class PlannedRows:
    """Rows and the plan that batches them."""

    rows: Sequence[Row]
    plan: Plan


class PackedTrainer(DurableTrainer):
    """Hugging Face's `Trainer` on packed batches.

    Args:
        tuned: the model and what learns of it.
        processing: image processing for the collator; saved with every checkpoint.
        args: Hugging Face's arguments.
        train, evaluation: rows with their plans.
        rates: learning rates of parts that have their own.
        survival: what the run needs to outlive its accidents.
    """

    def __init__(
        self,
        tuned: TunedModel,
        processing: Processing,
        args: TrainingArguments,
        train: PlannedRows,
        evaluation: PlannedRows | None,
        rates: Mapping[str, float | None],
        callbacks: list[Any],
        survival: Survival,
    ):
        self.train_rows, self.eval_rows, self.rates = train, evaluation, dict(rates)
        placeholder = NumberedRows(train.rows)
        super().__init__(
            tuned, processing, survival, args=args, train_dataset=placeholder, eval_dataset=placeholder if evaluation else None, callbacks=callbacks
        )
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the whole step's token weight
        if not args.disable_tqdm:
            self.remove_callback(DEFAULT_PROGRESS_CALLBACK)
            self.add_callback(ProgressBar())
        self._epoch = 0
        self._last_log = time.perf_counter()
        self._waited_seconds = 0.0  # for data

    # --- data ---

    def _loader(self, planned: PlannedRows, pin: bool) -> PlanLoader:
        workers = self.args.dataloader_num_workers
        return PlanLoader(
            NumberedRows(planned.rows),  # type: ignore[arg-type]
            batch_sampler=PlanSampler(planned.plan, self.args.process_index),
            collate_fn=self._collator(planned),
            num_workers=workers,
            pin_memory=pin and self.args.device.type == "cuda",
            persistent_workers=workers > 0 and self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            worker_init_fn=leave_signals_to_parent,
            multiprocessing_context=self.args.dataloader_multiprocessing_context if workers else None,
        )

    def _collator(self, planned: PlannedRows) -> Collator:
        cache = None if self.tuned.tower is None else self.tuned.tower.cache
        shares = planned.plan.prefixes is not None
        return Collator(self.processing.process_images, self.processing.config.image_token_id, shares, None if cache is None else cache.store)

    def get_train_dataloader(self) -> PlanLoader:  # type: ignore[override]
        """This rank's micro-batches; the plan has already shared them, so accelerate must not."""
        return self._loader(self.train_rows, self.args.dataloader_pin_memory)

    def num_examples(self, dataloader: Any) -> int:
        """Rows of the training set."""
        return len(self.train_rows.rows)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: Hugging Face's estimate knows neither images nor packing."""
        return 0

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs.to(self.args.device)

    # --- the step ---

    def names_of(self, row_numbers: Sequence[int]) -> Sequence[str]:
        """File and index of training rows."""
        return _names(self.train_rows.rows, row_numbers)

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:  # type: ignore[override]
        self._epoch = epoch
        if self.tuned.tower is not None and self.tuned.tower.cache is not None:
            self.tuned.tower.cache.flush()
            self.survival.ranks.sum([0])  # what any rank has made is there for all
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    def get_batch_samples(  # type: ignore[override]
        self, epoch_iterator: Iterator[PackedBatch], num_batches: int, device: torch.device
    ) -> tuple[list[PackedBatch], float]:
        """A step's micro-batches, and the sum of their token weights over all ranks; the time spent waiting for data is counted."""
        start, step = time.perf_counter(), self.state.global_step + 1
        self.survival.watch.at(step, "waiting for data")
        batches, problem = _take(epoch_iterator, num_batches)
        self._waited_seconds += time.perf_counter() - start
        self.survival.watch.at(step, "agreeing on the step", lambda: self.names_of([number for batch in batches for number in batch.row_numbers]))
        return batches, self.agree(sum(float(batch.weights.sum()) for batch in batches), problem)

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: PackedBatch, return_outputs: bool = False, num_items_in_batch: float | None = None
    ) -> torch.Tensor:
        """The micro-batch's share of the step's mean loss per token, times the number of processes: DDP averages gradients."""
        assert num_items_in_batch is not None
        self.survival.watch.at(self.state.global_step + 1, "training", partial(self.names_of, inputs.row_numbers))
        torch.manual_seed(random_seed(self.args.seed, self._epoch, inputs.row_numbers[0]))
        scores: RowScores = model(**model_inputs(inputs, self.tuned.tower))
        counted = inputs.weights > 0
        self._counts[:2] += torch.stack([counted.sum(), (scores.is_top1 & counted).sum()])
        self._counts[2] += inputs.num_tokens
        self._counts[3] += inputs.num_images
        self._counts[4] += 0 if inputs.pixel_values is None else len(inputs.pixel_values)
        self._losses.add(self.state.global_step + 1, scores.log_probs, inputs.weights, inputs.sequence_index, inputs.row_numbers)
        loss = supervised_loss(scores.log_probs, inputs.weights, num_items_in_batch)
        self._in_step.append((loss.detach(), inputs.row_numbers))
        return loss * self.accelerator.num_processes

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that `optim` names, with groups per part."""
        if self.optimizer is None:
            decays = set(self.get_decay_parameter_names(self.tuned.packed))
            groups = parameter_groups(self.tuned, decays.__contains__, self.args.weight_decay, self.args.learning_rate, self.rates)
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.tuned.base)
            settings.pop("lr", None)
            self.optimizer = kind(groups, lr=self.args.learning_rate, **settings)
        return self.optimizer

    def _get_learning_rate(self) -> float:
        groups = {group["part"]: float(group["lr"]) for group in self.optimizer.param_groups}  # type: ignore[union-attr]
        return groups.get("language_model", next(iter(groups.values())))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds accuracy and throughput of all ranks since the last log to a training log."""
        if "loss" in logs:
            spikes, ranks = self._losses.look(self.train_rows.rows), self.survival.ranks
            supervised, right, tokens, images, encoded, waited, num_spikes = ranks.sum([*self._counts.tolist(), self._waited_seconds, len(spikes)])
            if num_spikes:
                found = [spike for of_rank in ranks.gather(spikes) for spike in of_rank]
                if ranks.is_main:
                    try:
                        report_spikes(found, self.survival.saver.output_dir / "loss_spikes.jsonl")
                    except OSError as error:  # a full disk; the next checkpoint will tell whether the run has to end
                        tqdm.write(f"warning: loss_spikes.jsonl could not be written: {error}")
            seconds = time.perf_counter() - self._last_log - self._paused_seconds
            logs["token_accuracy"] = right / max(supervised, 1)
            logs["supervised_tokens"] = supervised
            logs["tokens_per_second"] = tokens / seconds
            logs["images_per_second"] = images / seconds
            logs["images_encoded"] = encoded
            logs |= {"skipped_steps": self.skipped_steps} if self.skipped_steps else {}
            logs["data_wait_share"] = waited / seconds / self.accelerator.num_processes
            self._counts.zero_()
            self._last_log, self._paused_seconds, self._waited_seconds = time.perf_counter(), 0.0, 0.0
        super().log(logs, start_time)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._last_log = time.perf_counter()
        return super()._inner_training_loop(*args, **kwargs)

    # --- evaluation ---

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Mean loss per supervised token and token accuracy over the evaluation rows of all ranks."""
        assert self.eval_rows is not None
        # an engine that shares weights out has to be called itself, to gather them
        packed, start = self.model_wrapped if self.is_deepspeed_enabled else self.tuned.packed, time.time()
        training = packed.training
        packed.eval()
        totals = torch.zeros(4, dtype=torch.float64, device=self.args.device)  # weighted loss, weight, right, supervised
        rows = self.eval_rows.rows
        batches = iter(self._loader(self.eval_rows, pin=False))
        for _ in range(self.eval_rows.plan.batches_per_rank):
            taken, problem = _take(batches, 1)
            self.check_stop(problem)
            (batch,) = taken
            self.survival.watch.at(self.state.global_step, "evaluating", partial(_names, rows, batch.row_numbers))
            batch = batch.to(self.args.device)
            scores: RowScores = packed(**model_inputs(batch, self.tuned.tower))
            counted = batch.weights > 0
            totals += torch.stack([-(scores.log_probs * batch.weights).sum(), batch.weights.sum(), (scores.is_top1 & counted).sum(), counted.sum()])
        loss, weight, right, supervised = self.survival.ranks.sum(totals.tolist())
        packed.train(training)
        metrics = {f"{metric_key_prefix}_loss": loss / weight, f"{metric_key_prefix}_token_accuracy": right / max(supervised, 1)}
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=len(self.eval_rows.rows))
        self._paused_seconds += time.time() - start
        self._evaluated_step = self.state.global_step
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def random_seed(seed: int, epoch: int, row: int) -> int:
    """What dropout is drawn from in the micro-batch that begins with a row: the same on whichever rank, after whatever came before."""
    return int.from_bytes(hashlib.sha256(f"{seed} {epoch} {row}".encode()).digest()[:8], "little") >> 1


def _take(batches: Iterator[PackedBatch | InputError], count: int) -> tuple[list[PackedBatch], str | None]:
    """The next batches, or what is wrong with one of them: loaders raise it, and Hugging Face's, after a resume inside an epoch, hand it over."""
    try:
        taken = list(itertools.islice(batches, count))
    except InputError as error:
        return [], str(error)
    problem = next((str(batch) for batch in taken if isinstance(batch, InputError)), None)
    return ([], problem) if problem else (taken, None)  # type: ignore[return-value]


def _names(rows: Sequence[Row], numbers: Sequence[int]) -> list[str]:
    """File and index of rows; `~row` is a filler of the plan."""
    chosen = [rows[max(number, ~number)] for number in numbers]
    return [f"{row.file}: row {row.index}" for row in chosen]
