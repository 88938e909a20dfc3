"""PiSSA (arXiv 2404.02948): an adapter that begins with the principal part of the weights it changes, W = R + s B A, while the base keeps the rest, R.

What is saved is a plain LoRA adapter for the untouched base: R + s B A = W + s (B A - B0 A0), the trained matrices beside the first ones, at twice the rank.
PEFT's own conversion (`LoraModel.subtract_mutated_init`) leaves out whole modules and DoRA's magnitudes.
"""

import dataclasses
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from tqdm import tqdm

from interlace.errors import InputError
from interlace.model.adapters import ADAPTER_FILE
from interlace.model.tuning import TunedModel
from interlace.ranks import Ranks

Weights = dict[str, torch.Tensor]


def begin(tuned: TunedModel, init: str, seed: int, ranks: Ranks, device: torch.device, checkpoint: Path | None = None) -> TunedModel:
    """Moves the principal part of every adapted weight into its adapter; to be called on all ranks, before an engine wraps the model.

    Args:
        init: `pissa`, or `pissa_niter_N` for a fast decomposition in N iterations; both are PEFT's.
        device: where to decompose; the model stays where it is.
        checkpoint: a folder that `save_weights` has written in this run: it holds the parts that the run began with, so that nothing is decomposed again.

    Returns:
        The model, with `first` set.

    Raises:
        InputError: the rank is larger than a weight's, or the checkpoint holds another kind of adapter.
    """
    if checkpoint is None:
        first = _principal_parts(tuned, init, seed, ranks, device)
    else:
        _, first = separated(load_file(checkpoint / ADAPTER_FILE), tuned, checkpoint)
    with torch.no_grad():
        for name, layer in _layers(tuned).items():
            part_a, part_b = (first[f"{name}.{matrix}.default.weight"] for matrix in ("lora_A", "lora_B"))
            layer.lora_A["default"].weight.data = part_a.clone()
            layer.lora_B["default"].weight.data = part_b.clone()
            weight = _weight(layer)
            weight.data = (weight.float() - layer.scaling["default"] * part_b @ part_a).to(weight.dtype)
    return dataclasses.replace(tuned, first=first)


def _layers(tuned: TunedModel) -> dict[str, LoraLayer]:
    return {name: module for name, module in tuned.base.named_modules() if isinstance(module, LoraLayer)}


def _weight(layer: LoraLayer) -> torch.Tensor:
    weight: torch.Tensor = layer.get_base_layer().weight  # type: ignore[assignment]
    return weight


def _principal_parts(tuned: TunedModel, init: str, seed: int, ranks: Ranks, device: torch.device) -> Weights:
    """The first A and B of each layer, by names in `tuned.base`. The ranks share the work, so that all have the same to the last bit."""
    layers = _layers(tuned)
    first: Weights = {}
    for name, layer in layers.items():
        most = min(_weight(layer).shape)
        if layer.r["default"] > most:
            raise InputError(
                f"lora_rank: {layer.r['default']} with lora_init: {name} has no more than {most} singular values; lower lora_rank, or leave it out"
            )
    names = list(layers)
    for start in tqdm(range(0, len(names), ranks.world_size), f"{init}: principal parts", leave=False, disable=not ranks.is_main):
        some = names[start : start + ranks.world_size]
        own = _decompose(layers[some[ranks.rank]], init, seed, device) if ranks.rank < len(some) else None
        for name, parts in zip(some, ranks.gather(own), strict=False):
            first |= {f"{name}.{matrix}.default.weight": part for matrix, part in zip(("lora_A", "lora_B"), parts, strict=True)}
    return first


def _decompose(layer: LoraLayer, init: str, seed: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """The first A and B of a layer, on the CPU; its weight is as before."""
    weight, adapter = _weight(layer), cast(Any, layer)
    kept = weight.data
    weight.data = kept.to(device)
    torch.manual_seed(seed)  # for each layer, so that what a layer begins with does not rest on the number of ranks
    adapter.pissa_init("default", init)
    weight.data = kept
    return tuple(matrix["default"].weight.detach().cpu() for matrix in (adapter.lora_A, adapter.lora_B))


def beside_first(weights: Weights, first: Weights) -> Weights:
    """An adapter's weights as those of a plain LoRA adapter on the untouched base: [A; A0] and [B, -B0].

    Args:
        weights, first: by the same names; what is not in `first` stays.
    """
    return {
        name: torch.cat([tensor, first[name]] if ".lora_A." in name else [tensor, -first[name]], dim=0 if ".lora_A." in name else 1)
        if name in first
        else tensor
        for name, tensor in weights.items()
    }


def double_rank(folder: Path) -> None:
    """Lets the adapter_config.json of a folder speak of `beside_first`: twice the rank, at the same scale."""
    config = LoraConfig.from_pretrained(str(folder))
    config.r *= 2
    config.lora_alpha *= 2**0.5 if config.use_rslora else 2  # alpha / sqrt(rank), or alpha / rank
    config.save_pretrained(str(folder))


def separated(state: Weights, tuned: TunedModel, folder: Path) -> tuple[Weights, Weights]:
    """What `beside_first` has joined: the file's weights with the trained matrices alone, and the first ones by names in `tuned.base`.

    Args:
        state: of the adapter's file in `folder`.

    Raises:
        InputError: it is no such adapter, or one of another rank.
    """
    trained, first = dict(state), {}
    for name, layer in _layers(tuned).items():
        for matrix, dim in (("lora_A", 0), ("lora_B", 1)):
            key, rank = f"base_model.model.{name}.{matrix}.weight", layer.r["default"]
            if key not in state or state[key].shape[dim] != 2 * rank:
                raise InputError(f"{folder}: its adapter did not begin as lora_init says at lora_rank {rank}: {name} is not there at twice that rank")
            trained[key], other = (half.contiguous() for half in state[key].split(rank, dim))
            first[f"{name}.{matrix}.default.weight"] = -other if matrix == "lora_B" else other
    return trained, first
