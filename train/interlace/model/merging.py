"""An adapter and its base become one model."""

from pathlib import Path

import torch
from peft import PeftModel

from interlace.model.loading import base_of, check_base, load_config, load_model, load_processing, resolve_model_path
from interlace.model.saving import copy_beside, save_model, save_processing


def merge(adapter_path: str, output_dir: Path, dtype: str | None = None) -> None:
    """Writes base + adapter as a complete model with its processor.

    Merged in float32; written in `dtype`, by default the one the base model is stored in.

    Raises:
        InputError: base or adapter cannot be loaded.
    """
    adapter_path = resolve_model_path(adapter_path)
    base = base_of(adapter_path)
    check_base(adapter_path)
    model = PeftModel.from_pretrained(load_model(adapter_path, torch.float32), adapter_path).merge_and_unload()
    stored = load_config(base).dtype or torch.float32
    output_dir.mkdir(parents=True, exist_ok=True)
    save_model(model.to(getattr(torch, dtype) if dtype else stored), output_dir)
    save_processing(load_processing(adapter_path), output_dir)
    copy_beside(base, output_dir)
