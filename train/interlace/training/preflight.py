"""What `plan_run.py` finds out: rows checked, steps planned, memory, time and disk forecast, a configuration that fits."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PretrainedConfig, TrainingArguments

from interlace.arguments import Arguments, did_you_mean
from interlace.data.batch import PackedBatch
from interlace.data.dataset import Rows, open_rows
from interlace.data.ledger import Ledger, check_ledger
from interlace.data.packing import Plan
from interlace.data.reading import Kind, RowReader, wanted_kind
from interlace.data.sources import read_entries
from interlace.errors import InputError
from interlace.model.costs import BatchShape, StepCosts, step_costs
from interlace.model.loading import Processing
from interlace.preference_arguments import preference_problems
from interlace.training.fitting import Fit, Search
from interlace.training.forecast import (
    Disk,
    Machine,
    Memory,
    MicroShape,
    Sharding,
    Sizes,
    Speed,
    disk_of,
    fits,
    fullest,
    mean_shape,
    memory_of,
    micro_shapes,
    rehearse_all,
    sharding_of,
    sizes_of,
)
from interlace.training.outline import asks_reference, checkpoints, compute_dtype, empty_model
from interlace.training.parts import load_tuned_model, row_reader
from interlace.training.planning import columns_of, prefixes_of
from interlace.training.probe import probe
from interlace.training.rehearsal import Rehearsal
from interlace.training.resume import check_output_dir, folders_of_lists


@dataclass(frozen=True)
class Checked:
    """The rows of `dataset.train` or `dataset.eval`, their account, and why training would refuse them (None if it would not)."""

    rows: Rows
    ledger: Ledger
    refusal: str | None


def check_rows(entries: list[Any], reader: RowReader, arguments: Arguments) -> Checked:
    """Reads and checks every row, as training does it; bad rows do not stop it.

    Raises:
        InputError: a file cannot be read at all.
    """
    sources = read_entries(entries, arguments["seed"])
    (rows, ledger), refusal = open_rows(sources, reader, arguments, show_progress=True), None
    try:
        check_ledger(ledger, reader.too_long, arguments["bad_rows"], arguments["max_bad_rows"])
    except InputError as error:
        refusal = str(error)
    return Checked(rows, ledger, refusal)


def kind_of(arguments: Arguments) -> Kind:
    """Which script the rows are for: that of supervised rows, or that of pairs."""
    return wanted_kind(read_entries(arguments["dataset"]["train"], arguments["seed"]))


def check_data(arguments: Arguments, path: str, processing: Processing) -> tuple[dict[str, Checked], list[str]]:
    """The rows, under "training" and "evaluation", and all reasons for which training would refuse to start.

    Raises:
        InputError: a file cannot be read at all.
    """
    reader, names = row_reader(arguments, processing, kind_of(arguments)), {"training": "train", "evaluation": "eval"}
    found = {name: check_rows(arguments["dataset"][key], reader, arguments) for name, key in names.items() if arguments["dataset"].get(key)}
    refusals = [checked.refusal for checked in found.values() if checked.refusal] + refused_output(arguments, path)
    refusals += preference_problems(arguments, did_you_mean) if kind_of(arguments) == "preference" else []
    return found, [f"training would refuse to start: {refusal}" for refusal in refusals]


def refused_output(arguments: Arguments, path: str) -> list[str]:
    """Why training would not write into `output_dir`."""
    sources = [path, *([arguments["lora_path"]] if arguments["lora_path"] else []), *folders_of_lists(arguments)]
    try:
        check_output_dir(Path(arguments["output_dir"]), bool(arguments["resume_from_checkpoint"]), arguments["overwrite_output_dir"], sources)
    except InputError as error:
        return [str(error)]
    return []


@dataclass(frozen=True)
class RunForecast:
    """What a run on `world_size` devices needs. `shapes` are the first epoch's micro-batches; `parts` (name, parameters, those that learn)."""

    plan: Plan
    world_size: int
    steps_per_epoch: int
    total_steps: int
    workers: int
    shapes: list[MicroShape]
    costs: StepCosts
    sizes: Sizes
    rehearsals: list[Rehearsal]
    disk: Disk
    parts: list[tuple[str, int, int]]
    sharding: Sharding

    def memory(self, machine: Machine, sharding: Sharding | None = None) -> Memory:
        """Memory of one device; without `sharding`, as the arguments want it."""
        return self.memory_on(machine.device, sharding)

    def memory_on(self, device: str, sharding: Sharding | None = None) -> Memory:
        """The same, on a device of this kind: "cuda" or "cpu"."""
        return memory_of(self.sizes, self.rehearsals, sharding or self.sharding, self.plan.accumulation, device)

    def fits(self, machine: Machine) -> bool:
        """Whether it fits this machine's device."""
        return fits(self.memory(machine), machine.memory)

    @cached_property
    def mean(self) -> BatchShape:
        """The mean micro-batch."""
        return mean_shape(self.shapes, self.costs.window)

    @property
    def step_flops(self) -> float:
        """FLOPs that a step of one device requires."""
        return self.costs.total(self.mean).required * self.plan.accumulation

    def step_seconds(self, speed: Speed) -> float:
        """Of an optimizer step, on average."""
        return speed.step(self.costs, self.mean, self.plan.accumulation, self.workers)


def forecast_run(rows: Rows, plan: Plan, arguments: Arguments, args: TrainingArguments, config: PretrainedConfig, world_size: int) -> RunForecast:
    """Steps, costs, memory and disk of a run on `world_size` devices.

    Raises:
        InputError: what is to learn does not fit the model.
    """
    steps_per_epoch = -(-plan.batches_per_epoch // (world_size * plan.accumulation))
    total_steps = args.max_steps if args.max_steps > 0 else int(-(-steps_per_epoch * args.num_train_epochs // 1))
    shapes = micro_shapes([batch for step in plan.steps(0) for batch in step], columns_of(rows, config), plan.prefixes)
    tuned = empty_model(config, arguments)
    kind = kind_of(arguments)
    sizes, costs, parts = sizes_of(tuned, arguments, kind), step_costs(tuned, *checkpoints(arguments)), tuned.part_table()
    costs = costs.with_reference() if asks_reference(arguments, kind) else costs
    disk = disk_of(tuned, sizes, arguments, total_steps, total_steps / steps_per_epoch)
    rehearsals = rehearse_all(tuned, fullest(shapes), compute_dtype(arguments))
    workers, sharding = args.dataloader_num_workers, sharding_of(arguments, world_size)
    return RunForecast(plan, world_size, steps_per_epoch, total_steps, workers, shapes, costs, sizes, rehearsals, disk, parts, sharding)


def measure_speed(
    path: str, rows: Rows, forecast: RunForecast, arguments: Arguments, args: TrainingArguments, processing: Processing, limit_seconds: float
) -> Speed:
    """Loads the model and runs a few steps on growing parts of the first micro-batch.

    Raises:
        InputError: the model or an image cannot be loaded.
    """
    tuned = load_tuned_model(path, arguments, args)
    language, vision = checkpoints(arguments)
    if language:
        tuned.packed.activation_checkpointing_enable()
    if vision:
        tuned.packed.checkpoint_tower()
    pack = processing.collator(arguments["share_prefix"]).pack
    first = [max(row, ~row) for row in forecast.plan.steps(0)[0][0]]
    counts = [*(2**i for i in range(len(first).bit_length()) if 2**i < len(first)), len(first)]
    reading: list[float] = []

    def batches() -> Iterator[PackedBatch]:
        for count in tqdm(counts, desc="probing speed", unit="batch", leave=False):
            start = time.perf_counter()
            batch = pack([(row, rows[row]) for row in first[:count]])
            if batch.pixel_values is not None:
                reading.append((time.perf_counter() - start) / len(batch.pixel_values))
            yield batch

    speed = probe(tuned, batches(), forecast.costs, compute_dtype(arguments), args.device, limit_seconds)
    return replace(speed, data_seconds=min(reading, default=0.0))


def search_fit(arguments: Arguments, config: PretrainedConfig, rows: Rows, world_size: int, machine: Machine) -> Fit:
    """A configuration that fits the machine, searched with a line of progress.

    Raises:
        InputError: nothing fits.
    """
    columns, costs = columns_of(rows, config), step_costs(empty_model(config, arguments))
    prefixes = prefixes_of(rows, config, costs, arguments["max_rows_per_prefix"]) if arguments["share_prefix"] else None
    with tqdm(bar_format="{desc} {elapsed}", leave=False) as bar:
        search = Search(
            arguments,
            config,
            columns,
            prefixes,
            world_size,
            machine.device,
            machine.memory,
            lambda changes: bar.set_description_str(f"trying {json.dumps(changes)}"),
            kind_of(arguments),
        )
        return search.run()
