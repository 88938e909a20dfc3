"""What the processes of `test_distributed.py` run: each case through the real trainer, its outcome written to a file by rank 0.

torchrun --nproc_per_node 2 -m tests.distributed_worker CASES.json RESULTS
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from transformers import TrainerCallback

from interlace.data.dataset import load_rows
from interlace.data.packing import MicroBatch, Plan
from interlace.data.sources import read_entries
from interlace.model.costs import step_costs
from interlace.model.loading import resolve_model_path
from interlace.ranks import Ranks
from interlace.training import parts
from interlace.training.checkpoint import Saver
from interlace.training.fragments import full_parameters, local_fragments, restore_fragments
from interlace.training.outline import empty_model
from interlace.training.planned import PlannedRows
from interlace.training.planning import training_plan
from interlace.training.restoring import Survival
from interlace.training.run import answers_of
from interlace.training.sharding import start_processes
from interlace.training.stopping import StopSignals
from interlace.training.trainer import PackedTrainer
from interlace.training.watch import Watch


class GivenPlan(Plan):
    """Steps as they are given: of each optimizer step, each rank's micro-batches in order."""

    def __init__(self, steps: list[list[list[MicroBatch]]]):
        self.given, self.world_size, self.accumulation = steps, len(steps[0]), len(steps[0][0])
        self.prefixes = None
        self.batches_per_epoch = len(steps) * self.world_size * self.accumulation

    def share(self, epoch: int, rank: int) -> list[MicroBatch]:
        return [batch for step in self.given for batch in step[rank]]


class Losses(TrainerCallback):
    """Every logged loss."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        self.values += [logs["loss"]] if logs and "loss" in logs else []


class Keeper(TrainerCallback):
    """Puts the state in `restore` into the engine before the first step, stores it in `store` after step `store_at`, and keeps the weights that `watch`
    names after every step."""

    def __init__(self, case: dict[str, Any]):
        self.case = case
        self.watched: dict[str, torch.Tensor] = {}
        self.trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if "restore" in self.case:
            restore_fragments(self.trainer.model_wrapped, self.trainer.optimizer, *stored(Path(self.case["restore"])))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.case.get("store_at"):
            store(self.trainer.model_wrapped, self.trainer.optimizer, Path(self.case["store"]))
        if "watch" in self.case:
            for name, value in full_parameters(self.trainer.model_wrapped):
                if value is not None and self.case["watch"] in name:
                    self.watched[f"{state.global_step} {name}"] = value.clone()


def store(engine: Any, optimizer: Any, folder: Path) -> None:
    """Each rank's fragments in a file of its own."""
    fragments, scalars = local_fragments(engine, optimizer)
    rank = distributed.get_rank()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({str(i): fragment.values.clone() for i, fragment in enumerate(fragments)}, folder / f"{rank}.safetensors")
    entries = [(fragment.name, fragment.key, fragment.start, fragment.shape) for fragment in fragments]
    (folder / f"{rank}.json").write_text(json.dumps({"entries": entries, "scalars": scalars}))
    distributed.barrier()


def stored(folder: Path) -> tuple[Any, dict[str, dict[str, Any]], dict[str, dict[str, float]]]:
    """`read`, `shapes` and `scalars` of what `store` wrote; every element must have been written exactly once."""
    whole: dict[tuple[str, str], torch.Tensor] = {}
    written: dict[tuple[str, str], torch.Tensor] = {}
    shapes: dict[str, dict[str, Any]] = {}
    for path in folder.glob("*.json"):
        found, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
        for number, (name, key, start, shape) in enumerate(found["entries"]):
            values, size = tensors[str(number)], torch.Size(shape).numel()
            shapes.setdefault(name, {})[key] = shape
            whole.setdefault((name, key), torch.zeros(size, dtype=values.dtype))[start : start + len(values)] = values
            written.setdefault((name, key), torch.zeros(size))[start : start + len(values)] += 1
    assert all((count == 1).all() for count in written.values())
    return (lambda name, key, start, length: whole[name, key][start : start + length]), shapes, found["scalars"]


def wake_adapter(packed: nn.Module) -> None:
    """`lora_B` starts at zero: an adapter that does nothing proves nothing."""
    for name, parameter in packed.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.linspace(-0.2, 0.2, parameter.numel()).view_as(parameter))


def build(case: dict[str, Any]) -> tuple[PackedTrainer, Keeper]:
    arguments = case["arguments"]
    start_processes(arguments)
    ranks = Ranks()
    survival = Survival(ranks, Watch(ranks, 600), StopSignals(), Saver(Path(arguments["output_dir"]), ranks.rank, ranks.world_size, {}))
    args = parts.training_arguments(arguments)
    path = resolve_model_path(arguments["model_name_or_path"])
    processing = parts.processing_of(path, arguments)
    reader = parts.row_reader(arguments, processing)
    rows, _ = load_rows(read_entries(arguments["dataset"]["train"], args.seed), reader, arguments, False)
    tuned = parts.load_tuned_model(path, arguments, args)
    wake_adapter(tuned.packed)
    config, costs = processing.config, step_costs(empty_model(processing.config, arguments))
    train = PlannedRows(rows, GivenPlan(case["steps"]) if "steps" in case else training_plan(rows, config, costs, arguments, args))
    evaluation = parts.evaluation_rows(arguments, reader, config, costs, args)
    keeper = Keeper(case)
    trainer = PackedTrainer(tuned, processing, args, train, evaluation, {}, [Losses(), keeper], survival)
    trainer.answers = answers_of(arguments, processing, evaluation, reader, args)
    keeper.trainer = trainer
    return trainer, keeper


def run(case: dict[str, Any], results: Path) -> None:
    trainer, keeper = build(case)
    trainer.train()
    engine = trainer.model_wrapped
    stage = engine.zero_optimization_stage() if case["arguments"]["deepspeed"] else None
    weights = {name: value.float().clone() for name, value in full_parameters(engine, frozen=True) if value is not None}
    if distributed.get_rank() == 0:
        losses = next(callback.values for callback in trainer.callback_handler.callbacks if isinstance(callback, Losses))
        metrics = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        save_file(weights, results / f"{case['name']}.safetensors")
        if keeper.watched:
            save_file(keeper.watched, results / f"{case['name']} watched.safetensors")
        outcome = {"engine": type(engine).__name__, "stage": stage, "losses": losses, "eval": metrics}
        (results / f"{case['name']}.json").write_text(json.dumps(outcome))


def main() -> None:
    torch.set_num_threads(1)
    cases, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    environment = dict(os.environ)
    for case in cases:
        run(case, results)
        gc.collect()
        for name in set(os.environ) - set(environment):  # accelerate leaves word of the engine there
            del os.environ[name]
    (results / f"done{os.environ['RANK']}").touch()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # a process group's threads abort the interpreter's own shutdown now and then
