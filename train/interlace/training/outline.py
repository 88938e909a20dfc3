"""The run's model without its weights: shapes, types and what learns, for whatever can be told before anything is loaded."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, PretrainedConfig
from transformers.initialization import no_init_weights

from interlace.arguments import list_value
from interlace.data.reading import Kind
from interlace.errors import InputError
from interlace.model.adapters import read_adapter_config
from interlace.model.tuning import Lora, TunedModel, tune


def compute_dtype(arguments: Mapping[str, Any]) -> torch.dtype:
    """The type of the run's matrix products."""
    return torch.bfloat16 if arguments["bf16"] else torch.float16 if arguments["fp16"] else torch.float32


def new_adapter(arguments: Mapping[str, Any]) -> Lora | None:
    """The settings of the adapter to train; None for full tuning."""
    if not arguments["lora"]:
        return None
    targets = arguments["lora_target_modules"]
    rank, alpha, dropout = (arguments[name] for name in ("lora_rank", "lora_alpha", "lora_dropout"))
    return Lora(rank, alpha, dropout, None if targets is None else list_value(targets), arguments["use_dora"], arguments["use_rslora"])


def asks_reference(arguments: Mapping[str, Any], kind: Kind) -> bool:
    """Whether every step asks a reference model, too."""
    return kind == "preference" and not arguments["precompute_ref_log_probs"]


def checkpoints(arguments: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether the language model recomputes its activations, and the vision tower."""
    newer, own = arguments["activation_checkpointing"], arguments["vision_gradient_checkpointing"]
    language = bool(arguments["gradient_checkpointing"] if newer is None else newer)
    return language, language if own is None else bool(own)


def empty_model(config: PretrainedConfig, arguments: Mapping[str, Any]) -> TunedModel:
    """The run's model with what learns set, on the meta device: shapes and types without memory; quantised layers as if they were not.

    Raises:
        InputError: what is to learn does not fit the model.
    """
    with torch.device("meta"), no_init_weights():
        model = AutoModelForImageTextToText.from_config(config, dtype=getattr(config, "dtype", None) or torch.float32)
        model.tie_weights()
        parts, include, exclude = (list_value(arguments[name]) for name in ("tunable_parts", "freeze_include", "freeze_exclude"))
        keeps_types = not arguments["lora"] and compute_dtype(arguments) is not torch.float32
        frozen, adapter = None if keeps_types else compute_dtype(arguments), torch.bfloat16 if arguments["lora_dtype"] == "bfloat16" else None
        tuned = tune(model, parts, _adapter(arguments), None, include, exclude, frozen, adapter_dtype=adapter)
    tuned.packed.family = replace(tuned.packed.family, tiling=None)  # cut or not, tiles are what the tower and the projector see
    language, vision = checkpoints(arguments)
    if language:
        tuned.packed.activation_checkpointing_enable()
    if vision:
        tuned.packed.checkpoint_tower()
    return tuned


def _adapter(arguments: Mapping[str, Any]) -> Lora | None:
    """The adapter's settings: from the keys, or from the adapter that is continued."""
    if not (arguments["lora"] and arguments["lora_path"]):
        return new_adapter(arguments)
    if not (Path(arguments["lora_path"]) / "adapter_config.json").is_file():
        raise InputError(f"lora_path: {arguments['lora_path']}: no adapter_config.json in this folder")
    saved: Any = read_adapter_config(arguments["lora_path"])
    if not isinstance(saved, LoraConfig):
        raise InputError(f"lora_path: {arguments['lora_path']} is an adapter of kind {saved.peft_type.value}; expected LoRA")
    targets = [saved.target_modules] if isinstance(saved.target_modules, str) else sorted(saved.target_modules or ())
    return Lora(saved.r, saved.lora_alpha, saved.lora_dropout, targets, saved.use_dora, saved.use_rslora)
