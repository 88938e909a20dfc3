"""What saves memory or time without changing what is learned: offloaded activations, adapters in 16 bits, Liger's kernels."""

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from interlace.data.reading import Row
from interlace.errors import InputError
from interlace.model.liger import use_liger
from interlace.training.offloading import OffloadedActivations
from interlace.training.supervised import finetune
from tests.test_equivalence import SETUPS, assert_same_gradients, collate, gradients, rows, score, tuned_model  # noqa: F401 a fixture
from tests.test_training import losses, weights

Make = Callable[..., dict[str, Any]]
CPU = torch.device("cpu")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_offloaded_activations_give_the_same_gradients(tiny_dir: Path, rows: list[Row], setup: str, checkpointing: bool) -> None:  # noqa: F811
    batch, found = collate(tiny_dir, rows), []
    for context in (None, OffloadedActivations(CPU, least_bytes=1)):
        tuned = tuned_model(tiny_dir, **SETUPS[setup])
        if checkpointing:
            tuned.packed.activation_checkpointing_enable()
        if context is None:
            log_probs = score(tuned, batch).log_probs
        else:
            with context:
                log_probs = score(tuned, batch).log_probs
            assert context.num_bytes > batch.num_tokens * 4 * tuned.base.config.text_config.hidden_size
        log_probs.sum().backward()
        found.append(gradients(tuned))
    assert_same_gradients(*found)


def test_weights_and_small_tensors_stay_where_they_are() -> None:
    layer, inputs = nn.Linear(64, 64), torch.randn(8, 64, requires_grad=True)
    for least_bytes, sent in ((1, inputs.nbytes), (inputs.nbytes + 1, 0)):
        context = OffloadedActivations(CPU, least_bytes)
        with context:
            layer(inputs).sum().backward()
        assert context.num_bytes == sent


def test_copies_of_weights_that_autocast_makes_stay_too() -> None:
    layer, inputs = nn.Linear(64, 32), torch.randn(8, 64, requires_grad=True)
    context = OffloadedActivations(CPU, 1, layer.parameters())
    with context, torch.autocast("cpu", dtype=torch.bfloat16):
        layer(inputs).sum().backward()
    assert context.num_bytes == inputs.nbytes // 2  # the inputs in 16 bits


def test_a_run_with_offloaded_activations_has_the_same_losses(make_arguments: Make, rows_file: Path) -> None:
    plain = make_arguments(rows_file, lora=True)
    finetune(plain)
    offloaded = make_arguments(rows_file, lora=True, activation_offloading=True, output_dir=plain["output_dir"] + "_offloaded")
    finetune(offloaded)
    assert losses(offloaded["output_dir"]) == losses(plain["output_dir"])


def test_an_adapter_in_sixteen_bits_learns(make_arguments: Make, rows_file: Path) -> None:
    """The whole parts beside it stay float32."""
    arguments = make_arguments(rows_file, lora=True, lora_dtype="bfloat16", bf16=True, max_steps=12)
    finetune(arguments)
    found = losses(arguments["output_dir"])
    assert found[-1] < 0.8 * found[0]
    for name, tensor in weights(arguments["output_dir"]).items():
        assert tensor.dtype == (torch.bfloat16 if "lora_" in name else torch.float32), name


# --- Liger ---


def fake_liger(monkeypatch: pytest.MonkeyPatch, functions: dict[str, Any]) -> None:
    package, transformers, patch = (types.ModuleType(name) for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch"))
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = functions  # type: ignore[attr-defined]
    for module in (package, transformers, patch):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_kernels_are_asked_for_the_language_model_without_a_head(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def apply(rope: bool = True, cross_entropy: bool = False, fused_linear_cross_entropy: bool = True, rms_norm: bool = True, model: Any = None) -> None:
        calls.append({"rope": rope, "fused_linear_cross_entropy": fused_linear_cross_entropy, "rms_norm": rms_norm, "model": model})

    fake_liger(monkeypatch, {"qwen2": apply, "qwen2_text": apply})
    packed: Any = tuned_model(tiny_dir).packed
    use_liger(packed, {"rope": False})
    assert calls == [{"rope": False, "fused_linear_cross_entropy": False, "rms_norm": True, "model": packed.model.model.language_model}]
    with pytest.raises(InputError, match=r"liger_kernel_config: ropes: unknown; expected some of .*rope"):
        use_liger(packed, {"ropes": False})
    fake_liger(monkeypatch, {"llama": apply})
    with pytest.raises(InputError, match=r"Liger knows no kernels for qwen2.*; known: llama"):
        use_liger(packed, None)


def test_without_the_package_or_a_gpu_it_is_said(tiny_dir: Path, make_arguments: Make, rows_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(InputError, match=r"use_liger_kernel: the package cannot be used: .*pip install liger-kernel"):
        use_liger(tuned_model(tiny_dir).packed, None)
    with pytest.raises(InputError, match="use_liger_kernel: Triton kernels need a GPU"):
        finetune(make_arguments(rows_file, lora=True, use_liger_kernel=True))
