"""Hugging Face's `Trainer` that takes up a run where a checkpoint left it: weights, optimizer, schedule, plan, and the log that was half written."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import Trainer

from interlace.errors import InputError
from interlace.model.tuning import TunedModel
from interlace.ranks import Ranks
from interlace.training.checkpoint import Checkpoint, Saver
from interlace.training.fragments import restore_fragments, set_weights
from interlace.training.row_losses import RowLosses
from interlace.training.sharding import engine_of, float32_weights, slice_weights
from interlace.training.spikes import LossRecord
from interlace.training.state import PROGRESS_FILE, SCHEDULER_FILE, OptimizerFiles, plain, read_json_state
from interlace.training.stopping import StopSignals
from interlace.training.watch import Watch


@dataclass(frozen=True)
class Survival:
    """What a run needs to outlive its accidents.

    ranks, watch, signals: the processes, their signs of life, and the wish to stop.
    saver: writes the checkpoints; checkpoint: the one to go on from, or None.
    on_save_error: when a checkpoint cannot be written, end the run or go on without it.
    on_non_finite: when loss or gradient is not finite, end the run or leave the step out.
    """

    ranks: Ranks
    watch: Watch
    signals: StopSignals
    saver: Saver
    checkpoint: Checkpoint | None = None
    on_save_error: Literal["stop", "continue"] = "stop"
    on_non_finite: Literal["stop", "skip"] = "stop"


class RestoredTrainer(Trainer):
    """A `Trainer` that goes on from `survival.checkpoint`, whose weights `tuned` already has, as if it had never been interrupted.

    Args:
        tuned: the model and what learns of it.
        survival: see there.
        others: arguments of `Trainer`.
    """

    more_counts: tuple[str, ...] = ()  # what is summed up between two logs beside tokens and images

    def __init__(self, tuned: TunedModel, survival: Survival, **others: Any):
        self.tuned, self.survival = tuned, survival
        super().__init__(model=tuned.packed, **others)
        self.skipped_steps = 0
        self._counts = torch.zeros(5 + len(self.more_counts), dtype=torch.float64, device=self.args.device)  # of this rank, since the last log
        self._losses = LossRecord(survival.ranks.rank)
        self.row_losses: RowLosses | None = None  # kept once it is set
        self._best: tuple[Any, ...] = (None, None, None)  # metric, step and folder at the last save
        self._progress: dict[str, Any] | None = None
        self._evaluated_step = -1

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing: the weights were loaded before an engine wrapped the model."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: what is random is drawn anew from (seed, epoch, row) for every micro-batch."""

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        places: tuple[int, int] = super()._init_training_state(max_steps, *args)
        checkpoint = self.survival.checkpoint
        if checkpoint is not None and self.state.best_global_step:  # its name may be of another place: folders are moved, and relative paths
            best = checkpoint.folder.parent / f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None
        if self.state.best_global_step and self.state.best_model_checkpoint is None and self.survival.ranks.is_main:
            tqdm.write(f"warning: checkpoint-{self.state.best_global_step}, the best one so far, is not there any more; a later one may be the result")
        self.state.compute_steps(self.args, max_steps)  # those of today, not of the checkpoint
        self._best = (self.state.best_metric, self.state.best_global_step, self.state.best_model_checkpoint)
        return places

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        packed, exact = self.tuned.packed, {}
        if self.is_deepspeed_enabled and self.model_wrapped is packed:
            if self._has_masters():
                exact = float32_weights(packed)
            if self.args.hf_deepspeed_config.is_zero3():  # type: ignore[attr-defined]
                slice_weights(packed, self.args, max_steps)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if exact:
            set_weights(self.model_wrapped, exact)
        self.survival.saver.about["engine"] = engine_of(self.model_wrapped)
        checkpoint = self.survival.checkpoint
        if checkpoint is not None:
            self._restore_optimizer(checkpoint.folder)
            self._progress = read_json_state(checkpoint.folder / PROGRESS_FILE)
            self._take_up_row_losses(checkpoint.folder)
            scale = None if self._progress is None else self._progress.get("loss_scale")
            if scale is not None and self.args.fp16:
                self._restore_loss_scale(scale)
        return prepared

    def _take_up_row_losses(self, folder: Path) -> None:
        """On one rank, what all ranks knew: sums add up."""
        if self.row_losses is not None and self.survival.ranks.is_main and not self.row_losses.take_up(folder):
            tqdm.write(f"warning: {folder} holds no losses of these rows: the row report begins here")

    def _has_masters(self) -> bool:
        """Whether the optimizer steps float32 copies of weights that the model has in 16 bits."""
        return self.is_deepspeed_enabled and (self.args.bf16 or self.args.fp16)

    def _restore_optimizer(self, folder: Path) -> None:
        """Optimizer and schedule as they were; what is missing starts afresh, which `find_checkpoint` has allowed then."""
        if OptimizerFiles.are_complete(folder):
            files = OptimizerFiles(folder)
            try:
                restore_fragments(self.model_wrapped, self.optimizer, files.read, files.shapes, files.scalars)  # type: ignore[arg-type]
            except ValueError as error:
                raise InputError(f"{folder}: the optimizer's state does not fit `optim`: {error}") from error
        state = read_json_state(folder / SCHEDULER_FILE)
        if state is not None:
            scheduler: Any = self.lr_scheduler
            if isinstance(scheduler, LambdaLR):  # a function of the step and of today's learning rates
                scheduler.last_epoch, scheduler._step_count = state["last_epoch"], state["_step_count"]
                scheduler._last_lr = [base * function(scheduler.last_epoch) for base, function in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
            else:
                scheduler.load_state_dict({**scheduler.state_dict(), **state})
            for group, rate in zip(self.optimizer.param_groups, scheduler._last_lr, strict=True):  # type: ignore[union-attr]
                group["lr"] = rate

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self._take_up(kwargs["trial"], kwargs["ignore_keys_for_eval"])
        if self.state.global_step >= self.state.max_steps:  # all was done but the end; Hugging Face would make one step more
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial: Any, *args: Any) -> Any:
        self._take_up(trial, None)  # there was no epoch left
        self._forget_broken_loss()
        return super()._finalize_training(trial, *args)

    def _forget_broken_loss(self, total: float = 0.0) -> None:
        """A step that was left out must not make every loss after it NaN: the sum since the last log starts again, the run's sum from `total`."""
        if not math.isfinite(self._tr_loss.item()):
            self._tr_loss.zero_()
        if not math.isfinite(self._total_loss_scalar):
            self._total_loss_scalar = total

    def _take_up(self, trial: Any, ignore_keys: list[str] | None) -> None:
        """Once after a resume: the log where it was, and the evaluation that a stop has left out."""
        progress, self._progress = self._progress, None
        if progress is None:
            return
        self._take_up_log(progress)
        if progress.get("owes_evaluation") and self.eval_dataset is not None:
            checkpoint = self.survival.checkpoint
            if self._determine_best_metric(self._evaluate(trial, ignore_keys), trial) and checkpoint is not None:
                self.state.best_model_checkpoint = str(checkpoint.folder)
            self._best = (self.state.best_metric, self.state.best_global_step, self.state.best_model_checkpoint)

    def _take_up_log(self, progress: dict[str, Any]) -> None:
        """The next log speaks of the steps before the checkpoint too, as it would have without the interruption."""
        shares, ranks = progress["ranks"], self.survival.ranks
        if len(shares) == ranks.world_size:
            mine = shares[ranks.rank]
            self._losses.window.logarithms.extend(mine["loss_window"])
        else:  # the sums over all ranks are what counts; a logged loss is the mean over ranks
            mine = {"loss": sum(share["loss"] for share in shares) / len(shares)}
            mine["counts"] = [sum(share["counts"][i] for share in shares) / ranks.world_size for i in range(len(self._counts))]
        self._tr_loss += mine["loss"]
        self._total_loss_scalar -= self._tr_loss.item()  # belongs to steps that this process has not made
        self._counts += torch.tensor(mine["counts"], dtype=torch.float64, device=self._counts.device)
        self._globalstep_last_logged, self.skipped_steps = progress["last_logged"], progress["skipped_steps"]

    # --- float16 ---

    def _loss_scale(self) -> dict[str, Any] | None:
        """What scales losses in float16, and how long it has done well; None in other precisions."""
        if not self.args.fp16:
            return None
        engine: Any = self.model_wrapped
        scaler: Any = self.accelerator.scaler
        return plain(vars(engine.optimizer.loss_scaler)) if self.is_deepspeed_enabled else plain(scaler.state_dict())

    def _restore_loss_scale(self, state: dict[str, Any]) -> None:
        engine: Any = self.model_wrapped
        scaler: Any = self.accelerator.scaler
        if self.is_deepspeed_enabled:
            vars(engine.optimizer.loss_scaler).update(state)
        else:
            scaler.load_state_dict(state)
