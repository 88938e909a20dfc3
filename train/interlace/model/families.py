"""The little that differs per model family, as a table keyed by `config.model_type`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from interlace.errors import InputError
from interlace.model.tiles import Tiles, choose_next_tiles, choose_onevision_tiles, next_tiles, onevision_tiles


@dataclass(frozen=True)
class Tiling:
    """What a family whose images are cut into tiles has besides.

    choose: (config, image_aspect_ratio or None) -> None; writes the user's choice into the configuration, or refuses it.
    tiles: config -> how images are cut.
    newline: name of the parameter, inside `PreTrainedModel.model`, that ends a row of features.
    assemble: (`PreTrainedModel.model`, projected features (tiles, tokens, width) of each image, (height, width) of each) -> (tokens, width) of each.
    """

    choose: Callable[[PretrainedConfig, str | None], None]
    tiles: Callable[[PretrainedConfig], Tiles]
    newline: str
    assemble: Callable[[Any, Sequence[torch.Tensor], Sequence[tuple[int, int]]], list[torch.Tensor]]


@dataclass(frozen=True)
class Family:
    """Where a family keeps its parts, and how it selects vision features.

    vision_tower, projector, language_model: module names inside `PreTrainedModel.model`.
    features: (config, tower, pixel_values (K, C, H, W)) -> (K, tokens, vision width), before the projector.
    tokens_per_image: config -> number of tokens of an image, or of a tile.
    processor: class name of its processor in transformers; processor_settings: config -> what that class wants to be told besides.
    tiling: None where an image is one tile.
    """

    vision_tower: str
    projector: str
    language_model: str
    features: Callable[[PretrainedConfig, nn.Module, torch.Tensor], torch.Tensor]
    tokens_per_image: Callable[[PretrainedConfig], int]
    processor: str
    processor_settings: Callable[[PretrainedConfig], dict[str, Any]]
    tiling: Tiling | None = None


def llava_features(config: PretrainedConfig, tower: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """The hidden state(s) that `vision_feature_layer` names, without the class token under strategy "default".

    Number n is the output of block n, 0 the first one's input. Only these are kept, and blocks behind them are not run: nothing uses what they would give.
    """
    layers, owner = config.vision_feature_layer, _owner_of_blocks(tower)
    blocks = owner.layers
    numbers = [layer if layer >= 0 else len(blocks) + 1 + layer for layer in ([layers] if isinstance(layers, int) else layers)]
    found: dict[int, torch.Tensor] = {}
    hooks = [blocks[number - 1].register_forward_hook(lambda _, __, output, n=number: found.update({n: _tensor(output)})) for number in set(numbers) - {0}]
    if 0 in numbers:
        hooks.append(blocks[0].register_forward_pre_hook(lambda _, inputs: found.update({0: inputs[0]})))
    try:
        owner.layers = blocks[: max(1, *numbers)]
        tower(pixel_values, return_dict=True)
    finally:
        owner.layers = blocks
        for hook in hooks:
            hook.remove()
    chosen = [found[number] for number in numbers]
    if config.vision_feature_select_strategy == "default":
        chosen = [state[:, 1:] for state in chosen]
    return torch.cat(chosen, dim=-1)


def _owner_of_blocks(tower: nn.Module) -> Any:
    """The module inside a tower that holds its blocks as `layers`; of a tower that learns beside an adapter, inside the copy that learns."""
    if isinstance(tower, ModulesToSaveWrapper):
        tower = tower.modules_to_save["default"]
    return next(module for module in tower.modules() if isinstance(getattr(module, "layers", None), nn.ModuleList))


def _tensor(output: Any) -> torch.Tensor:
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found


def llava_tokens(config: PretrainedConfig) -> int:
    """Patches of a square image; CLIP's class token counts under strategy "full"."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    return patches + int(config.vision_feature_select_strategy == "full" and vision.model_type == "clip_vision_model")


def llava_processor(config: PretrainedConfig) -> dict[str, Any]:
    """Settings of `LlavaProcessor` and `LlavaNextProcessor`."""
    return {"patch_size": config.vision_config.patch_size, "num_additional_image_tokens": int(config.vision_config.model_type == "clip_vision_model")}


def onevision_processor(config: PretrainedConfig) -> dict[str, Any]:
    """Settings of `LlavaOnevisionProcessor`; its count includes the class token that strategy "default" leaves out."""
    tokens = llava_tokens(config) + int(config.vision_feature_select_strategy == "default")
    return {"num_image_tokens": tokens, "vision_aspect_ratio": config.vision_aspect_ratio}


def next_assemble(model: Any, features: Sequence[torch.Tensor], image_sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """See `Tiling.assemble`."""
    strategy = model.config.vision_feature_select_strategy
    return model.pack_image_features(features, image_sizes, vision_feature_select_strategy=strategy, image_newline=model.image_newline)[0]


def onevision_assemble(model: Any, features: Sequence[torch.Tensor], image_sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """See `Tiling.assemble`."""
    most = model.config.vision_aspect_ratio
    return model.pack_image_features(features, image_sizes, image_newline=model.image_newline, vision_aspect_ratio=most)[0]


_LLAVA = ("vision_tower", "multi_modal_projector", "language_model", llava_features, llava_tokens)
FAMILIES = {
    "llava": Family(*_LLAVA, "LlavaProcessor", llava_processor),
    "llava_next": Family(*_LLAVA, "LlavaNextProcessor", llava_processor, Tiling(choose_next_tiles, next_tiles, "image_newline", next_assemble)),
    "llava_onevision": Family(
        *_LLAVA, "LlavaOnevisionProcessor", onevision_processor, Tiling(choose_onevision_tiles, onevision_tiles, "image_newline", onevision_assemble)
    ),
}


def family_of(config: PretrainedConfig) -> Family:
    """The family of a model.

    Raises:
        InputError: `model_type` is not in the table.
    """
    if config.model_type not in FAMILIES:
        alone = (
            " A language model alone becomes a LLaVA with convert_checkpoint.py --vision-tower." if config.model_type in ("llama", "qwen2", "mistral") else ""
        )
        raise InputError(f"model_type {config.model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}.{alone}")
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
        is_newline = family.tiling is not None and words[-1] == family.tiling.newline
        return "projector" if family.projector in words or is_newline else "language_model"

    return part
