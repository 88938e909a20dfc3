"""A training step on tensors without memory: the bytes that it would ask the allocator for, counted rather than guessed.

The model is built on the meta device and its forward and backward pass run under torch's `FakeTensorMode`: every operation of the real step takes place, with
shapes and types alone, in seconds whatever the size of the model. On a GPU the same tensors live and die; kernels may save a little more or less.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from interlace.data.batch import PackedBatch, Segment
from interlace.model.forward import model_inputs
from interlace.model.losses import supervised_loss
from interlace.model.tuning import TunedModel

KINDS = ("activations", "logits", "gradients")


@dataclass(frozen=True)
class Rehearsal:
    """Living bytes beside weights and optimizer after each operation of one forward and backward pass, (operations, kinds) in the order of `KINDS`."""

    living: np.ndarray

    def peak(self, gradient_share: float = 1.0, gradients_kept: int = 0) -> dict[str, int]:
        """Bytes of each kind at the moment when most are in use.

        Args:
            gradient_share: the part of the gradients that stays on this device (ZeRO 2 and 3: 1 / world size).
            gradients_kept: bytes of gradients that are there from the start, those of the earlier micro-batches of the step.
        """
        living = self.living.astype(np.float64)
        living[:, 2] = np.maximum(living[:, 2], gradients_kept) * gradient_share
        most = living[living.sum(1).argmax()]
        return {kind: int(value) for kind, value in zip(KINDS, most, strict=True)}


class _Allocations(TorchDispatchMode):
    """Follows the living bytes of each kind: a tensor that a parameter takes as its gradient is one, what ends in the vocabulary is logits.

    Args:
        weights: tensors that are not counted.
        vocabulary: number of logits of a row.
    """

    def __init__(self, weights: Iterable[torch.Tensor], vocabulary: int):
        super().__init__()
        self.vocabulary = vocabulary
        self.kinds: dict[int, tuple[str | None, int]] = {}  # storage -> its kind and bytes
        self.living = dict.fromkeys(KINDS, 0)
        self.history: list[tuple[int, ...]] = []
        for weight in weights:
            self._follow(weight, None)

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                is_logits = tensor.ndim == 2 and tensor.shape[1] == self.vocabulary
                self._follow(tensor, "logits" if is_logits else "activations")
        self.history.append(tuple(self.living.values()))
        return result

    def _follow(self, tensor: torch.Tensor, kind: str | None) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.kinds:
            self.kinds[storage._cdata] = (kind, storage.nbytes())
            if kind is not None:
                self.living[kind] += storage.nbytes()
            weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, storage: int) -> None:
        kind, size = self.kinds.pop(storage)
        if kind is not None:
            self.living[kind] -= size

    def mark_gradient(self, parameter: torch.Tensor) -> None:
        """Counts a parameter's gradient as such from now on."""
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        kind, size = self.kinds[storage._cdata]
        if kind is not None and kind != "gradients":
            self.living[kind] -= size
            self.living["gradients"] += size
            self.kinds[storage._cdata] = ("gradients", size)


def rehearse(tuned: TunedModel, segments: Sequence[Segment], num_images: int, num_rows: int, compute_dtype: torch.dtype) -> Rehearsal:
    """Counts the bytes of one forward and backward pass over a micro-batch.

    Args:
        tuned: a model on the meta device; its parameters and buffers are replaced.
        segments: of the micro-batch.
        num_images, num_rows: tiles of its distinct images, and supervised tokens.
        compute_dtype: autocast to this type, unless it is float32.
    """
    roots = [tuned.packed, *([] if tuned.tower is None else [tuned.tower.module])]
    with FakeTensorMode():
        _make_fake(roots)
        weights = [tensor for root in roots for tensor in (*root.parameters(), *root.buffers())]
        allocations = _Allocations(weights, tuned.base.config.get_text_config().vocab_size)
        for parameter in tuned.packed.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(allocations.mark_gradient)
        with allocations:
            batch = _batch(tuned, segments, num_images, num_rows)
            with torch.autocast("cpu", dtype=compute_dtype, enabled=compute_dtype is not torch.float32):
                scores = tuned.packed(**model_inputs(batch, tuned.tower))
            loss = supervised_loss(scores.log_probs, batch.weights, 1.0)
            del scores
            loss.backward()
    return Rehearsal(np.asarray([*allocations.history, tuple(allocations.living.values())]))


def _make_fake(roots: Sequence[nn.Module]) -> None:
    """Replaces parameters and buffers by ones without memory that pass for CPU tensors; what is tied stays tied."""
    fakes: dict[nn.Parameter, nn.Parameter] = {}
    for module in (module for root in roots for module in root.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in fakes:
                fakes[parameter] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=parameter.requires_grad)
            module.register_parameter(name, fakes[parameter])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _batch(tuned: TunedModel, segments: Sequence[Segment], num_images: int, num_rows: int) -> PackedBatch:
    """A micro-batch of this shape; what stands in it does not matter."""
    config, family, tokens = tuned.base.config, tuned.packed.family, segments[-1].end
    columns = math.isqrt(num_images)
    rows = torch.zeros(num_rows, dtype=torch.long)
    return PackedBatch(
        input_ids=torch.zeros(1, tokens, dtype=torch.long),
        position_ids=torch.zeros(1, tokens, dtype=torch.long),
        segments=tuple(segments),
        rows=rows,
        row_index=rows,
        targets=rows,
        weights=torch.zeros(num_rows),
        sequence_index=rows,
        row_numbers=tuple(range(len(segments))),
        pixel_values=torch.zeros(num_images, *family.tile_shape(config)) if num_images else None,
        image_index=torch.zeros(num_images, dtype=torch.long),
        image_positions=torch.zeros(num_images * family.tokens_per_tile(config), dtype=torch.long),
        # one picture of all tiles, about as wide as high, for a tower that sees whole images
        image_grids=tuple(grid for grid in ((num_images // columns, columns), (1, num_images % columns)) if all(grid)) if num_images else (),
    )
