"""What a run says of itself on the terminal: before its first step, and at its end."""

import math
from itertools import pairwise
from pathlib import Path

from transformers import TrainingArguments

from interlace.data.dataset import Rows, describe_formats
from interlace.data.ledger import Ledger
from interlace.model.tuning import TunedModel
from interlace.training.planned import PlannedRows
from interlace.training.planning import tokens_of
from interlace.training.tracking import print_table, say, time_budget
from interlace.training.trainer import PackedTrainer


def describe(tuned: TunedModel, train: PlannedRows, ledger: Ledger, args: TrainingArguments, shares: bool) -> None:
    """Says what will be trained, on what, in how many steps."""
    if args.process_index:
        return
    rows = [(name, f"{total:,}", f"{trainable:,}") for name, total, trainable in tuned.part_table()]
    totals = ("total", *(f"{sum(row[i] for row in tuned.part_table()):,}" for i in (1, 2)))  # type: ignore[misc]
    print_table("parameters", [("part", "total", "trainable"), *rows, totals])
    assert isinstance(train.rows, Rows)
    plan, alone = train.plan, float((train.rows.lengths * train.rows.copies).sum())
    tokens = alone if plan.prefixes is None else tokens_of(plan)
    say("\ntraining: " + "\n          ".join(describe_formats(train.rows.stores)))
    say(f"          {ledger.summary()}")
    say(
        f"plan: {plan.steps_per_epoch:,} steps per epoch with {plan.rows_per_epoch / plan.steps_per_epoch:.1f} rows each, "
        f"in {plan.world_size * plan.accumulation} micro-batches of at most {plan.budget:,} tokens ({tokens / plan.batches_per_epoch / plan.budget:.0%} used)"
    )
    if shares and plan.prefixes is None:
        say("      share_prefix: no two rows begin with the same images and text, so that nothing is shared")
    elif plan.prefixes is not None:
        say(f"      shared prefixes: {tokens:,} tokens per epoch instead of {alone:,.0f} ({alone / tokens:.1f}x fewer)")
    say("")


# Of pairs that were not trained on: how often the chosen answer has gained more than the rejected one, how often it is the likelier one, and by how much the
# margin shrinks when the images do not tell
PAIR_FIGURES = {
    "eval_rewards/accuracies": "reward accuracy",
    "eval_logps/accuracies": "chosen answer likelier",
    "eval_rewards/margins": "reward margin",
    "eval_rewards/margins_blank": "  with blank images",
    "eval_rewards/margins_swapped": "  with images of other pairs",
    "eval_rewards/length_correlation": "  correlation with length",
    "eval_logps/chosen_drift": "chosen log-prob per token, gained",
}


def report(trainer: PackedTrainer, output_dir: Path, metrics: dict[str, float]) -> None:
    """The table at the end, and where everything is."""
    history = trainer.state.log_history
    last = {name: value for entry in history for name, value in entry.items()}
    checkpoint = trainer.survival.checkpoint
    since = "" if checkpoint is None else f" since step {checkpoint.step:,}"
    figures = [("steps", f"{trainer.state.global_step:,}"), (f"minutes{since}", f"{metrics['train_runtime'] / 60:.1f}")]
    logged = [(0, 0.0), *((entry["step"], entry["loss"]) for entry in history if "loss" in entry)]
    sums = [(end - start, (end - start) * loss) for (start, _), (end, loss) in pairwise(logged) if math.isfinite(loss)]
    figures += [("mean training loss", f"{sum(loss for _, loss in sums) / sum(steps for steps, _ in sums):.4f}")] if sums else []
    labels = {"loss": "last loss", "token_accuracy": "last token accuracy", "eval_loss": "evaluation loss", "eval_token_accuracy": "evaluation token accuracy"}
    figures += [(label, f"{last[name]:.4f}") for name, label in labels.items() if name in last]
    figures += [(label, f"{last[name]:.4f}") for name, label in PAIR_FIGURES.items() if name in last]
    figures += time_budget(history)
    speeds = [entry["tokens_per_second"] for entry in history if "tokens_per_second" in entry]
    figures += [("tokens/s (median)", f"{sorted(speeds)[len(speeds) // 2]:,.0f}")] if speeds else []
    print_table("result", figures)
    say(f"\n  model, processor, chat template  {output_dir}")
    say(f"  curves                           {output_dir / 'training_curves.png'}")
    say(f"  every row accounted for          {output_dir / 'ledger.json'}")
    say(f"  talk to it                       python train/predict_multiround.py --model-path {output_dir}")
