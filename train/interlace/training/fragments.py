"""What an optimizer knows, in one form under every engine: which elements of which parameter a rank steps, with what state.

Plain training and DDP keep everything on every rank; ZeRO (arXiv 1910.02054) and FSDP2 give each rank a run of each parameter's elements. A checkpoint made
of such runs goes on with any number of ranks and under any engine.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

WEIGHT = "weight"  # the key of the values that the optimizer steps, in float32 where the model has them in 16 bits
Read = Callable[[str, str, int, int], torch.Tensor]
Scalars = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Fragment:
    """Elements start, start + 1, .. of a flattened tensor, as far as this rank keeps them.

    name: of the parameter, in `TunedModel.packed`. key: `WEIGHT`, or the optimizer's ("exp_avg", ..). values: 1-D, a copy only of what was on a disk.
    shape: of the whole tensor; the parameter's, or its own where an optimizer keeps something else.
    """

    name: str
    key: str
    start: int
    values: torch.Tensor
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Run:
    """A run of a parameter's elements that this rank steps: `length` from `offset` on in `stepped`, the tensor that the optimizer has state for."""

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    stepped: torch.Tensor
    offset: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This run's elements of `stepped`, or of state that is shaped like it; 1-D, a view."""
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return local.detach().view(-1)[self.offset : self.offset + self.length]


def local_fragments(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[list[Fragment], Scalars]:
    """What this rank keeps of the weights that learn and of the optimizer's state; no communication. Every element is some rank's, and no two ranks'.

    Args:
        model: as the Trainer wrapped it (`model_wrapped`): a `PackedModel`, or DDP, FSDP2 or DeepSpeed around one.
        optimizer: the Trainer's; DeepSpeed's engine has its own.

    Returns:
        The fragments, and the optimizer's numbers per parameter: `{name: {"step": 5.0}}`, on all ranks.
    """
    state, fragments, scalars = _inner(model, optimizer).state, [], {}
    kept = torch.clone if _is_deepspeed(model) and _swaps(model.optimizer) else torch.Tensor.detach  # what was on a disk is gone at the next run
    whole = not _is_deepspeed(model) and distributed.is_initialized() and distributed.get_rank() > 0
    for run in _runs(model):
        values = state.get(run.stepped, {})
        scalars[run.name] = {key: float(value) for key, value in values.items() if _is_number(value)}
        if whole and not isinstance(run.stepped, DTensor):
            continue  # rank 0 speaks for all
        if run.length:
            fragments.append(Fragment(run.name, WEIGHT, run.start, kept(run.of(run.stepped)), run.shape))
        for key, value in values.items():
            if _is_number(value) or not isinstance(value, torch.Tensor):
                continue
            if value.shape == run.stepped.shape:
                fragments += [Fragment(run.name, key, run.start, kept(run.of(value)), run.shape)] if run.length else []
            else:  # 8-bit blocks, factored rows: only where every rank keeps whole parameters
                assert run.stepped.shape == run.shape and not isinstance(run.stepped, DTensor), f"{run.name}: {key} is not shaped like the slice"
                fragments.append(Fragment(run.name, key, 0, value.detach().reshape(-1), tuple(value.shape)))
    return fragments, scalars


@torch.no_grad()
def restore_fragments(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    read: Read,
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
    scalars: Mapping[str, Mapping[str, float]],
) -> None:
    """Puts stored state into an engine, whichever engine and however many ranks it came from; all ranks take part. Frozen weights are not touched.

    Args:
        model, optimizer: as for `local_fragments`.
        read: (name, key, start, length) -> 1-D tensor, those elements of the whole flattened tensor.
        shapes: name -> key -> shape of the whole tensor, for all that is stored. Where `WEIGHT` is missing, weights stay as they are.
        scalars: as `local_fragments` returned them.

    Raises:
        ValueError: the optimizer keeps other state than what is stored.
    """
    _create_state(model, optimizer)
    state = _inner(model, optimizer).state
    for run in _runs(model):
        stored, values, numbers = shapes.get(run.name, {}), state.get(run.stepped, {}), scalars.get(run.name, {})
        kept = {key for key, value in values.items() if isinstance(value, torch.Tensor) or _is_number(value)}
        if kept != (set(stored) | set(numbers)) - {WEIGHT}:
            raise ValueError(f"{run.name}: the optimizer keeps {sorted(kept)}, but {sorted({*stored, *numbers} - {WEIGHT})} are stored")
        for key, number in numbers.items():
            values[key] = values[key].fill_(number) if isinstance(values[key], torch.Tensor) else type(values[key])(number)
        for key, shape in stored.items():
            tensor = run.stepped if key == WEIGHT else values[key]
            if tuple(shape) != run.shape:
                tensor.view(-1).copy_(read(run.name, key, 0, tensor.numel()))
            elif run.length:
                run.of(tensor).copy_(read(run.name, key, run.start, run.length))
    _spread_weights(model)


@torch.no_grad()
def set_weights(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Puts exact values, name -> whole tensor, where the engine's float32 copies came from 16 bits."""
    for run in _runs(model):
        if run.name in values and run.length:
            run.of(run.stepped).copy_(values[run.name].reshape(-1)[run.start : run.start + run.length])


@torch.no_grad()
def full_parameters(model: nn.Module, frozen: bool = False) -> Iterator[tuple[str, torch.Tensor | None]]:
    """(name, value) of every parameter that learns, one at a time; all ranks take part, and must go on to the end.

    Args:
        model: as for `local_fragments`.
        frozen: the others, too.

    Returns:
        On rank 0 the whole values: those that the optimizer steps (float32 also where the model has 16 bits), or a frozen parameter's own; else None.
    """
    first = not distributed.is_initialized() or distributed.get_rank() == 0
    done, engine = set(), cast(Any, model)
    for run in _runs(model) if _is_deepspeed(model) else ():
        value = torch.zeros(torch.Size(run.shape).numel(), dtype=run.stepped.dtype, device=engine.device)
        value[run.start : run.start + run.length] = run.of(run.stepped)
        distributed.reduce(value, 0)
        done.add(run.name)
        yield run.name, value.view(run.shape) if first else None
    for name, parameter in _unwrapped(model).named_parameters():
        if name not in done and (parameter.requires_grad or frozen):
            value = gathered(parameter)
            yield name, value if first else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.dim() == 0)


def _is_deepspeed(model: nn.Module) -> bool:
    return type(model).__name__ == "DeepSpeedEngine"  # by name: importing DeepSpeed takes seconds


def _unwrapped(model: nn.Module) -> nn.Module:
    """The `PackedModel`, its parameters as the optimizer knows them: FSDP2 leaves some whole after a forward pass without a backward one."""
    for module in model.modules() if isinstance(model, FSDPModule) else ():
        if isinstance(module, FSDPModule):
            module.reshard()
    return model.module if _is_deepspeed(model) or isinstance(model, DistributedDataParallel) else model  # type: ignore[return-value]


def _inner(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer itself, without what engines wrap around it."""
    if _is_deepspeed(model):
        return model.optimizer.optimizer  # type: ignore[union-attr, return-value]
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def _runs(model: nn.Module) -> Iterator[_Run]:
    """One run, empty or not, of every parameter that learns."""
    names = {parameter: name for name, parameter in _unwrapped(model).named_parameters()}
    if not _is_deepspeed(model):
        for parameter, name in names.items():
            if parameter.requires_grad:
                local, start = (parameter.to_local(), _offset(parameter)) if isinstance(parameter, DTensor) else (parameter, 0)
                yield _Run(name, tuple(parameter.shape), start, local.numel(), parameter, 0)
        return
    zero: Any = model.optimizer
    if model.zero_optimization_stage() == 3:  # type: ignore[operator]
        for number, group in enumerate(zero.fp16_groups):
            with _in_memory(zero, number):
                for parameter in group:
                    _, offset, length = zero.grad_position[zero.get_param_id(parameter)]
                    start = distributed.get_rank() * length  # equal lengths; the last ones are padded
                    length = max(0, min(length, parameter.ds_numel - start))
                    yield _Run(names[parameter], tuple(parameter.ds_shape), start, length, zero.fp32_partitioned_groups_flat[number], offset)
        return
    for stepped, parameters, offsets in zip(
        zero.single_partition_of_fp32_groups, zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets, strict=True
    ):  # the group's parameters one behind the other; each rank steps an equal part of that
        first = distributed.get_rank() * stepped.numel()
        for parameter, offset in zip(parameters, offsets, strict=True):
            start = min(max(first - offset, 0), parameter.numel())
            end = min(max(first + stepped.numel() - offset, start), parameter.numel())
            yield _Run(names[parameter], tuple(parameter.shape), start, end - start, stepped, max(offset - first, 0))


def _swaps(zero: Any) -> bool:
    return bool(vars(zero).get("swap_optimizer"))


@contextmanager
def _in_memory(zero: Any, number: int) -> Iterator[None]:
    """Reads a group of weights and state from the disk, if ZeRO-3 keeps it on one, and writes it back."""
    swapped = _swaps(zero) and zero._swappable_optimizer_subgroup(number)
    if swapped:
        zero._optimizer_states_and_gradient_swap_in(number)
    yield
    if swapped:
        zero._optimizer_states_and_gradient_swap_out(number)


def _offset(parameter: DTensor) -> int:
    """Where this rank's elements begin in the flattened parameter, which FSDP2 slices along its first dimension."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert len(parameter.placements) == 1 and parameter.placements[0].is_shard(0)
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return int(offset[0]) * (parameter.numel() // max(parameter.shape[0], 1))


def _create_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Lets the optimizer make its state tensors, which it does in its first step: one of no gradient at no learning rate, so that no weight moves."""
    zero: Any = model.optimizer if _is_deepspeed(model) else None
    inner = _inner(model, optimizer)
    if inner.state:
        return
    rates = [(group["lr"], group.get("weight_decay", 0.0)) for group in inner.param_groups]
    for group in inner.param_groups:
        group["lr"], group["weight_decay"] = 0.0, 0.0
    if zero is None:
        for parameter in (parameter for group in inner.param_groups for parameter in group["params"]):
            parameter.grad = torch.zeros_like(parameter)
        inner.step()
        inner.zero_grad()
    else:
        flat = zero.fp32_partitioned_groups_flat if hasattr(zero, "fp32_partitioned_groups_flat") else zero.single_partition_of_fp32_groups
        for number, stepped in enumerate(flat):
            with _in_memory(zero, number):
                kept = stepped.grad  # an offloading engine's own buffer
                stepped.grad = torch.zeros_like(stepped) if kept is None else kept.zero_()
                zero._optimizer_step(number)
                stepped.grad = kept
    for group, (rate, decay) in zip(inner.param_groups, rates, strict=True):
        group["lr"], group["weight_decay"] = rate, decay


def _spread_weights(model: nn.Module) -> None:
    """From the values that are stepped to those that the model computes with, on all ranks."""
    if not _is_deepspeed(model):
        return
    zero: Any = model.optimizer
    if model.zero_optimization_stage() < 3:  # type: ignore[operator]
        zero.update_lp_params()
        return
    for number in range(len(zero.fp16_groups)):
        with _in_memory(zero, number):
            zero._reassign_or_swap_out_partitioned_parameters(number)
    if zero.persistent_parameters:  # small ones, which every rank holds whole between steps
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def gathered(parameter: nn.Parameter) -> torch.Tensor:
    """A weight as a whole, from all ranks, which call it together."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
