"""What only a GPU can show; skipped without one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from interlace.model.attention import Forest, interface, sdpa_segments
from interlace.model.attention_kernels import BACKENDS, TRIAL, TRIAL_WINDOW, choose, problem
from interlace.training.supervised import finetune
from tests.test_training import losses

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device (and CUDA_VISIBLE_DEVICES to show it)")


@pytest.mark.parametrize("backend", ["varlen", "flex", "sdpa"])
@pytest.mark.parametrize(("heads", "groups", "size"), [(16, 16, 64), (32, 32, 128), (28, 4, 128), (4, 1, 80)])
def test_attention_kernels_equal_the_dense_mask(backend: str, heads: int, groups: int, size: int) -> None:
    """Forward and backward, trunks, children and grandchildren; float32 where the backend takes it."""
    for dtype in (torch.bfloat16, torch.float16, *([] if backend == "varlen" else [torch.float32])):
        assert problem(backend, torch.device("cuda"), dtype, heads, groups, size) is None


@pytest.mark.parametrize("backend", ["varlen", "flex", "sdpa"])
@pytest.mark.parametrize("sees_whole_images", [False, True], ids=["causal", "images both ways"])
def test_attention_kernels_equal_the_dense_mask_of_windows_and_images(backend: str, sees_whole_images: bool) -> None:
    for window in (None, TRIAL_WINDOW):
        found = problem(backend, torch.device("cuda"), torch.bfloat16, 8, 4, 128, window, sees_whole_images)
        assert found == (
            "ValueError: no token can attend to a later one, as those of an image do in this model" if sees_whole_images and backend == "varlen" else None
        )


def test_rotated_queries_in_float32_go_through_every_kernel() -> None:
    """As full tuning under autocast hands them over: queries and keys in float32, values in 16 bits."""
    forest = Forest(TRIAL, torch.device("cuda"))
    q, k, v = (torch.randn(1, 4, TRIAL[-1].end, 64, device="cuda", requires_grad=True) for _ in range(3))
    for name in ("varlen", "flex"):
        out, _ = interface(BACKENDS[name]())(torch.nn.Identity(), q, k, v.bfloat16(), None, segments=forest)
        expected = sdpa_segments(q, k, v, forest, 64**-0.5)
        assert (out.float() - expected).norm() <= 2e-2 * expected.norm()


def test_auto_finds_a_kernel() -> None:
    assert choose("auto", torch.device("cuda"), torch.bfloat16, 16, 16, 64) != "sdpa"


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}], ids=["fp32", "bf16", "fp16"])
def test_training_on_the_gpu_follows_the_cpu(make_arguments: Callable[..., dict[str, Any]], rows_file: Path, precision: dict[str, bool], lora: bool) -> None:
    cpu = make_arguments(rows_file, lora=lora, max_steps=6)
    finetune(cpu)
    gpu = make_arguments(rows_file, lora=lora, max_steps=6, use_cpu=False, output_dir=cpu["output_dir"] + "_gpu", **precision)
    finetune(gpu)
    assert losses(gpu["output_dir"]) == pytest.approx(losses(cpu["output_dir"]), rel=5e-2 if precision else 1e-3)
