"""What only a GPU can show; skipped without one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from interlace.data.batch import Segment
from interlace.model.attention import sdpa_segments
from interlace.training.supervised import finetune
from tests.test_training import losses

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device (and CUDA_VISIBLE_DEVICES to show it)")


def test_segment_attention_on_the_gpu_equals_the_cpu() -> None:
    segments = [Segment(0, 6), Segment(6, 9, 0), Segment(9, 14, 0), Segment(14, 20)]
    q, k, v = (torch.randn(1, heads, 20, 16) for heads in (4, 2, 2))
    expected, _ = sdpa_segments(torch.nn.Identity(), q, k, v, None, segments=segments)
    found, _ = sdpa_segments(torch.nn.Identity(), q.cuda(), k.cuda(), v.cuda(), None, segments=segments)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}], ids=["fp32", "bf16", "fp16"])
def test_training_on_the_gpu_follows_the_cpu(make_arguments: Callable[..., dict[str, Any]], rows_file: Path, precision: dict[str, bool]) -> None:
    cpu = make_arguments(rows_file, lora=True, max_steps=6)
    finetune(cpu)
    gpu = make_arguments(rows_file, lora=True, max_steps=6, use_cpu=False, output_dir=cpu["output_dir"] + "_gpu", **precision)
    finetune(gpu)
    assert losses(gpu["output_dir"]) == pytest.approx(losses(cpu["output_dir"]), rel=5e-2 if precision else 1e-3)
