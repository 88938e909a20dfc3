"""TRL's losses on preference pairs, and its metrics, from log-probs that a packed batch gave.

`trl.DPOTrainer` computes fifteen losses and their metrics in one method, which asks its trainer for a few settings and its model for per-token log-probs
alone. It is called with those, so that names, definitions and figures are TRL's own.
"""

import contextlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from trl import DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from interlace.data.batch import PackedBatch
from interlace.model.head import RowScores
from interlace.preference_arguments import loss_types

SETTINGS = (
    "beta",
    "loss_type",
    "loss_weights",
    "label_smoothing",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "ld_alpha",
    "use_weighting",
    "discopop_tau",
)
# TRL's metrics, each a mean over pairs but for the accuracy and the entropy of tokens
METRICS = (
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected", "entropy"),
)


@dataclass(frozen=True)
class PairScores:
    """What a micro-batch of P pairs gave; fillers of the plan are left out.

    of_pairs, of_tokens: with gradients, the sum of the losses of the pairs, and that of `sft` of the chosen answers' tokens. num_pairs, num_chosen: how many
    of each. metrics: TRL's, means over the pairs. Of the chosen and of the rejected answers, without gradients: log_probs (2, P) by the policy; rewards (2, P),
    beta times what they have gained over the reference; lengths (2, P) in tokens.
    """

    of_pairs: torch.Tensor
    of_tokens: torch.Tensor
    num_pairs: int
    num_chosen: float
    metrics: dict[str, float]
    log_probs: torch.Tensor
    rewards: torch.Tensor
    lengths: torch.Tensor


def chosen_rows(batch: PackedBatch) -> torch.Tensor:
    """(N,) whether a supervised row is of a chosen answer that counts."""
    return (batch.sequence_index % 2 == 0) & (batch.weights > 0)


def num_pairs(batch: PackedBatch) -> int:
    """How many pairs of a batch count: all but the plan's fillers."""
    return sum(number >= 0 for number in batch.row_numbers) // 2


class PreferenceLoss:
    """The loss that TRL's argument keys describe.

    A step's loss is the mean over its pairs, and that of `sft` over its chosen tokens, in however many micro-batches on however many ranks they come: what TRL
    computes of a batch that holds the whole step. Only `aot` and `aot_unpaired` compare the pairs of a micro-batch with each other.

    Args:
        settings: the keys of `SETTINGS`; see `trl.DPOConfig`.
    """

    def __init__(self, settings: Mapping[str, Any]):
        # no DPOConfig: as every TrainingArguments, a second one would have accelerate forget what the first one has set up
        self.settings = {name: settings[name] for name in SETTINGS}
        kinds = loss_types(settings["loss_type"])
        weights = settings["loss_weights"] or [1.0] * len(kinds)
        self.on_pairs = [(kind, weight) for kind, weight in zip(kinds, weights, strict=True) if kind != "sft"]
        self.on_tokens = [(kind, weight) for kind, weight in zip(kinds, weights, strict=True) if kind == "sft"]

    def __call__(self, scores: RowScores, reference: torch.Tensor, batch: PackedBatch) -> PairScores:
        """Scores the pairs of a micro-batch.

        Args:
            scores: of the policy, with statistics.
            reference: (N,) log-probs of the reference model.
        """
        count, nothing = num_pairs(batch), scores.log_probs.sum() * 0  # with a gradient that is zero
        if not count:
            return PairScores(nothing, nothing, 0, 0.0, {}, *nothing.new_zeros(3, 2, 0))
        columns = _Columns.of(batch)
        output, of_reference = _output(scores, columns), _output(RowScores(reference, scores.is_top1, scores.statistics), columns)
        owner = self._owner(self.on_pairs or self.on_tokens)
        inputs = _inputs(columns)
        inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = DPOTrainer.compute_ref_log_probs(owner, lambda **_: of_reference, inputs)
        lengths = columns.mask.sum(1).view(2, count)
        of_pairs = DPOTrainer._compute_loss(owner, lambda **_: output, inputs, return_outputs=False) * count if self.on_pairs else nothing
        of_tokens, num_chosen = nothing, float(lengths[0].sum())
        if self.on_tokens:
            owner = self._owner(self.on_tokens)
            of_tokens = DPOTrainer._compute_loss(owner, lambda **_: output, inputs, return_outputs=False) * num_chosen
        metrics = {name: float(owner._metrics["train"][name][-1]) for name in METRICS}
        log_probs = torch.stack(DPOTrainer.compute_ref_log_probs(owner, lambda **_: output, inputs)).detach()  # summed as TRL sums, `ld_alpha` included
        before = torch.stack([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        return PairScores(of_pairs, of_tokens, count, num_chosen, metrics, log_probs, self.settings["beta"] * (log_probs - before), lengths)

    def _owner(self, kinds: list[tuple[str, float]]) -> Any:
        """What TRL's method reads of its trainer."""
        alone = SimpleNamespace(device=None, gather=_same, gather_for_metrics=_same, autocast=contextlib.nullcontext, unwrap_model=_same)
        return SimpleNamespace(
            accelerator=alone,
            model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
            ref_model=SimpleNamespace(),
            args=SimpleNamespace(discopop_tau=self.settings["discopop_tau"], gradient_checkpointing_kwargs=None),
            aux_loss_enabled=False,
            precompute_ref_logps=True,
            loss_types=[kind for kind, _ in kinds],
            loss_weights=[weight for _, weight in kinds],
            _metrics={"train": defaultdict(list)},
            _total_train_tokens=0,
            _tp_size=1,
            **{name: value for name, value in self.settings.items() if name not in ("loss_type", "loss_weights", "discopop_tau")},
        )


@dataclass(frozen=True)
class _Columns:
    """Where each supervised row stands in a table of one line per answer, all chosen ones before all rejected ones.

    mask: (2P, longest answer) which cells are filled. taken: (M,) the rows that count; line, column: (M,) their cells.
    """

    mask: torch.Tensor
    taken: torch.Tensor
    line: torch.Tensor
    column: torch.Tensor

    @classmethod
    def of(cls, batch: PackedBatch) -> "_Columns":
        """Those of a batch of pairs."""
        counts = torch.tensor([number >= 0 for number in batch.row_numbers], device=batch.sequence_index.device)
        pair = counts[::2].cumsum(0) - 1
        taken = counts[batch.sequence_index].nonzero()[:, 0]
        sequence = batch.sequence_index[taken]
        line = pair[sequence // 2] + (sequence % 2) * counts[::2].sum()
        starts = torch.cat([torch.ones_like(sequence[:1], dtype=torch.bool), sequence[1:] != sequence[:-1]]).nonzero()[:, 0]
        lengths = torch.diff(starts, append=starts.new_tensor([len(sequence)]))
        column = torch.arange(len(sequence), device=sequence.device) - starts.repeat_interleave(lengths)
        mask = torch.zeros(int(counts.sum()), int(lengths.max()), dtype=torch.long, device=sequence.device)
        mask[line, column] = 1
        return cls(mask, taken, line, column)

    def table(self, values: torch.Tensor) -> torch.Tensor:
        """(N,) -> (2P, longest answer), 0 where nothing stands."""
        empty = torch.zeros(self.mask.shape, dtype=values.dtype, device=values.device)
        return empty.index_put((self.line, self.column), values[self.taken])


def _output(scores: RowScores, columns: _Columns) -> Any:
    assert scores.statistics is not None
    entropy, mean_logits, log_sum_sq_probs = map(columns.table, scores.statistics)
    return FusedCausalLMOutput(
        log_probs=columns.table(scores.log_probs),
        is_top1=columns.table(scores.is_top1),
        entropy=entropy,
        mean_logits=mean_logits,
        log_sum_sq_probs=log_sum_sq_probs,
    )


def _inputs(columns: _Columns) -> dict[str, torch.Tensor]:
    padded = F.pad(columns.mask, (1, 0))  # TRL leaves the first column out: it holds no prediction
    return dict.fromkeys(("input_ids", "attention_mask", "completion_mask"), padded)


def _same(value: Any) -> Any:
    return value
