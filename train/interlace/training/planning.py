"""The run's plan: rows and their costs -> optimizer steps, by the arguments."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PretrainedConfig, TrainingArguments

from interlace.arguments import Arguments
from interlace.data.dataset import Rows
from interlace.data.packing import Plan, Prefixes, token_budget
from interlace.errors import InputError
from interlace.model.costs import BatchShape, StepCosts, path_pairs
from interlace.model.families import family_of


@dataclass(frozen=True)
class Columns:
    """Length, tiles that the tower sees, supervised tokens, and pairs of two tiles of one image, of every row, (N,) each."""

    lengths: np.ndarray
    num_images: np.ndarray
    supervised: np.ndarray
    num_tile_pairs: np.ndarray | float = 0.0

    def flops(self, costs: StepCosts) -> np.ndarray:
        """(N,) FLOPs that each row requires, forward and backward; a micro-batch requires their sum, since its rows do not see each other."""
        lengths: Any = self.lengths.astype(np.float64)
        images: Any = self.num_images
        pairs: Any = self.num_tile_pairs
        supervised: Any = self.supervised
        near: Any = 0.0 if costs.window is None else path_pairs(lengths, costs.window)
        shape = BatchShape(lengths, path_pairs(lengths), images, supervised, num_tile_pairs=pairs, num_near_pairs=near)
        return np.asarray(costs.total(shape).required)


def columns_of(rows: Rows, config: PretrainedConfig) -> Columns:
    """What costs are counted from."""
    return _columns(rows.lengths, rows.num_images, rows.image_tokens, rows.supervised, config)


def _columns(lengths: np.ndarray, num_images: np.ndarray, image_tokens: np.ndarray, supervised: np.ndarray, config: PretrainedConfig) -> Columns:
    """As many tiles as fill the images' tokens; of those that a row's images put together with more or less than they hold, about as many."""
    family = family_of(config)
    tiles = np.maximum(num_images, np.rint(image_tokens / family.tokens_per_tile(config)).astype(np.int64))
    return Columns(lengths, tiles, supervised, tiles**2 / np.maximum(num_images, 1) if family.tower.sees_images else 0.0)


def training_plan(rows: Rows, config: PretrainedConfig, costs: StepCosts, arguments: Arguments, args: TrainingArguments) -> Plan:
    """The plan of the run's epochs for this world size.

    Raises:
        InputError: `max_tokens_per_batch` is too small for a row.
    """
    prefixes = prefixes_of(rows, config, costs, arguments["max_rows_per_prefix"]) if arguments["share_prefix"] else None
    lengths, seed = rows.lengths.tolist(), args.seed if args.data_seed is None else args.data_seed
    budget = budget_of(rows, prefixes, args.per_device_train_batch_size, arguments["max_tokens_per_batch"] if arguments["packing"] else None)
    settings: dict[str, Any] = {
        "lengths": lengths,
        "costs": columns_of(rows, config).flops(costs),
        "budget": budget,
        "rows_per_batch": None if arguments["packing"] else args.per_device_train_batch_size,
        "seed": seed,
        "world_size": args.world_size,
        "accumulation": args.gradient_accumulation_steps,
        "copies": rows.copies,
        "sources": rows.sources,
        "prefixes": prefixes,
    }
    plan = Plan(epochs=max(1, int(-(-args.num_train_epochs // 1))), **settings)
    if args.max_steps > 0:
        plan = Plan(epochs=max(1, -(-args.max_steps // plan.steps_per_epoch)), **settings)
    return plan


def evaluation_plan(rows: Rows, config: PretrainedConfig, costs: StepCosts, args: TrainingArguments) -> Plan:
    """One epoch over the rows in order."""
    lengths, flops = rows.lengths.tolist(), columns_of(rows, config).flops(costs)
    return Plan(lengths, flops, token_budget(lengths, args.per_device_eval_batch_size, None), None, 1, 0, args.world_size, shuffle=False)


def prefixes_of(rows: Rows, config: PretrainedConfig, costs: StepCosts, max_rows: int) -> Prefixes | None:
    """Which rows begin with the same images and text; None if no two do."""
    _, first, inverse, counts = np.unique(rows.prefixes, return_index=True, return_inverse=True, return_counts=True)
    shared = np.flatnonzero((counts > 1) & (rows.prefixes[first] != 0))
    if not len(shared):
        return None
    shared = shared[np.argsort(first[shared])]  # numbered as they come, whatever the hash that found them
    numbers = np.full(len(counts), -1)
    numbers[shared] = np.arange(len(shared))
    lengths, images, tokens = (values[first[shared]] for values in (rows.prefix_lengths, rows.prefix_images, rows.prefix_image_tokens))
    columns = _columns(lengths, images, tokens, np.zeros(len(shared), np.int64), config)
    return Prefixes(numbers[inverse], lengths, columns.num_images, columns.flops(costs), max_rows)


def budget_of(rows: Rows, prefixes: Prefixes | None, rows_per_batch: int, max_tokens_per_batch: int | None) -> int:
    """Tokens per micro-batch; see `wanted_budget`.

    Raises:
        InputError: `max_tokens_per_batch` is smaller than the longest row.
    """
    longest = int(rows.lengths.argmax())
    if max_tokens_per_batch is not None and max_tokens_per_batch < rows.lengths[longest]:
        row = rows[longest]
        raise InputError(
            f"max_tokens_per_batch: {max_tokens_per_batch:,} is less than {row.file}: row {row.index} with {row.length:,} tokens; set it to {row.length} at "
            f"least, or max_length to {max_tokens_per_batch} (then too_long decides about longer rows)"
        )
    return wanted_budget(rows.lengths, prefixes, rows_per_batch, max_tokens_per_batch)


def wanted_budget(lengths: np.ndarray, prefixes: Prefixes | None, rows_per_batch: int, max_tokens_per_batch: int | None) -> int:
    """Tokens per micro-batch: what the user says, else rows_per_batch times the mean length, what rows share counted once. Always room for the longest row, and
    by default for the most rows that may share a prefix."""
    if prefixes is None or max_tokens_per_batch is not None:
        return token_budget(lengths, rows_per_batch, max_tokens_per_batch)
    _, sizes = prefixes.units(range(len(lengths)), lengths.tolist(), int(lengths.sum()))
    return max(max(sizes), round(rows_per_batch * sum(sizes) / len(lengths)))


def tokens_of(plan: Plan) -> int:
    """Tokens that the language model sees in the first epoch, what rows share counted once."""
    return sum(plan.num_tokens(batch) for step in plan.steps(0) for batch in step)
