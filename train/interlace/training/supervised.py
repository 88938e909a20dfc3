"""Supervised fine-tuning, from checked arguments to a folder with the result."""

import dataclasses
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import PretrainedConfig, TrainingArguments, get_scheduler

from interlace.arguments import Arguments, is_main_process, list_value
from interlace.data.dataset import Rows, default_cache_dir, describe_formats, load_rows
from interlace.data.download import UrlPolicy, hosts
from interlace.data.ledger import Ledger
from interlace.data.places import MediaFolder
from interlace.data.reading import RowReader
from interlace.data.sources import read_entries
from interlace.data.written import form_of
from interlace.errors import InputError, RunError, Stopped
from interlace.model.attention_kernels import choose
from interlace.model.costs import StepCosts, step_costs
from interlace.model.liger import use_liger
from interlace.model.loading import (
    Processing,
    check_base,
    copy_beside,
    load_model,
    load_processing,
    quantization,
    resolve_model_path,
    weights_fingerprint,
)
from interlace.model.tuning import TunedModel, tune
from interlace.redaction import without_secrets
from interlace.training.caching import attach_feature_cache, memory_given_back
from interlace.training.checkpoint import STATE_FILE, Checkpoint, Saver, newest_step, point_latest, write_whole
from interlace.training.lock import FolderLock
from interlace.training.model_card import write_model_card
from interlace.training.nodes import check_nodes, meet
from interlace.training.outline import empty_model, new_adapter
from interlace.training.planning import evaluation_plan, tokens_of, training_plan
from interlace.training.publishing import publish
from interlace.training.ranks import Ranks
from interlace.training.restoring import Survival
from interlace.training.resume import accumulation_for, begin_branch, check_data, check_output_dir, check_settings, find_checkpoint, finished_steps
from interlace.training.sharding import deepspeed_settings, settle
from interlace.training.stopping import StopSignals
from interlace.training.tracking import draw_curves, environment, guarded_trackers, print_table, time_budget, write_json
from interlace.training.trainer import PackedTrainer, PlannedRows
from interlace.training.watch import Watch
from interlace.training.weights import load_weights


def finetune(arguments: Arguments) -> None:
    """Trains and saves; see DESIGN's output_dir for what is left behind.

    Raises:
        InputError: something in the arguments or the data is wrong; nothing has been written then.
        RunError: the run cannot go on; its checkpoints stand.
        Stopped: it was asked to stop, and has saved a checkpoint.
    """
    ranks = meet(arguments)
    watch = Watch(ranks, arguments["ddp_timeout"] / 2)
    with StopSignals() as signals, FolderLock() as lock, memory_given_back(), watch.running():
        _finetune(arguments, ranks, watch, signals, lock)


def _finetune(arguments: Arguments, ranks: Ranks, watch: Watch, signals: StopSignals, lock: FolderLock) -> None:
    output_dir, path = Path(arguments["output_dir"]), resolve_model_path(arguments["model_name_or_path"])
    sources = [path, *([arguments["lora_path"]] if arguments["lora_path"] else [])]
    ranks.on_main(lambda: check_output_dir(output_dir, bool(arguments["resume_from_checkpoint"]), arguments["overwrite_output_dir"], sources))
    ranks.on_main(lambda: lock.take(output_dir))
    checkpoint = ranks.on_main(lambda: find_checkpoint(output_dir, arguments, say))
    if checkpoint is not None:
        accumulation = accumulation_for(checkpoint, ranks.world_size, arguments["gradient_accumulation_steps"], say)
        arguments = {**arguments, "gradient_accumulation_steps": accumulation, "eval_on_start": False}
        check_settings(checkpoint, without_secrets(arguments), say)
    args = training_arguments(arguments)
    processing = processing_of(path, arguments)
    reader = row_reader(arguments, processing)
    rows, ledger = load_rows(read_entries(arguments["dataset"]["train"], args.seed), reader, arguments, ranks.is_main)
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
    tuned = load_tuned_model(path, arguments, args)
    if checkpoint is not None:
        load_weights(tuned, checkpoint.folder)
    describe(tuned, train, ledger, args, arguments["share_prefix"])
    rates = {part: arguments[f"{part}_learning_rate"] for part in ("projector", "vision_tower")}
    if arguments["loraplus_lr_ratio"] is not None:
        rates["lora_B"] = args.learning_rate * arguments["loraplus_lr_ratio"]
    about = {"data": data, "micro_batches": train.plan.world_size * train.plan.accumulation, "steps_per_epoch": train.plan.steps_per_epoch}
    attach_feature_cache(tuned, rows, total_steps / train.plan.steps_per_epoch, processing, arguments, ranks, say)
    saver = Saver(output_dir, ranks.rank, ranks.world_size, about, args.save_total_limit)
    survival = Survival(ranks, watch, signals, saver, checkpoint, arguments["on_save_error"], arguments["on_non_finite"])
    trainer = build_trainer(tuned, processing, args, train, evaluation, rates, without_secrets(arguments), survival, int(total_steps), costs)
    saver.about["run"] = ranks.on_main(lambda: prepare_output(output_dir, arguments, ledger, checkpoint, lock))
    own = arguments["vision_gradient_checkpointing"]
    if args.activation_checkpointing if own is None else own:
        tuned.packed.checkpoint_tower()
    signals.listen()
    result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.folder))
    watch.at(trainer.state.global_step, "saving")
    trainer.finish_saving()
    if trainer.state.global_step >= total_steps and trainer.stop_code is None:  # else an evaluation, or the best checkpoint, may be missing
        save_result(trainer, path, output_dir, result.metrics)
        if arguments["push_to_hub"] and ranks.is_main:
            publish(output_dir, arguments, say)
    else:
        assert trainer.stop_code is not None
        raise early_end(trainer.state.global_step, int(total_steps), ranks.on_main(lambda: newest_step(output_dir)), trainer.stop_code)


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
            write_model_card(output_dir, trainer.state.log_history, trainer.state.global_step)
            write_whole(output_dir / STATE_FILE, json.dumps(dataclasses.asdict(trainer.state), indent=2, sort_keys=True) + "\n")
            report(trainer, output_dir, metrics)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{output_dir}: the result could not be written: {error}; the checkpoints still stand. Make room and start again with resume_from_checkpoint: true"
        ) from error


def build_trainer(
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
) -> PackedTrainer:
    """The trainer with its optimizer; the schedule is tried out, so that all that can be wrong with the arguments is wrong before the first write.

    Raises:
        InputError: a tracker, optimizer or schedule that cannot be had with these arguments.
    """
    try:
        trackers, offloads = guarded_trackers(args, record), record["activation_offloading"]
        trainer = PackedTrainer(tuned, processing, args, train, evaluation, rates, trackers, survival, costs, offloads)
        trainer.create_optimizer()
        trial = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        settings: Any = args.lr_scheduler_kwargs or {}
        get_scheduler(args.lr_scheduler_type, trial, args.get_warmup_steps(total_steps), total_steps, scheduler_specific_kwargs=settings)
    except (ValueError, ImportError, TypeError, KeyError) as error:
        raise InputError(f"report_to, optim or lr_scheduler_type cannot be had with these arguments: {error}") from error
    return trainer


def say(text: str) -> None:
    """Prints a line on the main process, above any progress bar."""
    if is_main_process():
        tqdm.write(text)


def training_arguments(arguments: Arguments) -> TrainingArguments:
    """Hugging Face's part of the arguments; falls back to the CPU, and says so, where there is no accelerator.

    Raises:
        InputError: a combination that transformers refuses, or float16 without a GPU.
    """
    names = {item.name for item in dataclasses.fields(TrainingArguments) if item.init}
    values: dict[str, Any] = {name: value for name, value in arguments.items() if name in names and name != "resume_from_checkpoint"}
    if not values["use_cpu"] and not torch.accelerator.is_available():
        values["use_cpu"] = True
        say("no accelerator found: training on the CPU")
    if values["use_cpu"] and values["fp16"]:
        raise InputError("fp16 needs a GPU; on a CPU use bf16 or neither")
    checkpointing = values.pop("activation_checkpointing")  # gradient_checkpointing is the older name of the same
    values["activation_checkpointing"] = values.pop("gradient_checkpointing") if checkpointing is None else checkpointing
    settings = values.pop("gradient_checkpointing_kwargs")
    values["activation_checkpointing_kwargs"] = values["activation_checkpointing_kwargs"] or settings or {"use_reentrant": False}
    values["disable_tqdm"] = bool(values["disable_tqdm"])
    if values["dataloader_num_workers"] == 0:
        values["dataloader_persistent_workers"] = False
    # ours to do: Hugging Face looks for a model of its own, and uploads every checkpoint
    values["use_liger_kernel"] = values["push_to_hub"] = False
    transformers.logging.set_verbosity_error()
    if values["deepspeed"]:
        values["deepspeed"] = deepspeed_settings(values["deepspeed"], values["optim"])
    try:
        args = TrainingArguments(**values)
    except (ValueError, ImportError, TypeError) as error:
        raise InputError(f"the arguments do not go together: {error}") from error
    settle(args)
    if args.n_gpu > 1:
        say(f"{args.n_gpu} GPUs, one process: training on the first; use all with torchrun --nproc_per_node {args.n_gpu} train/supervised_finetune.py ...")
        args._n_gpu = 1  # the Trainer would split packed batches over them
    args.do_train = True
    return args


def processing_of(path: str, arguments: Arguments) -> Processing:
    """Tokenizer, image processor and template of the model, as the arguments want them."""
    names = ["system_prompt", "label_policy", "trust_remote_code", "image_aspect_ratio"]
    names += ["prompt_style", "image_placement", "image_placement_ratio", "newline_after_image"]
    form = form_of([*arguments["dataset"]["train"], *(arguments["dataset"].get("eval") or [])], arguments["prompt_style"])
    return load_processing(path, form=form, **{name: arguments[name] for name in names})


def row_reader(arguments: Arguments, processing: Processing, kind: Literal["supervised", "preference"] = "supervised") -> RowReader:
    """The reader that the arguments describe."""
    urls = UrlPolicy(hosts(arguments["allowed_url_hosts"])) if arguments["allow_urls"] else None
    cache_dir = Path(arguments["cache_dir"]) if arguments["cache_dir"] else default_cache_dir()
    names = ("max_length", "too_long", "max_image_pixels", "num_frames", "video_fps")
    return RowReader(
        template=processing.template,
        image_tokens=processing.row_image_tokens,
        image_settings=processing.image_settings,
        kept=MediaFolder(cache_dir / "media", urls),
        kind=kind,
        **{name: arguments[name] for name in names},
    )


def evaluation_rows(arguments: Arguments, reader: RowReader, config: PretrainedConfig, costs: StepCosts, args: TrainingArguments) -> PlannedRows | None:
    """The rows of `dataset.eval` in order, planned in one epoch; None if there are none."""
    entries = arguments["dataset"].get("eval")
    if not entries:
        return None
    rows, ledger = load_rows(read_entries(entries, args.seed), reader, arguments, args.process_index == 0)
    say(f"evaluation: {ledger.summary()}")
    return PlannedRows(rows, evaluation_plan(rows, config, costs, args))


def load_tuned_model(path: str, arguments: Arguments, args: TrainingArguments) -> TunedModel:
    """The model with what learns set: full or LoRA, quantised or not."""
    compute = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    bits = quantization(arguments["load_in_4bit"], arguments["load_in_8bit"], compute)
    mixed = compute is not torch.float32
    # a fully tuned model is saved whole: what is frozen in it stays as it is stored, never rounded
    dtype: torch.dtype | str = "auto" if mixed and not arguments["lora"] else compute
    if arguments["lora_path"]:
        check_base(arguments["lora_path"], path)
    model = load_model(path, dtype, bits, arguments["trust_remote_code"], arguments["image_aspect_ratio"])
    torch.manual_seed(args.seed)
    parts, include, exclude = (list_value(arguments[name]) for name in ("tunable_parts", "freeze_include", "freeze_exclude"))
    wanted = None if arguments["lora_path"] else new_adapter(arguments)
    rounded = bool(args.deepspeed) and mixed  # by the engine, which keeps the float32 of its slice: whole models in float32 would not fit a host
    trained = None if rounded else torch.float32
    adapter = torch.bfloat16 if arguments["lora_dtype"] == "bfloat16" else None
    tuned = tune(model, parts, wanted, arguments["lora_path"], include, exclude, None if dtype == "auto" else compute, trained, adapter)
    text = model.config.get_text_config()
    heads = text.num_attention_heads, text.num_key_value_heads, getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = choose(arguments["attention"], args.device, compute, *heads)
    tuned.packed.use_attention(attention)
    if args.device.type == "cuda":
        say(f"attention: {attention}")
    if arguments["use_liger_kernel"]:
        if args.device.type != "cuda":
            raise InputError("use_liger_kernel: Triton kernels need a GPU")
        use_liger(tuned.packed, arguments["liger_kernel_config"])
    return dataclasses.replace(tuned, base_fingerprint=weights_fingerprint(path)) if arguments["lora"] and args.process_index == 0 else tuned


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


def prepare_output(output_dir: Path, arguments: Arguments, ledger: Ledger, checkpoint: Checkpoint | None, lock: FolderLock) -> str:
    """Writes the records that stand before the first step; the run's id."""
    output_dir.mkdir(parents=True, exist_ok=True)
    lock.take(output_dir)
    run = begin_branch(output_dir, checkpoint, arguments["overwrite_output_dir"])
    write_json(output_dir / "arguments.json", without_secrets(arguments))
    write_json(output_dir / "environment.json", environment())
    ledger.write(output_dir / "ledger.json")
    return run


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
    figures += time_budget(history)
    speeds = [entry["tokens_per_second"] for entry in history if "tokens_per_second" in entry]
    figures += [("tokens/s (median)", f"{sorted(speeds)[len(speeds) // 2]:,.0f}")] if speeds else []
    print_table("result", figures)
    say(f"\n  model, processor, chat template  {output_dir}")
    say(f"  curves                           {output_dir / 'training_curves.png'}")
    say(f"  every row accounted for          {output_dir / 'ledger.json'}")
    say(f"  talk to it                       python train/predict_multiround.py --model-path {output_dir}")
