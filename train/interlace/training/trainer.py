"""What the trainers share: packed batches and their plan under Hugging Face's `Trainer`."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import speed_metrics

from interlace.data.batch import Collator, NumberedRows, PackedBatch
from interlace.data.packing import Plan, PlanLoader, PlanSampler
from interlace.data.reading import Row
from interlace.model.forward import RowScores, model_inputs
from interlace.model.loading import Processing
from interlace.model.losses import supervised_loss
from interlace.model.tuning import TunedModel, parameter_groups
from interlace.training.checkpoint import load_tuned, save_tuned
from interlace.training.fragments import set_weights
from interlace.training.sharding import float32_weights, slice_weights
from interlace.training.tracking import ProgressBar


@dataclass(frozen=True)
class PlannedRows:
    """Rows and the plan that batches them."""

    rows: Sequence[Row]
    plan: Plan


class PackedTrainer(Trainer):
    """Hugging Face's `Trainer` on packed batches.

    Args:
        tuned: the model and what learns of it.
        processing: image processing for the collator; saved with every checkpoint.
        args: Hugging Face's arguments.
        train, evaluation: rows with their plans.
        rates: learning rates of parts that have their own.
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
    ):
        self.tuned, self.processing = tuned, processing
        self.train_rows, self.eval_rows, self.rates = train, evaluation, dict(rates)
        placeholder = NumberedRows(train.rows)
        super().__init__(model=tuned.packed, args=args, train_dataset=placeholder, eval_dataset=placeholder if evaluation else None, callbacks=callbacks)
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the whole step's token weight
        if not args.disable_tqdm:
            self.remove_callback(DEFAULT_PROGRESS_CALLBACK)
            self.add_callback(ProgressBar())
        # supervised tokens, right guesses among them, tokens, images since the last log
        self._counts = torch.zeros(4, dtype=torch.float64)
        self._last_log = time.perf_counter()
        self._paused_seconds = 0.0
        self._waited_seconds = 0.0  # for data

    # --- data ---

    def _loader(self, planned: PlannedRows, pin: bool) -> PlanLoader:
        workers = self.args.dataloader_num_workers
        return PlanLoader(
            NumberedRows(planned.rows),  # type: ignore[arg-type]
            batch_sampler=PlanSampler(planned.plan, self.args.process_index),
            collate_fn=Collator(self.processing.process_images, self.processing.config.image_token_id),
            num_workers=workers,
            pin_memory=pin and self.args.device.type == "cuda",
            persistent_workers=workers > 0 and self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context if workers else None,
        )

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

    def get_batch_samples(self, epoch_iterator: Iterator[PackedBatch], num_batches: int, device: torch.device) -> Any:
        """A step's micro-batches; the time spent waiting for them is counted."""
        return super().get_batch_samples(self._timed(epoch_iterator), num_batches, device)

    def _timed(self, batches: Iterator[PackedBatch]) -> Iterator[PackedBatch]:
        start = time.perf_counter()
        for batch in batches:
            self._waited_seconds += time.perf_counter() - start
            yield batch
            start = time.perf_counter()

    def _get_num_items_in_batch(self, batch_samples: list[PackedBatch], device: torch.device) -> torch.Tensor:  # type: ignore[override]
        weight = sum((batch.weights.sum() for batch in batch_samples), torch.zeros(())).to(device)
        return self.accelerator.reduce(weight, "sum")

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: PackedBatch, return_outputs: bool = False, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The micro-batch's share of the step's mean loss per token, times the number of processes: DDP averages gradients."""
        assert num_items_in_batch is not None
        scores: RowScores = model(**model_inputs(inputs, self.tuned.tower))
        counted = inputs.weights > 0
        right = (scores.is_top1 & counted).sum()
        self._counts += torch.tensor([counted.sum().item(), right.item(), inputs.num_tokens, inputs.num_images], dtype=torch.float64)
        return supervised_loss(scores.log_probs, inputs.weights, num_items_in_batch) * self.accelerator.num_processes

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
            counts = torch.cat([self._counts, torch.tensor([self._waited_seconds])]).to(self.args.device, torch.float32)
            supervised, right, tokens, images, waited = self.accelerator.reduce(counts, "sum").tolist()
            seconds = time.perf_counter() - self._last_log - self._paused_seconds
            logs["token_accuracy"] = right / max(supervised, 1)
            logs["supervised_tokens"] = supervised
            logs["tokens_per_second"] = tokens / seconds
            logs["images_per_second"] = images / seconds
            logs["data_wait_share"] = waited / seconds / self.accelerator.num_processes
            self._counts.zero_()
            self._last_log, self._paused_seconds, self._waited_seconds = time.perf_counter(), 0.0, 0.0
        super().log(logs, start_time)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        packed, exact = self.tuned.packed, {}
        if self.is_deepspeed_enabled and self.model_wrapped is packed:
            if self.args.bf16 or self.args.fp16:
                exact = float32_weights(packed)
            if self.args.hf_deepspeed_config.is_zero3():  # type: ignore[attr-defined]
                slice_weights(packed, self.args, max_steps)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if exact:
            set_weights(self.model_wrapped, exact)
        return prepared

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
        totals = torch.zeros(4, dtype=torch.float64)  # weighted loss, weight, right, supervised
        for batch in self._loader(self.eval_rows, pin=False):
            batch = batch.to(self.args.device)
            scores: RowScores = packed(**model_inputs(batch, self.tuned.tower))
            counted = batch.weights > 0
            loss = -(scores.log_probs * batch.weights).sum()
            totals += torch.tensor([loss.item(), batch.weights.sum().item(), (scores.is_top1 & counted).sum().item(), counted.sum().item()])
        loss, weight, right, supervised = self.accelerator.reduce(totals.to(self.args.device, torch.float32), "sum").tolist()
        packed.train(training)
        metrics = {f"{metric_key_prefix}_loss": loss / weight, f"{metric_key_prefix}_token_accuracy": right / max(supervised, 1)}
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=len(self.eval_rows.rows))
        self._paused_seconds += time.time() - start
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # --- checkpoints ---

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        start = time.perf_counter()
        super()._save_checkpoint(model, trial)
        self._paused_seconds += time.perf_counter() - start

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if self.args.should_save:
            save_tuned(self.tuned, self.processing, Path(output_dir or str(self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_tuned(self.tuned, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        load_tuned(self.tuned, Path(self.state.best_model_checkpoint))
