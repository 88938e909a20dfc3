"""The trainer of preference tuning: the policy against its reference on packed pairs, and what evaluation says of preferences."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from torch import nn

from interlace.data.batch import PackedBatch
from interlace.data.dataset import Rows
from interlace.model.head import RowScores
from interlace.model.preference_loss import METRICS, PairScores, PreferenceLoss, chosen_rows, num_pairs
from interlace.model.reference import FrozenCopy, Reference
from interlace.training.clock import PREFERENCE_PHASES
from interlace.training.planned import PlannedRows
from interlace.training.sharding import inference_engine
from interlace.training.trainer import PackedTrainer

_MOST_GROUPS = 20  # sources, and numbers of images, that evaluation speaks of one by one


class PreferenceTrainer(PackedTrainer):
    """A `PackedTrainer` on pairs of answers.

    Args:
        values: see `PackedTrainer`.
        loss: on the log-probs of policy and reference.
        reference: where those of the reference come from.
        views: name -> some of the evaluation's pairs with other images: `blank`, `swapped`.
    """

    more_counts = ("pairs", *METRICS)
    phases = PREFERENCE_PHASES
    num_weights = 2

    def __init__(self, *values: Any, loss: PreferenceLoss, reference: Reference, views: Mapping[str, PlannedRows]):
        super().__init__(*values)
        self.loss, self.reference, self.views = loss, reference, views
        self._pairs: PairScores | None = None

    def _prepare_for_training(self, *values: Any) -> Any:
        prepared = super()._prepare_for_training(*values)
        if isinstance(self.reference, FrozenCopy):
            self.reference.module = inference_engine(self.reference.module, self.args)
        return prepared

    # --- the step ---

    def weigh(self, batch: PackedBatch) -> list[float]:
        """Pairs, and tokens of their chosen answers."""
        return [float(num_pairs(batch)), float(chosen_rows(batch).sum())]

    def counted(self, batch: PackedBatch) -> torch.Tensor:
        """(N,) the chosen answers' tokens."""
        return chosen_rows(batch)

    def share_of_loss(self, model: nn.Module, values: dict[str, Any], inputs: PackedBatch) -> tuple[torch.Tensor, RowScores]:
        """The micro-batch's share of the step's loss per pair (of `sft`, per chosen token), and the policy's scores."""
        reference = self.reference.log_probs(self.callable_model, values, inputs, "train")
        self.clock.mark("reference")
        with self.offloaded():
            scores: RowScores = model(**values, with_statistics=True)
        self._pairs = pairs = self.loss(scores, reference, inputs)
        total_pairs, total_chosen = self._totals
        return pairs.of_pairs / total_pairs + pairs.of_tokens / total_chosen, scores

    def _count(self) -> None:
        assert self._pairs is not None
        pairs, self._pairs = self._pairs, None
        values = [1.0, *(pairs.metrics.get(name, 0.0) for name in METRICS)]
        self._counts[5:] += pairs.num_pairs * torch.tensor(values, dtype=torch.float64, device=self._counts.device)
        super()._count()

    def more_logs(self, sums: dict[str, float]) -> dict[str, float]:
        """TRL's metrics, means over the pairs since the last log."""
        return {name: sums[name] / max(sums["pairs"], 1) for name in METRICS}

    # --- evaluation ---

    def score(self, packed: nn.Module, planned: PlannedRows) -> dict[str, float]:
        """Loss and TRL's metrics over the pairs of all ranks, in groups too, and what becomes of the margins with other images."""
        sums, table = self._scored(packed, planned, "eval")
        pairs, chosen = sums["pairs"], max(sums["chosen"], 1)
        found = {"loss": sums["of_pairs"] / pairs + sums["of_tokens"] / chosen, "token_accuracy": sums["right"] / chosen}
        found |= {name: sums[name] / pairs for name in METRICS}
        assert isinstance(planned.rows, Rows)
        found |= diagnosed(table, planned.rows)
        for name, view in self.views.items():
            changed = float(self._scored(packed, view, name)[1].margin.mean())
            true = float(table.margin[view.rows.numbers].mean())  # type: ignore[attr-defined]
            found |= {f"rewards/margins_{name}": changed, f"rewards/{name}_gap": true - changed}
        return found

    def _scored(self, packed: nn.Module, planned: PlannedRows, view: str) -> tuple[dict[str, float], pandas.DataFrame]:
        """Sums over all ranks, and a table of all pairs by their row numbers: `chosen` and `rejected` log-probs, their gain over the reference, tokens."""
        names = ("pairs", "chosen", "of_pairs", "of_tokens", "right", *METRICS)
        sums, lines = np.zeros(len(names)), []
        for batch, values in self.batches(planned):
            reference = self.reference.log_probs(packed, values, batch, view)
            scores: RowScores = packed(**values, with_statistics=True)
            pairs = self.loss(scores, reference, batch)
            right = float((scores.is_top1 & chosen_rows(batch)).sum())
            means = [pairs.metrics.get(name, 0.0) for name in METRICS]
            sums += [pairs.num_pairs, pairs.num_chosen, float(pairs.of_pairs), float(pairs.of_tokens), right, *np.array(means) * pairs.num_pairs]
            numbers = torch.tensor([number for number in batch.row_numbers[::2] if number >= 0])
            columns = [numbers[None], *(part.cpu() for part in (pairs.log_probs, pairs.rewards, pairs.lengths))]
            lines.append(torch.cat([column.double() for column in columns]).T.numpy())
        totals = self.survival.ranks.sum(sums.tolist())
        table = pandas.DataFrame(np.concatenate(self.survival.ranks.gather(np.concatenate(lines))), columns=COLUMNS)
        table = table.astype({"row": int}).set_index("row").sort_index()
        table["margin"] = table.chosen_reward - table.rejected_reward
        table["drift"] = table.chosen_reward / self.loss.settings["beta"] / table.chosen_tokens
        return dict(zip(names, totals, strict=True)), table


COLUMNS = ["row", "chosen", "rejected", "chosen_reward", "rejected_reward", "chosen_tokens", "rejected_tokens"]


def diagnosed(table: pandas.DataFrame, rows: Rows) -> dict[str, float]:
    """How often the chosen answer is the likelier one; how far chosen answers have drifted from the reference, in log-prob per token; how much the margin
    follows the length; accuracy and margin by source and by number of images."""
    likelier, longer = table.chosen > table.rejected, table.chosen_tokens - table.rejected_tokens
    found = {"logps/accuracies": float(likelier.mean()), "logps/chosen_drift": float(table.drift.mean())}
    if table.margin.std() > 0 and longer.std() > 0:
        found["rewards/length_correlation"] = float(table.margin.corr(longer))
    files = [Path(store.file).name for store in rows.stores]
    sources, images = (values[table.index.to_numpy()] for values in (rows.sources, rows.num_images))
    for names in ([files[source] for source in sources], [f"{count}_images" for count in images]):
        groups = table.margin.groupby(names)
        if 1 < len(groups) <= _MOST_GROUPS:
            found |= {f"rewards/accuracies/{name}": float((margin > 0).mean()) for name, margin in groups}
            found |= {f"rewards/margins/{name}": float(margin.mean()) for name, margin in groups}
    return found
