"""The optimizer's state in one form under every engine: flat runs of a parameter's elements, each owned by one rank."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn


@dataclass(frozen=True)
class Fragment:
    name: str
    key: str
    start: int
    values: torch.Tensor


Read = Callable[[str, str, int, int], torch.Tensor]


def _names(model: nn.Module) -> dict[nn.Parameter, str]:
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    return {parameter: name for name, parameter in inner.named_parameters() if parameter.requires_grad}


def local_fragments(model: nn.Module, optimizer: Any) -> tuple[list[Fragment], dict[str, dict[str, float]]]:
    optimizer = getattr(optimizer, "optimizer", optimizer)
    fragments, scalars = [], {}
    for parameter, name in _names(model).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if torch.is_tensor(value) and value.ndim:
                fragments.append(Fragment(name, key, 0, value.detach().flatten()))
            else:
                scalars.setdefault(name, {})[key] = float(value)
    if distributed.is_initialized() and distributed.get_rank():
        fragments = []
    return fragments, scalars


def restore_fragments(model: nn.Module, optimizer: Any, read: Read, keys: Mapping[str, list[str]], scalars: Mapping[str, Mapping[str, float]]) -> None:
    optimizer = getattr(optimizer, "optimizer", optimizer)
    for parameter, name in _names(model).items():
        state: dict[str, Any] = {key: read(name, key, 0, parameter.numel()).view_as(parameter).clone().to(parameter.device) for key in keys.get(name, [])}
        state |= {key: torch.tensor(value) for key, value in scalars.get(name, {}).items()}
        optimizer.state[parameter] = state


def full_parameters(model: nn.Module, frozen: bool = False) -> Iterator[tuple[str, torch.Tensor | None]]:
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    for name, parameter in inner.named_parameters():
        if parameter.requires_grad or frozen:
            yield name, parameter.detach()
