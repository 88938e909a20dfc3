"""Scaling by simulation, 8 to 512 ranks, from the real plan: `python benchmarks/scaling.py` with `train/` on PYTHONPATH. Nothing is trained.

Rows are drawn from a fixed mixture; `Plan` packs and shares them as in a run. What a micro-batch costs is counted in FLOPs of the real configurations. Bytes
and their seconds are computed by formula, not measured.
"""

import argparse
import platform
import random
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch
import transformers
from forecast import config_05b
from transformers import LlavaConfig, LlavaForConditionalGeneration

from interlace.data.packing import MicroBatch, Plan, token_budget
from interlace.model.costs import BatchShape, StepCosts, step_costs
from interlace.model.tuning import Lora, tune

RANKS = (8, 16, 32, 64, 128, 256, 512)
IMAGE_TOKENS = 729
IMAGE_SHARES = {1: 25, 2: 30, 3: 10, 4: 10, 5: 8, 6: 5, 8: 7, 10: 3, 16: 2}  # images per row -> percent of rows
PROMPT, ANSWERS, SPREAD = 60, (50, 200), 0.5  # median tokens; log-normal with this deviation
GIGABYTES_PER_SECOND = (25, 50, 450)  # per rank and direction: 200 and 400 Gbit/s networks, NVLink 4
PARAMETER_BYTES = 2  # bf16, gradients too


@dataclass(frozen=True)
class Rows:
    """Rows by their counts: `lengths` in expanded tokens, `images`, `answers` (supervised tokens)."""

    lengths: list[int]
    images: list[int]
    answers: list[int]


class KeptPlan(Plan):
    """A plan that packs its only epoch once, however many ranks ask for their share."""

    _kept: list[list[MicroBatch]] | None = None

    def steps(self, epoch: int) -> list[list[MicroBatch]]:
        if self._kept is None:
            self._kept = super().steps(epoch)
        return self._kept


def draw_rows(count: int) -> Rows:
    """Rows of the mixture, half of them with each answer length."""
    randomness = random.Random(0)
    images = randomness.choices(list(IMAGE_SHARES), list(IMAGE_SHARES.values()), k=count)
    answers = [max(1, round(ANSWERS[i % 2] * randomness.lognormvariate(0, SPREAD))) for i in range(count)]
    prompts = [max(1, round(PROMPT * randomness.lognormvariate(0, SPREAD))) for _ in range(count)]
    return Rows([n * IMAGE_TOKENS + p + a for n, p, a in zip(images, prompts, answers, strict=True)], images, answers)


def config_7b() -> LlavaConfig:
    """LLaVA-NeXT-Interleave 7B."""
    config = config_05b()
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads = 4096, 11008, 32, 32, 32
    text.layer_types = ["full_attention"] * 32
    text.tie_word_embeddings = config.tie_word_embeddings = False
    return config


@dataclass(frozen=True)
class Model:
    """A model as it trains: FLOPs of its parts; parameters in the module that is wrapped (a frozen tower is not), and those that learn."""

    costs: StepCosts
    wrapped: int
    trained: int


def make_model(config: LlavaConfig, lora: Lora | None) -> Model:
    """The model on the meta device: shapes only."""
    with torch.device("meta"):
        tuned = tune(LlavaForConditionalGeneration(config), ["projector", "language_model"], lora, None)
    parameters = list(tuned.packed.parameters())
    return Model(step_costs(tuned), sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad))


def row_flops(rows: Rows, costs: StepCosts) -> list[float]:
    """FLOPs of each row, forward and backward; packed rows do not see each other, so a micro-batch costs the sum of its rows."""
    shapes = (BatchShape(t, t * (t + 1) / 2, n, a) for t, n, a in zip(rows.lengths, rows.images, rows.answers, strict=True))
    return [costs.total(shape).executed for shape in shapes]


def shares(plan: Plan) -> list[list[MicroBatch]]:
    """Every rank's micro-batches of the epoch, as the plan hands them out."""
    return [plan.share(0, rank) for rank in range(plan.world_size)]


def busy_share(dealt: list[list[MicroBatch]], costs: list[float], accumulation: int) -> float:
    """Mean over max of the ranks' work between two synchronisations, over an epoch: 1 is perfect."""
    per_rank = np.array([[sum(costs[max(row, ~row)] for row in batch) for batch in mine] for mine in dealt])
    per_step = per_rank.reshape(len(dealt), -1, accumulation).sum(2)
    return float(per_step.mean(0).sum() / per_step.max(0).sum())


def balance_lines(rows: Rows, flops: list[list[float]], rows_per_batch: int, accumulation: int) -> list[str]:
    """One line per number of ranks; `flops` of each row, for each model."""
    budget, lines, tokens = token_budget(rows.lengths, rows_per_batch, None), [], [float(length) for length in rows.lengths]
    for world in RANKS:
        plan = KeptPlan(rows.lengths, tokens, budget, None, 1, 0, world, accumulation)
        dealt, batches = shares(plan), [batch for step in plan.steps(0) for batch in step]
        fillers = sum(all(row < 0 for row in batch) for batch in batches)
        cells = [f"{busy_share(dealt, tokens, accumulation):.1%}"]
        for costs in flops:
            aware = KeptPlan(rows.lengths, costs, budget, None, 1, 0, world, accumulation)  # steps made and dealt by FLOPs, as training does
            cells += [f"{busy_share(dealt, costs, accumulation):.1%}", f"{busy_share(shares(aware), costs, accumulation):.1%}"]
        used = sum(rows.lengths) / (len(batches) * budget)
        lines.append(f"| {world} | {accumulation} | {plan.steps_per_epoch:,} | {used:.1%} | {fillers / len(batches):.2%} | {' | '.join(cells)} |")
    return lines


def volumes(model: Model, world: int, accumulation: int) -> dict[str, float]:
    """Bytes that each rank sends in an optimizer step. A reduce-scatter or an all-gather of S bytes over a ring sends S (n - 1) / n, an all-reduce both
    (Patarasuk and Yuan, 2009); what a stage sends of which: ZeRO, arXiv 1910.02054, section 7. DDP and ZeRO-1 wait for the last micro-batch of a step."""
    ring = (world - 1) / world * PARAMETER_BYTES
    return {
        "DDP": 2 * model.trained * ring,
        "ZeRO-1": 2 * model.trained * ring,
        "ZeRO-2": (accumulation + 1) * model.trained * ring,
        "ZeRO-3": accumulation * (2 * model.wrapped + model.trained) * ring,
    }


def volume_lines(models: dict[str, Model]) -> list[str]:
    """One line per model, accumulation and stage; the factor (n - 1) / n hardly changes from 8 ranks on, so two numbers of ranks are enough."""
    lines = []
    for name, model in models.items():
        for accumulation in (1, 4):
            few, many = (volumes(model, world, accumulation) for world in (RANKS[0], RANKS[-1]))
            for stage in few:
                seconds = " | ".join(f"{many[stage] / 1e9 / speed:.3f}" for speed in GIGABYTES_PER_SECOND)
                lines.append(f"| {name} | {accumulation} | {stage} | {few[stage] / 1e9:.2f} | {many[stage] / 1e9:.2f} | {seconds} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--rows-per-batch", type=int, default=8, help="per_device_train_batch_size")
    options = parser.parse_args()
    start = time.perf_counter()
    rows = draw_rows(options.rows)
    lora = Lora(16, 32, 0.0, None)
    full = {"0.5B, full": make_model(config_05b(), None), "7B, full": make_model(config_7b(), None)}
    models = {**full, "0.5B, LoRA 16": make_model(config_05b(), lora), "7B, LoRA 16": make_model(config_7b(), lora)}
    flops = [row_flops(rows, model.costs) for model in full.values()]
    balance = balance_lines(rows, flops, options.rows_per_batch, 1) + balance_lines(rows, flops, options.rows_per_batch, 4)
    budget = token_budget(rows.lengths, options.rows_per_batch, None)
    lines = [
        f"# Scaling by simulation, 8 to 512 ranks; torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}",
        "",
        f"{options.rows:,} rows of a mixture (images per row: {', '.join(f'{n}: {share}%' for n, share in IMAGE_SHARES.items())}; {IMAGE_TOKENS} tokens each; "
        f"prompt and answer log-normal about {PROMPT} and {' or '.join(map(str, ANSWERS))} tokens), mean {np.mean(rows.lengths):,.0f} tokens; "
        f"`per_device_train_batch_size` {options.rows_per_batch}, so at most {budget:,} tokens per micro-batch. Packed and shared by the real plan, one epoch; "
        f"simulated in {time.perf_counter() - start:.0f} s.",
        "",
        "Busy: mean over max of the ranks' work between two synchronisations, over the epoch; the rest is time spent waiting for the slowest rank. "
        "*Tokens*: the plan sorts and deals by tokens, and work is counted in tokens, or in FLOPs (full tuning, frozen tower). *FLOPs*: the plan "
        "sorts and deals by the FLOPs "
        "of each row, as training does.",
        "",
        "| ranks | accumulation | steps per epoch | budget used | fillers | tokens: busy, in tokens | "
        + " | ".join(f"{n}: tokens | FLOPs" for n in full)
        + " |",
        "|---|---|---|---|---|---|" + "---|" * 2 * len(full),
        *balance,
        "",
        "## Bytes per optimizer step and rank: computed, not measured",
        "",
        *[f"- {n}: {m.wrapped:,} parameters in the wrapped module, {m.trained:,} of them learn" for n, m in models.items()],
        "",
        "Sent bytes by formula, bf16 parameters and gradients; seconds without overlap, latency or contention, at 512 ranks.",
        "",
        f"| model | accumulation | stage | GB, {RANKS[0]} ranks | GB, {RANKS[-1]} ranks | " + " | ".join(f"s at {g} GB/s" for g in GIGABYTES_PER_SECOND) + " |",
        "|---|---|---|---|---|" + "---|" * len(GIGABYTES_PER_SECOND),
        *volume_lines(models),
        "",
    ]
    text = "\n".join(lines)
    path = Path(__file__).parent / "results" / f"scaling_cpu_{date.today()}.md"
    path.write_text(text)
    print(f"{text}\n{path}")


if __name__ == "__main__":
    main()
