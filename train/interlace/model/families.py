"""The little that differs per model family, as a table keyed by `config.model_type`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from interlace.errors import InputError


@dataclass(frozen=True)
class Family:
    """Where a family keeps its parts, and how it selects vision features.

    vision_tower, projector, language_model: module names inside `PreTrainedModel.model`.
    features: (config, tower, pixel_values (K, C, H, W)) -> (K, tokens, vision width), before the projector.
    tokens_per_image: config -> number of tokens of an image.
    """

    vision_tower: str
    projector: str
    language_model: str
    features: Callable[[PretrainedConfig, nn.Module, torch.Tensor], torch.Tensor]
    tokens_per_image: Callable[[PretrainedConfig], int]


def llava_features(config: PretrainedConfig, tower: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """The hidden state(s) that `vision_feature_layer` names, without the class token under strategy "default"."""
    hidden = tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
    layers = config.vision_feature_layer
    chosen = [hidden[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
    if config.vision_feature_select_strategy == "default":
        chosen = [state[:, 1:] for state in chosen]
    return torch.cat(chosen, dim=-1)


def llava_tokens(config: PretrainedConfig) -> int:
    """Patches of a square image; CLIP's class token counts under strategy "full"."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    return patches + int(config.vision_feature_select_strategy == "full" and vision.model_type == "clip_vision_model")


FAMILIES = {"llava": Family("vision_tower", "multi_modal_projector", "language_model", llava_features, llava_tokens)}


def family_of(config: PretrainedConfig) -> Family:
    """The family of a model.

    Raises:
        InputError: `model_type` is not in the table.
    """
    if config.model_type not in FAMILIES:
        raise InputError(f"model_type {config.model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[config.model_type]


def unused_vision_parameters(config: PretrainedConfig, tower: nn.Module) -> list[str]:
    """Names of tower parameters behind the selected layer: they never get a gradient, so they must not train."""
    layers = config.vision_feature_layer
    count = config.vision_config.num_hidden_layers
    last = max(layer if layer >= 0 else count + 1 + layer for layer in ([layers] if isinstance(layers, int) else layers))
    names = []
    for name, _ in tower.named_parameters():
        words = name.split(".")
        behind = "layers" in words and int(words[words.index("layers") + 1]) >= last
        if behind or "post_layernorm" in words or "head" in words:
            names.append(name)
    return names


def part_of(model: PreTrainedModel) -> Callable[[str], str]:
    """A function from parameter names of `model` (adapters included) to `vision_tower`, `projector` or `language_model`."""
    family = family_of(model.config)

    def part(name: str) -> str:
        words = name.split(".")
        if family.vision_tower in words:
            return "vision_tower"
        return "projector" if family.projector in words else "language_model"

    return part
