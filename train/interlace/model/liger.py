"""Liger's Triton kernels for norms, rotary positions and gated MLPs of the language model, on GPUs; the head and the loss are our own."""

import inspect
from typing import Any

from interlace.errors import InputError
from interlace.model.forward import PackedModel


def use_liger(packed: PackedModel, settings: dict[str, Any] | None) -> None:
    """Puts the kernels in the place of the language model's modules.

    Args:
        settings: keywords of Liger's function for the model's type (`rope`, `rms_norm`, `swiglu`); None for all.

    Raises:
        InputError: the package is missing, or has nothing for this model.
    """
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN  # type: ignore[import-not-found]
    except ImportError as error:
        raise InputError(f"use_liger_kernel: the package cannot be used: {error}; pip install liger-kernel") from error
    model = getattr(packed.model.model, packed.family.language_model)
    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise InputError(f"use_liger_kernel: Liger knows no kernels for {kind}; known: {', '.join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))}")
    function = MODEL_TYPE_TO_APPLY_LIGER_FN[kind]
    known = inspect.signature(function).parameters
    unknown = sorted(set(settings or {}) - set(known))
    if unknown:
        raise InputError(f"liger_kernel_config: {', '.join(unknown)}: unknown; expected some of {', '.join(sorted(set(known) - {'model'}))}")
    without = {name: False for name in ("cross_entropy", "fused_linear_cross_entropy") if name in known}
    function(**(settings or {}) | without, model=model)
