"""What a run is made of, by its arguments: Hugging Face's arguments, processing, reader, evaluation rows, the model with what learns."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, TrainingArguments

from interlace.arguments import Arguments, list_value
from interlace.data.dataset import Rows, default_cache_dir, load_rows
from interlace.data.download import UrlPolicy, hosts
from interlace.data.ledger import Ledger
from interlace.data.places import MediaFolder
from interlace.data.reading import Kind, RowReader
from interlace.data.sources import Source, read_entries
from interlace.data.written import form_of
from interlace.errors import InputError
from interlace.model.attention_kernels import choose
from interlace.model.costs import StepCosts
from interlace.model.liger import use_liger
from interlace.model.loading import (
    Processing,
    check_base,
    load_model,
    load_processing,
    quantization,
    weights_fingerprint,
)
from interlace.model.tuning import TunedModel, tune
from interlace.training.outline import new_adapter
from interlace.training.planned import PlannedRows
from interlace.training.planning import evaluation_plan
from interlace.training.sharding import deepspeed_settings, settle
from interlace.training.tracking import say


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
        say(f"{args.n_gpu} GPUs, one process: training on the first; use all with torchrun --nproc_per_node {args.n_gpu} {sys.argv[0]} ...")
        args._n_gpu = 1  # the Trainer would split packed batches over them
    args.do_train = True
    return args


def processing_of(path: str, arguments: Arguments) -> Processing:
    """Tokenizer, image processor and template of the model, as the arguments want them; says what is to be known about their files."""
    names = ["system_prompt", "label_policy", "trust_remote_code", "image_aspect_ratio", "min_pixels", "max_pixels"]
    names += ["prompt_style", "image_placement", "image_placement_ratio", "newline_after_image"]
    form = form_of([*arguments["dataset"]["train"], *(arguments["dataset"].get("eval") or [])], arguments["prompt_style"])
    processing = load_processing(path, form=form, **{name: arguments[name] for name in names})
    for note in processing.notes:
        say(note)
    return processing


def row_reader(arguments: Arguments, processing: Processing, kind: Kind = "supervised") -> RowReader:
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
        video_tokens=processing.video_tokens,
        **{name: arguments[name] for name in names},
    )


def checked_rows(sources: Sequence[Source], reader: RowReader, arguments: Arguments, is_main: bool) -> tuple[Rows, Ledger]:
    """See `load_rows`; the main process says when many rows are too long, before the minutes that a model takes to load."""
    rows, ledger = load_rows(sources, reader, arguments, is_main)
    if warning := ledger.too_long_warning(arguments["max_length"]):
        say(warning)
    return rows, ledger


def evaluation_rows(arguments: Arguments, reader: RowReader, config: PretrainedConfig, costs: StepCosts, args: TrainingArguments) -> PlannedRows | None:
    """The rows of `dataset.eval` in order, planned in one epoch; None if there are none."""
    entries = arguments["dataset"].get("eval")
    if not entries:
        return None
    rows, ledger = checked_rows(read_entries(entries, args.seed), reader, arguments, args.process_index == 0)
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
    window = tuned.packed.window
    is_cut = window is not None and window < arguments["max_length"]
    attention = choose(arguments["attention"], args.device, compute, *heads, is_cut, tuned.packed.family.sees_whole_images)
    tuned.packed.use_attention(attention)
    if args.device.type == "cuda":
        say(f"attention: {attention}")
    if arguments["use_liger_kernel"]:
        if args.device.type != "cuda":
            raise InputError("use_liger_kernel: Triton kernels need a GPU")
        use_liger(tuned.packed, arguments["liger_kernel_config"])
    return dataclasses.replace(tuned, base_fingerprint=weights_fingerprint(path)) if arguments["lora"] and args.process_index == 0 else tuned
