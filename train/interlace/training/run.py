"""A run, from checked arguments to a folder with the result: what supervised and preference tuning share."""

import dataclasses
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError
from transformers import TrainingArguments, get_scheduler

from interlace.arguments import Arguments
from interlace.data.ledger import Ledger
from interlace.data.reading import Kind, RowReader
from interlace.data.sources import read_entries
from interlace.errors import InputError, RunError, Stopped
from interlace.files import write_json, write_whole
from interlace.model import pissa
from interlace.model.costs import StepCosts, step_costs
from interlace.model.loading import Processing, resolve_model_path
from interlace.model.saving import copy_beside
from interlace.model.tuning import TunedModel
from interlace.ranks import Ranks
from interlace.redaction import without_secrets
from interlace.training.answering import Answers, questions
from interlace.training.caching import attach_feature_cache, memory_given_back
from interlace.training.checkpoint import ANSWERS_FOLDER, STATE_FILE, Checkpoint, Saver, newest_step, point_latest
from interlace.training.lock import FolderLock
from interlace.training.model_card import write_model_card
from interlace.training.nodes import check_nodes, meet
from interlace.training.outline import asks_reference, empty_model
from interlace.training.parts import checked_rows, evaluation_rows, load_tuned_model, processing_of, row_reader, training_arguments
from interlace.training.planned import PlannedRows
from interlace.training.planning import training_plan
from interlace.training.publishing import publish
from interlace.training.restoring import Survival
from interlace.training.resume import (
    accumulation_for,
    begin_branch,
    check_data,
    check_output_dir,
    check_settings,
    find_checkpoint,
    finished_steps,
    folders_of_lists,
)
from interlace.training.row_losses import RowLosses
from interlace.training.stopping import StopSignals
from interlace.training.story import tell
from interlace.training.summary import describe, report
from interlace.training.tracking import draw_curves, end_of_trackers, environment, guarded_trackers, say
from interlace.training.trainer import PackedTrainer
from interlace.training.watch import Watch
from interlace.training.weights import load_weights


@dataclass(frozen=True)
class Task:
    """The run that something is made ready for: Hugging Face's arguments, the processes, and the model's path."""

    args: TrainingArguments
    ranks: Ranks
    path: str


# What a kind of tuning makes ready beside the model, while that is still as it was loaded -> what makes its trainer, called as `PackedTrainer` is
Prepare = Callable[[TunedModel, Processing, PlannedRows, PlannedRows | None, Arguments, Task], Callable[..., PackedTrainer]]


def run(arguments: Arguments, kind: Kind, prepare: Prepare) -> None:
    """Trains and saves; see DESIGN's output_dir for what is left behind.

    Args:
        kind: of the rows.
        prepare: see there.

    Raises:
        InputError: something in the arguments or the data is wrong; nothing has been written then.
        RunError: the run cannot go on; its checkpoints stand.
        Stopped: it was asked to stop, and has saved a checkpoint.
    """
    ranks = meet(arguments)
    watch = Watch(ranks, arguments["ddp_timeout"] / 2)
    # report and upload come last, behind the watch: they are rank 0's alone, and may take longer than the others would wait for it
    with StopSignals() as signals, FolderLock() as lock, memory_given_back(), ExitStack() as last, watch.running():
        _run(arguments, kind, prepare, ranks, watch, signals, lock, last)


def _run(arguments: Arguments, kind: Kind, prepare: Prepare, ranks: Ranks, watch: Watch, signals: StopSignals, lock: FolderLock, last: ExitStack) -> None:
    output_dir, path = Path(arguments["output_dir"]), resolve_model_path(arguments["model_name_or_path"])
    sources = [path, *([arguments["lora_path"]] if arguments["lora_path"] else []), *folders_of_lists(arguments)]
    ranks.on_main(lambda: check_output_dir(output_dir, bool(arguments["resume_from_checkpoint"]), arguments["overwrite_output_dir"], sources))
    ranks.on_main(lambda: lock.take(output_dir))
    checkpoint = ranks.on_main(lambda: find_checkpoint(output_dir, arguments, say))
    if checkpoint is not None:
        accumulation = accumulation_for(checkpoint, ranks.world_size, arguments["gradient_accumulation_steps"], say)
        arguments = {**arguments, "gradient_accumulation_steps": accumulation, "eval_on_start": False}
        check_settings(checkpoint, without_secrets(arguments), say)
    args = training_arguments(arguments)
    processing = processing_of(path, arguments)
    reader = row_reader(arguments, processing, kind)
    entries = read_entries(arguments["dataset"]["train"], args.seed)
    rows, ledger = checked_rows(entries, reader, arguments, ranks.is_main)
    costs = step_costs(empty_model(processing.config, arguments))
    train = PlannedRows(rows, training_plan(rows, processing.config, costs, arguments, args))
    data = f"{rows.fingerprint} {train.plan.fingerprint}"
    check_nodes(ranks, without_secrets(arguments), path, data, say)
    evaluation = evaluation_rows(arguments, reader, processing.config, costs, args)
    total_steps = args.max_steps if args.max_steps > 0 else -(-train.plan.steps_per_epoch * args.num_train_epochs // 1)
    if arguments["resume_from_checkpoint"] is True and finished_steps(output_dir) >= total_steps:
        say(f"{output_dir}: this run is finished ({finished_steps(output_dir)} steps); nothing to do")
        return
    if checkpoint is not None:
        say(f"going on from {checkpoint.folder}: step {checkpoint.step} of {int(total_steps)}")
        check_data(checkpoint, data, train.plan.steps_per_epoch, arguments["accept_data_change"], say)
    elif arguments["resume_from_checkpoint"] is True:
        say(f"{output_dir}: no complete checkpoint yet; starting afresh")
    resident = psutil.Process().memory_info().rss
    tuned = model_at_its_beginning(path, arguments, args, ranks, checkpoint)
    attach_feature_cache(tuned, rows, total_steps / train.plan.steps_per_epoch, processing, arguments, ranks, say)
    make = prepare(tuned, processing, train, evaluation, arguments, Task(args, ranks, path))
    if checkpoint is not None:
        load_weights(tuned, checkpoint.folder)
    describe(tuned, train, ledger, args, arguments["share_prefix"])
    rates = {part: arguments[f"{part}_learning_rate"] for part in ("projector", "vision_tower")}
    if arguments["loraplus_lr_ratio"] is not None:
        rates["lora_B"] = args.learning_rate * arguments["loraplus_lr_ratio"]
    about = {"data": data, "micro_batches": train.plan.world_size * train.plan.accumulation, "steps_per_epoch": train.plan.steps_per_epoch}
    saver = Saver(output_dir, ranks.rank, ranks.world_size, about, args.save_total_limit)
    survival = Survival(ranks, watch, signals, saver, checkpoint, arguments["on_save_error"], arguments["on_non_finite"])
    costs = costs.with_reference() if asks_reference(arguments, kind) else costs
    asked = answers_of(arguments, processing, evaluation, reader, args)
    trainer = build_trainer(make, tuned, processing, args, train, evaluation, rates, without_secrets(arguments), survival, int(total_steps), costs, asked)
    if kind == "supervised" and arguments["row_report"] != "off":
        trainer.row_losses = RowLosses(len(rows), rows.fingerprint)
    saver.about["run"] = ranks.on_main(lambda: prepare_output(output_dir, arguments, ledger, checkpoint, lock))
    own = arguments["vision_gradient_checkpointing"]
    if args.activation_checkpointing if own is None else own:
        tuned.packed.checkpoint_tower()
    signals.listen()
    result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.folder))
    watch.at(trainer.state.global_step, "saving")
    last.enter_context(end_of_trackers(trainer.callback_handler.callbacks))
    finish(trainer, int(total_steps), path, output_dir, result.metrics)
    write = tell(trainer, arguments, entries, ledger, output_dir, result.metrics, resident)
    if arguments["push_to_hub"] and ranks.is_main:
        last.callback(publish, output_dir, arguments, say)
    last.callback(write)  # the last one in is the first one out


def model_at_its_beginning(path: str, arguments: Arguments, args: TrainingArguments, ranks: Ranks, checkpoint: Checkpoint | None) -> TunedModel:
    """The model before its first step, also where it goes on from a checkpoint; called on all ranks."""
    tuned = load_tuned_model(path, arguments, args)
    if arguments["lora_init"] is None:
        return tuned
    return pissa.begin(tuned, arguments["lora_init"], args.seed, ranks, args.device, None if checkpoint is None else checkpoint.folder)


def finish(trainer: PackedTrainer, total_steps: int, path: str, output_dir: Path, metrics: dict[str, float]) -> None:
    """Writes the result of a run that has made all of its steps.

    Raises:
        Stopped: it was asked to stop before.
        RunError: the disk refuses.
    """
    trainer.finish_saving()
    step, code = trainer.state.global_step, trainer.stop_code
    if step < total_steps or code is not None:  # an evaluation, or the best checkpoint, may be missing
        assert code is not None
        raise early_end(step, total_steps, trainer.survival.ranks.on_main(lambda: newest_step(output_dir)), code)
    save_result(trainer, path, output_dir, metrics)


def early_end(step: int, total_steps: int, saved: int | None, code: int) -> Stopped | RunError:
    """What a run that was asked to stop ends with: another exit code where its last step could not be saved."""
    again = "the same command with --resume_from_checkpoint true goes on"
    if saved != step:
        return RunError(f"stopped at step {step} of {total_steps}, which could not be saved; {again} from {'the start' if saved is None else f'step {saved}'}")
    return Stopped(f"stopped at step {step} of {total_steps}, which is saved; {again}", code)


def save_result(trainer: PackedTrainer, path: str, output_dir: Path, metrics: dict[str, float]) -> None:
    """Writes the trained model and the records of the end; the state file comes last: with it, the run is finished.

    Raises:
        RunError: the disk refuses.
    """
    try:
        trainer.save_model()
        if trainer.survival.ranks.is_main:
            point_latest(output_dir)
            copy_beside(path, output_dir)
            trainer.save_metrics("train", metrics)
            draw_curves(trainer.state.log_history, output_dir / "training_curves.png")
            write_model_card(output_dir, trainer.result_history, trainer.state.global_step, trainer.processing, path)
            write_whole(output_dir / STATE_FILE, json.dumps(dataclasses.asdict(trainer.state), indent=2, sort_keys=True) + "\n")
            report(trainer, output_dir, metrics)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{output_dir}: the result could not be written: {error}; the checkpoints still stand. Make room and start again with resume_from_checkpoint: true"
        ) from error


def answers_of(arguments: Arguments, processing: Processing, evaluation: PlannedRows | None, reader: RowReader, args: TrainingArguments) -> Answers | None:
    """What `eval_generate` asks for.

    Raises:
        InputError: `metric_for_best_model` names a data set that is not asked about.
    """
    if not arguments["eval_generate"] or evaluation is None:
        return None
    outcomes = questions(evaluation.rows, arguments["dataset"]["eval"], reader, args.seed, arguments["eval_generate_rows"])
    folder = Path(arguments["output_dir"]) / ANSWERS_FOLDER if args.process_index == 0 else None
    answers = Answers(outcomes, processing, args.per_device_eval_batch_size, arguments["eval_generate_max_new_tokens"], folder)
    answers.choose(arguments["metric_for_best_model"] or "")
    return answers


def build_trainer(
    make: Callable[..., PackedTrainer],
    tuned: TunedModel,
    processing: Processing,
    args: TrainingArguments,
    train: PlannedRows,
    evaluation: PlannedRows | None,
    rates: dict[str, float | None],
    record: Arguments,
    survival: Survival,
    total_steps: int,
    costs: StepCosts,
    answers: Answers | None,
) -> PackedTrainer:
    """The trainer with its optimizer; the schedule is tried out, so that all that can be wrong with the arguments is wrong before the first write.

    Raises:
        InputError: a tracker, optimizer or schedule that cannot be had with these arguments.
    """
    try:
        trackers, offloads = guarded_trackers(args, record, answers.examples if answers else []), record["activation_offloading"]
        trainer = make(tuned, processing, args, train, evaluation, rates, trackers, survival, costs, offloads)
        trainer.answers = answers
        trainer.create_optimizer()
        trial = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        settings: Any = args.lr_scheduler_kwargs or {}
        get_scheduler(args.lr_scheduler_type, trial, args.get_warmup_steps(total_steps), total_steps, scheduler_specific_kwargs=settings)
    except (ValueError, ImportError, TypeError, KeyError) as error:
        raise InputError(f"report_to, optim or lr_scheduler_type cannot be had with these arguments: {error}") from error
    return trainer


def prepare_output(output_dir: Path, arguments: Arguments, ledger: Ledger, checkpoint: Checkpoint | None, lock: FolderLock) -> str:
    """Writes the records that stand before the first step; the run's id."""
    output_dir.mkdir(parents=True, exist_ok=True)
    lock.take(output_dir)
    run = begin_branch(output_dir, checkpoint, arguments["overwrite_output_dir"])
    write_json(output_dir / "arguments.json", without_secrets(arguments))
    write_json(output_dir / "environment.json", environment())
    ledger.write(output_dir / "ledger.json")
    return run
