"""What the trainers share: packed batches and their plan under Hugging Face's `Trainer`."""

import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from tqdm import tqdm
from transformers import TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import speed_metrics

from interlace.data.batch import PackedBatch
from interlace.data.splitting import split
from interlace.errors import RunError
from interlace.model.costs import StepCosts, shape_of
from interlace.model.forward import RowScores, model_inputs
from interlace.model.loading import Processing
from interlace.model.losses import supervised_loss
from interlace.model.tuning import TunedModel, parameter_groups
from interlace.training.answering import Answers
from interlace.training.clock import peak_flops
from interlace.training.offloading import OffloadedActivations
from interlace.training.planned import PlannedRows, PlannedTrainer, take
from interlace.training.restoring import Survival
from interlace.training.spikes import report_spikes
from interlace.training.tracking import ProgressBar


class PackedTrainer(PlannedTrainer):
    """Hugging Face's `Trainer` on packed batches.

    Args:
        tuned: the model and what learns of it.
        processing: image processing for the collator; saved with every checkpoint.
        args: Hugging Face's arguments.
        train, evaluation: rows with their plans.
        rates: learning rates of parts that have their own.
        survival: what the run needs to outlive its accidents.
        costs: of the model, to log FLOP/s and MFU.
        offloads: activations wait in the host's memory.
    """

    num_weights = 1
    answers: Answers | None = None  # to questions that every evaluation asks

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
        costs: StepCosts | None = None,
        offloads: bool = False,
    ):
        self.rates = dict(rates)
        super().__init__(tuned, processing, survival, train, evaluation, args=args, callbacks=callbacks)
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the whole step's token weight
        if not args.disable_tqdm:
            self.remove_callback(DEFAULT_PROGRESS_CALLBACK)
            self.add_callback(ProgressBar())
        self._epoch = 0
        self._latest: tuple[PackedBatch, RowScores, torch.Tensor] | None = None
        self._totals = [0.0] * self.num_weights  # of `weigh`, over the step
        self._done: list[PackedBatch] = []  # the step's micro-batches whose gradients are there
        self._offloads = offloads
        self._too_many_tokens = math.inf  # for a micro-batch, as far as is known
        self.costs, self._flops, self._logged_step = costs, 0.0, -1  # FLOPs required since that step
        device_name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else ""
        self._peak_flops = peak_flops(device_name) if args.bf16 or args.fp16 else None

    # --- the step ---

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:  # type: ignore[override]
        if self._logged_step < 0:
            self._logged_step = self.state.global_step
            self.clock.start()
        self._epoch = epoch
        self.clock.mark("other")
        if self.tuned.tower is not None and self.tuned.tower.cache is not None:
            self.tuned.tower.cache.flush()
            self.survival.ranks.sum([0])  # what any rank has made is there for all
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    def get_batch_samples(  # type: ignore[override]
        self, epoch_iterator: Iterator[PackedBatch], num_batches: int, device: torch.device
    ) -> tuple[list[PackedBatch], float]:
        """A step's micro-batches, and the sum of their token weights over all ranks; the time spent waiting for data is counted."""
        step = self.state.global_step + 1
        self.survival.watch.at(step, "waiting for data")
        batches, problem = take(epoch_iterator, num_batches)
        self._done = []
        self.clock.mark("data")
        self.survival.watch.at(step, "agreeing on the step", lambda: self.names_of([number for batch in batches for number in batch.row_numbers]))
        weights = [sum(found) for found in zip(*map(self.weigh, batches), strict=True)]
        self._totals = self.agree(weights or [0.0] * self.num_weights, problem)  # as many from a rank whose data is broken
        self.clock.mark("communication")
        return batches, self._totals[0]

    def weigh(self, batch: PackedBatch) -> list[float]:
        """What the step's loss is divided by, of one micro-batch: `num_weights` numbers."""
        return [float(batch.weights.sum())]

    def training_step(  # type: ignore[override]
        self, model: nn.Module, inputs: PackedBatch, num_items_in_batch: float | None = None
    ) -> torch.Tensor:
        """Forward and backward of a micro-batch; of its halves, where a process on its own finds that it does not fit into the memory.

        Raises:
            RunError: it does not fit, and cannot be split.
        """
        halves = split(inputs) if inputs.num_tokens >= self._too_many_tokens else None
        if halves is not None:
            return sum((self.training_step(model, half, num_items_in_batch) for half in halves), torch.zeros((), device=self.args.device))
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[arg-type]
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            problem = str(error).splitlines()[0]
        else:
            self.clock.mark("backward")
            self._count()
            self._done.append(inputs)
            return loss
        self._make_room(model, inputs, num_items_in_batch, problem)
        return self.training_step(model, inputs, num_items_in_batch)

    def _make_room(self, model: nn.Module, inputs: PackedBatch, total: float | None, problem: str) -> None:
        """After a micro-batch did not fit: the gradients of the step's earlier ones once more, since it may have left a part of its own in them."""
        step, ranks = self.state.global_step + 1, self.survival.ranks
        if not ranks.is_alone or self.is_deepspeed_enabled or split(inputs) is None:
            names = "; ".join(self.names_of(inputs.row_numbers))
            raise RunError(
                f"step {step}: a micro-batch of {inputs.num_tokens:,} tokens does not fit into the memory ({problem}); rows: {names}. Lower "
                f"max_tokens_per_batch (now {self.train_rows.plan.budget}) or max_length, or set gradient_checkpointing: true; plan_run.py --fit tells"
            )
        if self._too_many_tokens == math.inf:
            tqdm.write(
                f"step {step}: a micro-batch of {inputs.num_tokens:,} tokens does not fit into the memory; such ones are done in halves from here on, with the "
                "same gradients. Smaller micro-batches are faster: see max_tokens_per_batch"
            )
        self._too_many_tokens = inputs.num_tokens
        model.zero_grad()
        if self.tuned.tower is not None and self.tuned.tower.cache is not None:
            self.tuned.tower.cache.flush()  # features that wait there are on the device
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()
        for batch in self._done:
            super().training_step(model, batch, total)  # type: ignore[arg-type]

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: PackedBatch, return_outputs: bool = False, num_items_in_batch: float | None = None
    ) -> torch.Tensor:
        """The micro-batch's share of the step's loss, times the number of processes: DDP averages gradients."""
        self.survival.watch.at(self.state.global_step + 1, "training", partial(self.names_of, inputs.row_numbers))
        torch.manual_seed(random_seed(self.args.seed, self._epoch, inputs.row_numbers[0]))
        self.clock.mark("data")  # to the device
        values = model_inputs(inputs, self.tuned.tower)
        self.clock.mark("vision")
        loss, scores = self.share_of_loss(model, values, inputs)
        self.clock.mark("forward")
        self._latest = inputs, RowScores(scores.log_probs.detach(), scores.is_top1), loss.detach()
        return loss * self.accelerator.num_processes

    def share_of_loss(self, model: nn.Module, values: dict[str, Any], inputs: PackedBatch) -> tuple[torch.Tensor, RowScores]:
        """The micro-batch's share of the step's mean loss per supervised token, and its scores.

        Args:
            values: what the model is called with.
        """
        with self.offloaded():
            scores: RowScores = model(**values)
        return supervised_loss(scores.log_probs, inputs.weights, self._totals[0]), scores

    def offloaded(self) -> AbstractContextManager[Any]:
        """Where the policy's forward pass runs: with `activation_offloading`, its activations wait in the host's memory."""
        return OffloadedActivations(self.args.device, weights=self.tuned.packed.parameters()) if self._offloads else nullcontext()

    def _count(self) -> None:
        """Takes the latest micro-batch into what is logged."""
        assert self._latest is not None
        (inputs, scores, loss), self._latest = self._latest, None  # its pixels would else stay on the device through the next micro-batch
        self._flops += 0.0 if self.costs is None else self.costs.total(shape_of(inputs, self.costs.window)).required
        counted = self.counted(inputs)
        self._counts[:2] += torch.stack([counted.sum(), (scores.is_top1 & counted).sum()])
        self._counts[2] += inputs.num_tokens
        self._counts[3] += inputs.num_images
        self._counts[4] += inputs.is_cached.count(False)
        sums = self._losses.add(self.state.global_step + 1, scores.log_probs, inputs.weights * counted, inputs.sequence_index, inputs.row_numbers)
        if self.row_losses is not None:
            self.row_losses.add(self._epoch, sums, inputs.row_numbers)
        self._in_step.append((loss, inputs.row_numbers))

    def counted(self, batch: PackedBatch) -> torch.Tensor:
        """(N,) which supervised tokens accuracy and loss spikes speak of."""
        return batch.weights > 0

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
            if self.row_losses is not None:
                self.row_losses.look()
            self.clock.mark("other")
            phases = self.clock.take()
            num_spikes, flops, *sums = ranks.sum([len(spikes), self._flops, *phases.values(), *self._counts.tolist()])
            times, (supervised, right, tokens, images, encoded, *more) = sums[: len(phases)], sums[len(phases) :]
            if num_spikes:
                found = [spike for of_rank in ranks.gather(spikes) for spike in of_rank]
                if ranks.is_main:
                    try:
                        report_spikes(found, self.survival.saver.output_dir / "loss_spikes.jsonl")
                    except OSError as error:  # a full disk; the next checkpoint will tell whether the run has to end
                        tqdm.write(f"warning: loss_spikes.jsonl could not be written: {error}")
            seconds = sum(times) / ranks.world_size
            steps = self.state.global_step - self._logged_step
            logs["token_accuracy"] = right / max(supervised, 1)
            logs["supervised_tokens"] = supervised
            logs |= self.more_logs(dict(zip(self.more_counts, more, strict=True)))
            logs["tokens_per_second"] = tokens / seconds
            logs["images_per_second"] = images / seconds
            logs["images_encoded"] = encoded
            logs |= {"skipped_steps": self.skipped_steps} if self.skipped_steps else {}
            logs["data_wait_share"] = times[0] / seconds / ranks.world_size
            logs |= {f"{name}_seconds": value / ranks.world_size / steps for name, value in zip(phases, times, strict=True)}
            if self.costs is not None:
                logs["tflops_per_second"] = flops / seconds / ranks.world_size / 1e12
            if self.costs is not None and self._peak_flops is not None:
                logs["mfu"] = flops / seconds / ranks.world_size / self._peak_flops
            self._counts.zero_()
            self._flops, self._logged_step = 0.0, self.state.global_step
        super().log(logs, start_time)

    def more_logs(self, sums: dict[str, float]) -> dict[str, float]:
        """What a log says of `more_counts`, summed over steps and ranks."""
        return sums

    # --- evaluation ---

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Mean loss per supervised token and token accuracy over the evaluation rows of all ranks."""
        assert self.eval_rows is not None
        self.clock.mark("other")
        packed, start = self.callable_model, time.time()
        training = packed.training
        packed.eval()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.score(packed, self.eval_rows).items()}
        packed.train(training)
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=len(self.eval_rows.rows))
        if self.answers is not None:
            start = time.time()
            found = self.answers.scores(self.tuned, self.model_wrapped, self.args, self.survival.ranks, self.state.global_step, self._before_answers)
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
            metrics[f"{metric_key_prefix}_generate_runtime"] = round(time.time() - start, 4)
        self.clock.mark("")
        self._evaluated_step = self.state.global_step
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _before_answers(self) -> None:
        self.check_stop(None)
        self.survival.watch.at(self.state.global_step, "answering")

    @property
    def callable_model(self) -> nn.Module:
        """The model to call outside of a training step: an engine that shares weights out has to be called itself, to gather them."""
        return self.model_wrapped if self.is_deepspeed_enabled else self.tuned.packed

    def score(self, packed: nn.Module, planned: PlannedRows) -> dict[str, float]:
        """Mean loss per supervised token and token accuracy over the rows of all ranks."""
        totals = torch.zeros(4, dtype=torch.float64, device=self.args.device)  # weighted loss, weight, right, supervised
        for batch, values in self.batches(planned):
            scores: RowScores = packed(**values)
            counted = batch.weights > 0
            totals += torch.stack([-(scores.log_probs * batch.weights).sum(), batch.weights.sum(), (scores.is_top1 & counted).sum(), counted.sum()])
        loss, weight, right, supervised = self.survival.ranks.sum(totals.tolist())
        return {"loss": loss / weight, "token_accuracy": right / max(supervised, 1)}


def random_seed(seed: int, epoch: int, row: int) -> int:
    """What dropout is drawn from in the micro-batch that begins with a row: the same on whichever rank, after whatever came before."""
    return int.from_bytes(hashlib.sha256(f"{seed} {epoch} {row}".encode()).digest()[:8], "little") >> 1
