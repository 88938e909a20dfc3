"""Adapters as they lie in folders, ours and those of other tools."""

import pickle
import textwrap
import warnings
from pathlib import Path

from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel

from interlace.errors import InputError
from interlace.model.weight_files import safetensors_of

ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
PROCESSOR_FILE = "processor_config.json"
PROCESSING_FILES = {  # any of which says that it is there
    "tokenizer": ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json"),
    "image processor": ("preprocessor_config.json", PROCESSOR_FILE),
}


def read_adapter_config(path: str) -> PeftConfig:
    """The settings of an adapter's folder.

    Raises:
        InputError: the file is missing or broken, or of a kind of adapter that PEFT does not know, or that changes no weights.
    """
    try:
        config = PeftConfig.from_pretrained(path)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: {ADAPTER_CONFIG} cannot be read: {error}; expected what PEFT writes") from error
    if config.is_prompt_learning:
        raise InputError(f"{path}: an adapter of kind {config.peft_type.value} puts tokens before every prompt; expected LoRA, or another that changes weights")
    return config


def load_adapter(model: PreTrainedModel, path: str, is_trainable: bool = False) -> PeftModel:
    """A model with the adapter of a folder on it, whoever made that.

    Raises:
        InputError: the adapter cannot be read, or does not fit: PEFT alone would only warn where weights are missing, and leave out those it has no place for.
    """
    file = Path(path) / ADAPTER_FILE
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "(?s).*Found missing adapter keys", UserWarning)
            peft = PeftModel.from_pretrained(model, path, is_trainable=is_trainable)
        stored = sum(".lora_" in name for name in safetensors_of(file)) if file.is_file() else 0
        used = sum(".lora_" in name for name, _ in peft.named_parameters())
        if stored > used:
            raise ValueError(f"it holds {stored} matrices, and the model has a place for {used}")
    except (ValueError, TypeError, KeyError, RuntimeError, OSError, SafetensorError, pickle.UnpicklingError, UserWarning) as error:
        reason = textwrap.shorten(str(error), 400, placeholder=" ..")
        raise InputError(f"{path}: this adapter does not fit {model.name_or_path}: {reason}; expected the model that it was trained on") from error
    return peft


def own_processing(path: str) -> list[str]:
    """Which of `PROCESSING_FILES` an adapter's folder holds: PEFT alone writes neither, TRL what it was given."""
    return [part for part, files in PROCESSING_FILES.items() if any((Path(path) / file).is_file() for file in files)]
