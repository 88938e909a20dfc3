"""What only a GPU can show; skipped without one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from interlace.model.attention_kernels import choose, problem
from interlace.training.supervised import finetune
from tests.test_training import losses

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device (and CUDA_VISIBLE_DEVICES to show it)")


@pytest.mark.parametrize("backend", ["varlen", "flex", "sdpa"])
@pytest.mark.parametrize(("heads", "groups", "size"), [(16, 16, 64), (32, 32, 128), (28, 4, 128), (4, 1, 80)])
def test_attention_kernels_equal_the_dense_mask(backend: str, heads: int, groups: int, size: int) -> None:
    """Forward and backward, trunks, children and grandchildren; float32 where the backend takes it."""
    for dtype in (torch.bfloat16, torch.float16, *([] if backend == "varlen" else [torch.float32])):
        assert problem(backend, torch.device("cuda"), dtype, heads, groups, size) is None


def test_auto_finds_a_kernel() -> None:
    assert choose("auto", torch.device("cuda"), torch.bfloat16, 16, 16, 64) != "sdpa"


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}], ids=["fp32", "bf16", "fp16"])
def test_training_on_the_gpu_follows_the_cpu(make_arguments: Callable[..., dict[str, Any]], rows_file: Path, precision: dict[str, bool]) -> None:
    cpu = make_arguments(rows_file, lora=True, max_steps=6)
    finetune(cpu)
    gpu = make_arguments(rows_file, lora=True, max_steps=6, use_cpu=False, output_dir=cpu["output_dir"] + "_gpu", **precision)
    finetune(gpu)
    assert losses(gpu["output_dir"]) == pytest.approx(losses(cpu["output_dir"]), rel=5e-2 if precision else 1e-3)
