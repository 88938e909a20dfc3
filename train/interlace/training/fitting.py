"""A configuration that fits: what to change in a run's arguments so that its forecast stays within some memory."""

import importlib.util
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from interlace.arguments import SCHEMA_PATH, Arguments, resolve
from interlace.data.packing import Prefixes, pack_rows
from interlace.data.reading import Kind
from interlace.errors import InputError
from interlace.model.costs import step_costs
from interlace.training.forecast import (
    Memory,
    MicroShape,
    Sharding,
    fits,
    fullest,
    mean_shape,
    memory_of,
    micro_shapes,
    rehearse_all,
    sharding_of,
    sizes_of,
)
from interlace.training.outline import checkpoints, compute_dtype, empty_model
from interlace.training.planning import Columns, wanted_budget
from interlace.training.rehearsal import Rehearsal

Changes = dict[str, Any]
# Each list from the best to the last resort. What the argument checker refuses is not tried.
PRECISIONS: tuple[Changes, ...] = (
    {},
    {"bf16": True},
    {"load_in_8bit": True},
    {"bf16": True, "load_in_8bit": True},
    {"load_in_4bit": True},
    {"bf16": True, "load_in_4bit": True},
)
SHARDINGS: tuple[tuple[Changes, int, bool], ...] = (  # keys, ZeRO stage, offload
    ({}, 0, False),
    ({"deepspeed": "zero1"}, 1, False),
    ({"deepspeed": "zero2"}, 2, False),
    ({"deepspeed": "zero3"}, 3, False),
    ({"deepspeed": "zero3_offload"}, 3, True),
)
CHECKPOINTING: tuple[Changes, ...] = tuple(
    {"gradient_checkpointing": language, "vision_gradient_checkpointing": vision} for language in (False, True) for vision in (False, True)
)
_STEP = 64  # budgets are multiples of this


@dataclass(frozen=True)
class Fit:
    """What to change, and the forecast with it."""

    changes: Changes
    memory: Memory


def resolved(arguments: Arguments, changes: Mapping[str, Any]) -> tuple[Arguments, list[str]]:
    """The arguments with some changes, and what the argument checker says of them."""
    schema = json.loads(SCHEMA_PATH.read_text(encoding="utf-8"))["properties"]
    config = {**config_of(arguments), **changes}
    return resolve(config, schema, dict.fromkeys(config, "--fit"))


def config_of(arguments: Arguments) -> dict[str, Any]:
    """The keys whose values are not their defaults: a config file of these arguments."""
    schema = json.loads(SCHEMA_PATH.read_text(encoding="utf-8"))["properties"]
    return {name: value for name, value in arguments.items() if value != schema[name].get("default")}


class Search:
    """Tries configurations, the best first.

    Args:
        arguments: what the user asked for.
        config: the model's.
        rows: of the training set; prefixes: what they may share.
        world_size, device: where it is to run.
        available: bytes on each device.
        tried: is told of each configuration that is tried.
        kind: of the rows.
    """

    def __init__(
        self,
        arguments: Arguments,
        config: PretrainedConfig,
        rows: Columns,
        prefixes: Prefixes | None,
        world_size: int,
        device: str,
        available: int,
        tried: Callable[[Changes], None] = lambda changes: None,
        kind: Kind = "supervised",
    ):
        self.arguments, self.config, self.rows, self.prefixes = arguments, config, rows, prefixes
        self.world_size, self.device, self.available, self.tried = world_size, device, available, tried
        self.kind: Kind = kind
        self.longest = int(rows.lengths.max())
        self.wanted = wanted_budget(rows.lengths, prefixes, arguments["per_device_train_batch_size"], arguments["max_tokens_per_batch"])
        self._rehearsals: dict[str, list[Rehearsal]] = {}

    def run(self) -> Fit:
        """The first configuration that fits: precision counts most, then speed, then large micro-batches.

        Smaller micro-batches come with more of them in a step, so that a step keeps its rows.

        Raises:
            InputError: nothing fits; says what the least would need.
        """
        least: Fit | None = None
        for group, sharding in self.candidates():
            frugal = Fit(group[-1], self.forecast(group[-1], sharding, self.longest))
            if not fits(frugal.memory, self.available):
                least = frugal if least is None or frugal.memory.total < least.memory.total else least
                continue
            for changes in group:
                self.tried(changes)
                smallest = self.forecast(changes, sharding, self.longest)
                if fits(smallest, self.available):
                    budget, memory = self._largest_budget(changes, sharding, smallest)
                    return Fit({**changes, **self._batches(budget)}, memory)
        assert least is not None
        gib = 2**30
        whole = "" if self.arguments["lora"] else "; lora: true trains far fewer weights"
        raise InputError(
            f"nothing that was tried fits {self.available / gib:.2f} GiB with a tenth to spare: the least, {json.dumps(least.changes)} with one row of "
            f"{self.longest:,} tokens at a time, needs {least.memory.total / gib:.2f} GiB ({least.memory.weights / gib:.2f} GiB of it weights); "
            f"a smaller model, a lower max_length (then too_long decides about longer rows) or more memory would help{whole}"
        )

    def candidates(self) -> Iterator[tuple[list[Changes], Sharding]]:
        """For each precision and sharding, the best first, what the argument checker accepts, fewest FLOPs (and most memory) first."""
        quantises, shards = (importlib.util.find_spec(name) is not None for name in ("bitsandbytes", "deepspeed"))
        trains_tower = "vision_tower" in self.arguments["tunable_parts"]
        for precision in PRECISIONS:
            if any(self.arguments[name] == value for name, value in precision.items()):
                continue  # that is what the empty change stands for
            if any("load_in" in name for name in precision) and not quantises:
                continue
            for sharding, stage, offload in SHARDINGS:
                if (self.world_size == 1 and stage and not offload) or (stage and not shards):
                    continue
                choices = [choice for choice in CHECKPOINTING if trains_tower or not choice["vision_gradient_checkpointing"]]
                group = [{**precision, **sharding, **self._checkpointing(choice, trains_tower)} for choice in choices]
                group = [changes for changes in group if not resolved(self.arguments, changes)[1]]
                if group:
                    self.tried(group[-1])
                    yield sorted(group, key=self._flops), sharding_of({**self.arguments, **sharding}, self.world_size)

    def _checkpointing(self, choice: Changes, trains_tower: bool) -> Changes:
        newer = {"activation_checkpointing": None} if self.arguments["activation_checkpointing"] is not None else {}
        return {name: value for name, value in choice.items() if trains_tower or "vision" not in name} | newer

    def _flops(self, changes: Changes) -> float:
        arguments = {**self.arguments, **changes}
        costs = step_costs(empty_model(self.config, arguments), *checkpoints(arguments))
        rows, first = self.rows, [[row] for row in range(min(1000, len(self.rows.lengths)))]
        return costs.total(mean_shape(micro_shapes(first, rows), costs.window)).executed

    def forecast(self, changes: Changes, sharding: Sharding, budget: int) -> Memory:
        """Memory with these changes in micro-batches of at most `budget` tokens."""
        arguments = {**self.arguments, **changes}
        tuned = empty_model(self.config, arguments)
        sizes = sizes_of(tuned, arguments, self.kind)
        same = ("bf16", "gradient_checkpointing", "vision_gradient_checkpointing")  # quantised or sharded, the activations are the same
        key = repr([arguments[name] for name in same] + [budget])
        if key not in self._rehearsals:
            self._rehearsals[key] = rehearse_all(tuned, fullest(self._shapes(budget)), compute_dtype(arguments))
        return memory_of(sizes, self._rehearsals[key], sharding, self._accumulation(budget), self.device)

    def _shapes(self, budget: int) -> list[MicroShape]:
        rows, order = self.rows, list(range(len(self.rows.lengths)))
        random.Random(self.arguments["seed"]).shuffle(order)
        return micro_shapes(pack_rows(order, rows.lengths.tolist(), budget, self.prefixes), rows, self.prefixes)

    def _largest_budget(self, changes: Changes, sharding: Sharding, smallest: Memory) -> tuple[int, Memory]:
        """Up to the wanted budget; between two points memory grows in a straight line, or less."""
        budget = self.wanted
        while budget > self.longest:
            memory = self.forecast(changes, sharding, budget)
            if fits(memory, self.available):
                return budget, memory
            room = self.available * 0.9 - smallest.total
            share = max(0.0, room / max(1, memory.total - smallest.total))
            budget = min(self.longest + int((budget - self.longest) * share), budget - _STEP) // _STEP * _STEP
        return self.longest, smallest

    def _accumulation(self, budget: int) -> int:
        return int(-(-self.arguments["gradient_accumulation_steps"] * self.wanted // budget))

    def _batches(self, budget: int) -> Changes:
        if budget == self.wanted and self.arguments["packing"]:
            return {}
        return {"packing": True, "max_tokens_per_batch": budget, "gradient_accumulation_steps": self._accumulation(budget)}


def shown(changes: Changes, arguments: Arguments) -> Sequence[str]:
    """`key: value` of the changes that change something."""
    return [f"{name}: {json.dumps(value)}" for name, value in changes.items() if arguments[name] != value]
