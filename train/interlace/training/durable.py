"""Hugging Face's `Trainer` with a run that cannot be lost: checkpoints of our own, exact resume, an end that all ranks agree on, no step on broken numbers."""

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from interlace.errors import InputError, RunError, Stopped
from interlace.model.loading import Processing
from interlace.model.tuning import TunedModel
from interlace.training.checkpoint import STATE_FILE, Checkpoint, Saver, Write
from interlace.training.fragments import WEIGHT, full_parameters, local_fragments, restore_fragments, set_weights
from interlace.training.ranks import Ranks
from interlace.training.sharding import engine_of, float32_weights, slice_weights
from interlace.training.state import PROGRESS_FILE, SCHEDULER_FILE, OptimizerFiles, optimizer_file, plain, read_json_state, write_fragments
from interlace.training.stopping import StopSignals
from interlace.training.watch import Watch
from interlace.training.weights import Weights, copy_of_weights, is_adapter, save_weights

COPIED = ("arguments.json", "ledger.json")  # records of the run that each checkpoint holds too


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


class DurableTrainer(Trainer):
    """A `Trainer` whose checkpoints are whole or not there.

    Args:
        tuned, processing: what is saved.
        survival: see there.
        others: arguments of `Trainer`.
    """

    def __init__(self, tuned: TunedModel, processing: Processing, survival: Survival, **others: Any):
        self.tuned, self.processing, self.survival = tuned, processing, survival
        super().__init__(model=tuned.packed, **others)
        self.stop_code: int | None = None  # the exit code that all ranks have agreed to stop with
        self.skipped_steps = 0
        self._paused_seconds = 0.0  # spent on other things than training since the last log
        self._saved_step = -1
        self._in_step: list[tuple[torch.Tensor, Sequence[int]]] = []  # losses and row numbers of the step's micro-batches
        self._counts = torch.zeros(4, dtype=torch.float64, device=self.args.device)  # of this rank, since the last log
        self._progress: dict[str, Any] | None = None
        self._result: Path | None = None  # the checkpoint whose weights are the run's result, if not the last step's

    # --- agreeing, once per step ---

    def agree(self, weight: float, problem: str | None = None) -> float:
        """The sum of `weight` over the ranks; on the way, all ranks learn whether one was asked to stop, and of checkpoints that are written.

        Raises:
            InputError: on all ranks, if one has a `problem` with its data.
        """
        ranks, saver, asked = self.survival.ranks, self.survival.saver, self.survival.signals.requested
        total, codes, busy, problems = ranks.sum([weight, float(asked or 0), float(saver.is_busy), float(problem is not None)])
        if problems:
            self.finish_saving()
            raise InputError("\n  ".join(dict.fromkeys(found for found in ranks.gather(problem) if found)))
        if codes and self.stop_code is None:
            self.stop_code = max(ranks.gather(asked or 0))
        if saver.step is not None and not busy:
            self._settle()
        return total

    def check_stop(self, problem: str | None) -> None:
        """Ends an evaluation when a rank was asked to stop; to be called by all ranks.

        Raises:
            Stopped: it was.
            InputError: a rank has a `problem` with its data.
        """
        self.agree(0, problem)
        if self.stop_code is not None:
            raise Stopped(f"stopped at step {self.state.global_step}, in an evaluation", self.stop_code)

    def _settle(self) -> None:
        """All ranks have written, or failed to: makes the checkpoint official, or gives it up."""
        saver, ranks = self.survival.saver, self.survival.ranks
        step = saver.step
        problems = [problem for problem in ranks.gather(saver.problem()) if problem]
        best = self.state.best_model_checkpoint
        if not problems:
            problems = [problem for problem in ranks.gather(self._commit(None if best is None else Path(best))) if problem]
        if not problems:
            saver.settled()
            return
        saver.give_up()
        text = f"checkpoint-{step} could not be written: {problems[0]}; the checkpoints before it still stand in {saver.output_dir}"
        if self.survival.on_save_error == "stop":
            raise RunError(f"{text}. Make room and resume, or set on_save_error: continue")
        if ranks.is_main:
            print(f"warning: {text}; going on without it (on_save_error)")

    def _commit(self, best: Path | None) -> str | None:
        if self.survival.ranks.is_main:
            try:
                self.survival.saver.commit(best)
            except OSError as error:
                return str(error)
        return None

    def finish_saving(self) -> None:
        """Waits until a checkpoint that is being written stands.

        Raises:
            RunError: it cannot be written, and `on_save_error` is to stop.
        """
        if self.survival.saver.step is not None:
            self._settle()

    # --- saving ---

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        start, step = time.perf_counter(), self.state.global_step
        if step == self._saved_step:
            return
        self.survival.watch.at(step, "saving a checkpoint")
        self.finish_saving()
        saver = self.survival.saver
        if self.state.best_global_step == step:
            self.state.best_model_checkpoint = str(saver.output_dir / f"checkpoint-{step}")
        write, num_bytes = self._contents()
        saver.begin(step, write, int(self.survival.ranks.sum([num_bytes])[0]))
        self._saved_step = step
        self._paused_seconds += time.perf_counter() - start

    def _contents(self) -> tuple[Write, int]:
        """What writes this rank's files, out of copies that training no longer touches, and their bytes."""
        ranks, output_dir = self.survival.ranks, self.survival.saver.output_dir
        weights = self._weights()
        fragments, scalars = local_fragments(self.model_wrapped, self.optimizer)  # type: ignore[arg-type]
        # the values that the optimizer steps are those of the model's file, but where they come back through a model in 16 bits
        fragments = [dataclasses.replace(item, values=item.values.to("cpu", copy=True)) for item in fragments if item.key != WEIGHT or self._has_masters()]
        texts = {STATE_FILE: json.dumps(dataclasses.asdict(self.state), indent=2, sort_keys=True)}
        texts[SCHEDULER_FILE] = json.dumps(plain(self.lr_scheduler.state_dict()))  # type: ignore[union-attr]
        texts[PROGRESS_FILE] = json.dumps(self._log_progress())
        own = optimizer_file(ranks.rank, ranks.world_size)

        def write(folder: Path) -> list[str]:
            write_fragments(folder / own, fragments, scalars)
            if not ranks.is_main:
                return [own]
            save_weights(self.tuned, weights, self.processing, folder)
            for name, text in texts.items():
                (folder / name).write_text(text, encoding="utf-8")
            for name in COPIED:
                shutil.copyfile(output_dir / name, folder / name)
            return [own, *(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith((".", "optimizer-", "part-")))]

        return write, sum(item.values.nbytes for item in fragments) + sum(tensor.nbytes for tensor in weights.values())

    def _weights(self) -> Weights:
        """What has to be saved of the model, on the main process; all ranks take part."""
        adapted = [parameter.requires_grad for name, parameter in self.tuned.packed.named_parameters() if is_adapter(name)]
        frozen = self.tuned.peft is None or not all(adapted)
        return copy_of_weights(self.tuned, full_parameters(self.model_wrapped, frozen), self.survival.ranks.is_main)

    def _log_progress(self) -> dict[str, Any]:
        """What the next log will be made of, for each rank."""
        mine = {"loss": self._tr_loss.item(), "counts": self._counts.tolist()}
        return {"last_logged": self._globalstep_last_logged, "skipped_steps": self.skipped_steps, "ranks": self.survival.ranks.gather(mine)}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the trained model into `output_dir`: aside first, then file by file in place of what was there."""
        folder, weights = Path(output_dir or str(self.args.output_dir)), self._weights()
        if self.survival.ranks.is_main:
            scratch = folder / ".saving-model"
            shutil.rmtree(scratch, ignore_errors=True)
            save_weights(self.tuned, weights, self.processing, scratch)
            for path in [] if self._result is None else self._result.glob("*model*.safetensors*"):
                shutil.copyfile(path, scratch / path.name)
            for path in scratch.iterdir():
                path.replace(folder / path.name)
            scratch.rmdir()

    # --- resuming ---

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing: the weights were loaded before an engine wrapped the model."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: what is random is drawn anew from (seed, epoch, row) for every micro-batch."""

    def _load_best_model(self) -> None:
        """The best checkpoint's weights are the result; an engine's own weights need not change for that."""
        self.finish_saving()
        if self.stop_code is None and self.state.best_model_checkpoint is not None:
            self._result = Path(self.state.best_model_checkpoint)

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
        return prepared

    def _has_masters(self) -> bool:
        """Whether the optimizer steps float32 copies of weights that the model has in 16 bits."""
        return self.is_deepspeed_enabled and (self.args.bf16 or self.args.fp16)

    def _restore_optimizer(self, folder: Path) -> None:
        """Optimizer and schedule as they were; what is missing starts afresh, which `find_checkpoint` has allowed then."""
        if any(folder.glob("optimizer-*")):
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
        if self._progress is not None:
            self._take_up_log(self._progress)
            self._progress = None
        super()._run_epoch(*args, **kwargs)

    def _take_up_log(self, progress: dict[str, Any]) -> None:
        """The next log speaks of the steps before the checkpoint too, as it would have without the interruption."""
        shares, ranks = progress["ranks"], self.survival.ranks
        if len(shares) == ranks.world_size:
            mine = shares[ranks.rank]
        else:  # the sums over all ranks are what counts; a logged loss is the mean over ranks
            mine = {"loss": sum(share["loss"] for share in shares) / len(shares)}
            mine["counts"] = [sum(share["counts"][i] for share in shares) / ranks.world_size for i in range(len(self._counts))]
        self._tr_loss += mine["loss"]
        self._total_loss_scalar -= self._tr_loss.item()  # belongs to steps that this process has not made
        self._counts += torch.tensor(mine["counts"], dtype=torch.float64, device=self._counts.device)
        self._globalstep_last_logged, self.skipped_steps = progress["last_logged"], progress["skipped_steps"]

    # --- numbers and ends ---

    def names_of(self, row_numbers: Sequence[int]) -> Sequence[str]:
        """File and index of training rows."""
        raise NotImplementedError

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient's norm; a step whose norm is not finite is not made: the run ends there, or goes on without it."""
        norm = super()._get_grad_norm(model, grad_norm)
        value = float("inf") if self._engine_left_step_out() else float(norm)
        steps, self._in_step = self._in_step, []
        scaler = self.accelerator.scaler
        if math.isfinite(value) or (scaler is not None and scaler.is_enabled()):  # float16 finds its scale by such steps
            return norm
        broken = [name for loss, numbers in steps if not bool(loss.isfinite()) for name in self.names_of(numbers)]
        found = self.survival.ranks.gather(broken)
        names = [name for rank in found for name in rank] or [name for _, numbers in steps for name in self.names_of(numbers)]
        what = "the loss" if any(found) else "the gradient"
        shown = "; ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        text = f"step {self.state.global_step + 1}: {what} is not finite; rows of the micro-batch: {shown}"
        if self.survival.on_non_finite == "stop":
            self.finish_saving()
            raise RunError(
                f"{text}. The weights are those of step {self.state.global_step}; look at these rows, lower learning_rate, or set on_non_finite: skip"
            )
        model.zero_grad()  # an optimizer leaves parameters without gradient alone
        self.skipped_steps += 1
        if self.survival.ranks.is_main:
            print(f"warning: {text}; step left out, {self.skipped_steps} so far (on_non_finite)")
        return norm

    def _engine_left_step_out(self) -> bool:
        """Whether DeepSpeed found the gradient not finite and made no step."""
        engine: Any = self.model_wrapped
        return self.is_deepspeed_enabled and bool(engine.optimizer.overflow)

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, grad_norm: Any, model: nn.Module, trial: Any, *args: Any, **kwargs: Any) -> None:
        if self.stop_code is not None:
            self.control.should_evaluate, self.control.should_save, self.control.should_training_stop = False, True, True
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except Stopped:
            self.control.should_training_stop = True
            self._save_checkpoint(model, trial)
