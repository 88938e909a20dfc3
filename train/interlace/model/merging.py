"""An adapter and its base become one model."""

from pathlib import Path
from typing import Any

import torch

from interlace.files import whole_or_not_at_all
from interlace.model.adapters import load_adapter
from interlace.model.loading import base_of, check_base, load_config, load_model, load_processing, resolve_model_path
from interlace.model.saving import copy_beside, save_model, save_processing


def merge(adapter_path: str, output_dir: Path, dtype: str | None = None) -> tuple[str, ...]:
    """Writes base + adapter as a complete model with its processor, or nothing; returns what its user should know about it.

    Merged in float32; written in `dtype`, by default the one the base model is stored in.

    Raises:
        InputError: base or adapter cannot be loaded.
    """
    adapter_path = resolve_model_path(adapter_path)
    base = base_of(adapter_path)
    check_base(adapter_path)
    processing = load_processing(adapter_path)  # before the weights: what is missing is told at once
    adapted: Any = load_adapter(load_model(adapter_path, torch.float32), adapter_path)
    kept = getattr(torch, dtype) if dtype else load_config(base).dtype or torch.float32
    model = adapted.merge_and_unload().to(kept)
    for config in (model.config, *(getattr(model.config, name) for name in model.config.sub_configs)):
        config.dtype = kept  # what others load it in when they are told nothing
    with whole_or_not_at_all(output_dir) as scratch:
        save_model(model, scratch)
        save_processing(processing, scratch)
        copy_beside(base, scratch)
    return processing.notes
