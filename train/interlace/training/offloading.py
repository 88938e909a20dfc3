"""Activations that wait in the host's memory until the backward pass wants them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

LEAST_BYTES = 1 << 20  # smaller ones are not worth the way


class OffloadedActivations(saved_tensors_hooks):
    """Inside this context what autograd saves goes to page-locked memory of the host, but for weights, and comes back when it is needed.

    As `torch.autograd.graph.save_on_cpu`, which would copy every weight as well.

    Args:
        device: what is on another one stays where it is.
        least_bytes: smaller tensors stay.
        weights: under autocast, copies of them in 16 bits are saved: what has the shape of one of these stays, too.
    """

    def __init__(self, device: torch.device, least_bytes: int = LEAST_BYTES, weights: Iterable[torch.Tensor] = ()):
        self.num_bytes = 0  # that were sent away
        shapes = {shape for weight in weights for shape in (tuple(weight.shape), tuple(weight.shape[::-1]))}

        def pack(tensor: torch.Tensor) -> Any:
            is_weight = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter) or tuple(tensor.shape) in shapes
            if is_weight or tensor.device.type != device.type or tensor.nbytes < least_bytes:
                return tensor
            self.num_bytes += tensor.nbytes
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=device.type == "cuda")
            kept.copy_(tensor, non_blocking=True)
            return tensor.device, kept

        def unpack(saved: Any) -> torch.Tensor:
            if isinstance(saved, torch.Tensor):
                return saved
            where, kept = saved
            returned: torch.Tensor = kept.to(where, non_blocking=True)
            return returned

        super().__init__(pack, unpack)
