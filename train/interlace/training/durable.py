"""Hugging Face's `Trainer` with a run that cannot be lost: checkpoints of our own, exact resume, an end that all ranks agree on, no step on broken numbers."""

import dataclasses
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from interlace.errors import InputError, RunError, Stopped
from interlace.files import sync_file
from interlace.model.loading import Processing
from interlace.model.tuning import TunedModel
from interlace.training.checkpoint import STATE_FILE, Write, damage
from interlace.training.clock import PHASES, StepClock
from interlace.training.fragments import WEIGHT, full_parameters, local_fragments
from interlace.training.restoring import RestoredTrainer, Survival
from interlace.training.row_losses import row_losses_file
from interlace.training.state import PROGRESS_FILE, SCHEDULER_FILE, optimizer_file, plain, write_fragments
from interlace.training.weights import Weights, copy_of_weights, is_adapter, save_weights

COPIED = ("arguments.json", "ledger.json")  # records of the run that each checkpoint holds too


class DurableTrainer(RestoredTrainer):
    """A `Trainer` whose checkpoints are whole or not there.

    Args:
        tuned, processing: what is saved.
        survival: see there.
        others: arguments of `Trainer`.
    """

    phases: tuple[str, ...] = PHASES

    def __init__(self, tuned: TunedModel, processing: Processing, survival: Survival, **others: Any):
        super().__init__(tuned, survival, **others)
        self.processing = processing
        self.args.save_total_limit = None  # the saver's: at the end Hugging Face would remove the newest checkpoint, too, where another one is the best
        self.stop_code: int | None = None  # the exit code that all ranks have agreed to stop with
        self.clock = StepClock(self.args.device, self.phases)
        self._saved_step = -1
        self._owes_evaluation = False  # a stop has left it out
        self._best_before = self._best  # metric, step and folder at the save before the last
        self._in_step: list[tuple[torch.Tensor, Sequence[int]]] = []  # losses and row numbers of the step's micro-batches
        self._result: Path | None = None  # the checkpoint whose weights are the run's result, if not the last step's

    # --- agreeing, once per step ---

    def agree(self, weights: Sequence[float] = (), problem: str | None = None) -> list[float]:
        """The sum of each of `weights` over the ranks; on the way, all ranks learn whether one was asked to stop, and of checkpoints that are written.

        Raises:
            InputError: on all ranks, if one has a `problem` with its data.
        """
        ranks, saver, asked = self.survival.ranks, self.survival.saver, self.survival.signals.requested
        codes, busy, problems, *totals = ranks.sum([float(asked or 0), float(saver.is_busy), float(problem is not None), *weights])
        if problems:
            self.finish_saving()
            raise InputError("\n  ".join(dict.fromkeys(found for found in ranks.gather(problem) if found)))
        if codes and self.stop_code is None:
            self.stop_code = max(ranks.gather(asked or 0))
        if saver.step is not None and not busy:
            self._settle()
        return totals

    def check_stop(self, problem: str | None) -> None:
        """Ends an evaluation when a rank was asked to stop; to be called by all ranks.

        Raises:
            Stopped: it was.
            InputError: a rank has a `problem` with its data.
        """
        self.agree(problem=problem)
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
        if best is not None and Path(best).name == f"checkpoint-{step}":
            self._best = self._best_before
            self.state.best_metric, self.state.best_global_step, self.state.best_model_checkpoint = self._best
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
        step = self.state.global_step
        if step == self._saved_step:
            return
        self.clock.mark("other")
        self.survival.watch.at(step, "saving a checkpoint")
        self.finish_saving()
        saver = self.survival.saver
        if self.state.best_global_step == step:
            self.state.best_model_checkpoint = str(saver.output_dir / f"checkpoint-{step}")
        write, num_bytes = self._contents()
        saver.begin(step, write, int(self.survival.ranks.sum([num_bytes])[0]))
        self._saved_step = step
        self._best_before, self._best = self._best, (self.state.best_metric, self.state.best_global_step, self.state.best_model_checkpoint)
        self.clock.mark("")

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
        own = [optimizer_file(ranks.rank, ranks.world_size)]
        row_losses, parts = self.row_losses, {} if self.row_losses is None else self.row_losses.parts()
        own += [] if row_losses is None else [row_losses_file(ranks.rank, ranks.world_size)]

        def write(folder: Path) -> list[str]:
            write_fragments(folder / own[0], fragments, scalars)
            if row_losses is not None:
                row_losses.write(folder / own[1], parts)
            if not ranks.is_main:
                return own
            save_weights(self.tuned, weights, self.processing, folder)
            for name, text in texts.items():
                (folder / name).write_text(text, encoding="utf-8")
            for name in COPIED:
                shutil.copyfile(output_dir / name, folder / name)
            return [*own, *(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith((".", "optimizer-", "row_losses-", "part-")))]

        return write, sum(item.values.nbytes for item in fragments) + sum(tensor.nbytes for tensor in weights.values())

    def _weights(self) -> Weights:
        """What has to be saved of the model, on the main process; all ranks take part."""
        adapted = [parameter.requires_grad for name, parameter in self.tuned.packed.named_parameters() if is_adapter(name)]
        frozen = self.tuned.peft is None or not all(adapted)
        return copy_of_weights(self.tuned, full_parameters(self.model_wrapped, frozen), self.survival.ranks.is_main)

    def _log_progress(self) -> dict[str, Any]:
        """What the next log will be made of, for each rank."""
        loss = self._tr_loss.item()
        mine = {"loss": loss if math.isfinite(loss) else 0.0, "counts": self._counts.tolist(), "loss_window": list(self._losses.window.logarithms)}
        ranks, owes = self.survival.ranks.gather(mine), self._owes_evaluation or self._epoch_awaits_evaluation()
        known = {"last_logged": self._globalstep_last_logged, "skipped_steps": self.skipped_steps, "ranks": ranks, "owes_evaluation": owes}
        return known | {"loss_scale": self._loss_scale()}

    def _epoch_awaits_evaluation(self) -> bool:
        """Whether this step ends an epoch whose evaluation is still to come."""
        epoch = float(self.state.epoch or 0)
        is_due = self.args.eval_strategy == "epoch" and epoch.is_integer() and epoch >= self.args.eval_delay
        return is_due and self._evaluated_step != self.state.global_step

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the trained model into `output_dir`: aside first, then file by file in place of what was there."""
        folder, weights = Path(output_dir or str(self.args.output_dir)), self._weights()
        if self.survival.ranks.is_main:
            scratch = folder / ".saving-model"
            shutil.rmtree(scratch, ignore_errors=True)
            save_weights(self.tuned, weights, self.processing, scratch)
            for path in [] if self._result is None else self._result.glob("*model*.safetensors*"):
                shutil.copyfile(path, scratch / path.name)
            for path in [path for path in scratch.rglob("*") if path.is_file()]:
                sync_file(path)
            for path in scratch.iterdir():
                path.replace(folder / path.name)
            scratch.rmdir()

    def _load_best_model(self) -> None:
        """The best checkpoint's weights are the result; an engine's own weights need not change for that."""
        self.finish_saving()
        if self.stop_code is None and self.state.best_model_checkpoint is not None:
            self._result = best = Path(self.state.best_model_checkpoint)
            problem = self.survival.ranks.on_main(lambda: damage(best))
            if problem is not None:
                raise RunError(f"{best}, the best checkpoint, is damaged: {problem}; resume with load_best_model_at_end: false for the last step's weights")

    @property
    def result_history(self) -> list[dict[str, float]]:
        """The log up to the step whose weights are the run's result."""
        last = self.state.global_step if self._result is None else self.state.best_global_step
        return [entry for entry in self.state.log_history if entry["step"] <= (last or 0)]

    # --- numbers and ends ---

    def names_of(self, row_numbers: Sequence[int]) -> Sequence[str]:
        """File and index of training rows."""
        raise NotImplementedError

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient's norm; a step whose norm is not finite is not made: the run ends there, or goes on without it."""
        norm = super()._get_grad_norm(model, grad_norm)
        value = float("inf") if self._engine_left_step_out() else float(norm)
        steps, self._in_step = self._in_step, []
        if math.isfinite(value):
            return norm
        broken = [name for loss, numbers in steps if not bool(loss.isfinite()) for name in self.names_of(numbers)]
        found = self.survival.ranks.gather(broken)
        if self.args.fp16 and not any(found):  # float16 finds its scale by such steps, which scaler and engine leave out
            return norm
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
        self.clock.mark("optimizer")
        if self.stop_code is not None:
            self._owes_evaluation = self._owes_evaluation or self.control.should_evaluate
            self.control.should_evaluate, self.control.should_save, self.control.should_training_stop = False, True, True
        total = self._total_loss_scalar
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except Stopped:
            self.control.should_training_stop = self._owes_evaluation = True
            self._save_checkpoint(model, trial)
        if not math.isfinite(self._total_loss_scalar):  # the log has said it
            self._forget_broken_loss(total)
