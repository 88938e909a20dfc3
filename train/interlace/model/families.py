"""The little that differs per model family, as a table keyed by `config.model_type`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from interlace.data.styles import StyleName
from interlace.errors import InputError
from interlace.model import gemma3, internvl, llava, qwen_vl, smolvlm
from interlace.model.images import Images
from interlace.model.layouts import INTERNVL_LAYOUT, LLAVA_LAYOUT, QWEN_VL_LAYOUT, Layout

Sizes = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Tiling:
    """What a family whose tiles are put together with more than they hold has besides.

    newline: name of the parameter, inside `PreTrainedModel.model`, that ends a row of features.
    assemble: (`PreTrainedModel.model`, that parameter, projected features (tiles, tokens, width) of each image, (height, width) and number of tokens of
    each) -> (tokens, width) of each.
    """

    newline: str
    assemble: Callable[[Any, torch.Tensor, Sequence[torch.Tensor], Sizes, Sequence[int]], list[torch.Tensor]]


@dataclass(frozen=True)
class Tower:
    """What the cost of a vision tower depends on.

    patches: config -> how many patches a tile has. tokens: config -> how many tokens its blocks see of a tile. width: config -> of a token in its attention.
    attended: (config, number of a block) -> how many tokens each token sees there; None: all of its image, however large.
    sees_images: whether there are such blocks.
    """

    patches: Callable[[PretrainedConfig], int]
    tokens: Callable[[PretrainedConfig], int]
    width: Callable[[PretrainedConfig], int]
    attended: Callable[[PretrainedConfig, int], int | None]
    sees_images: bool = False


@dataclass(frozen=True)
class Family:
    """Where a family keeps its parts, how its images come in, and how features become tokens. A tile is what the tower takes: see `PackedBatch`.

    vision_tower, language_model: module names inside `PreTrainedModel.model`. projector: names of the modules that it consists of; they may stand inside the
    vision tower.
    images: class of what counts, resizes and writes images.
    check: (config, image_aspect_ratio or None) -> None; writes the user's choice into the configuration, or refuses it, or what cannot be right.
    image_processor: (image processor, config, image_aspect_ratio or None) -> the image processor as the user wants it.
    features: (config, tower, pixel values of tiles, rows and columns of each image's tokens, if they matter) -> (tiles, tokens, vision width).
    project: (`PreTrainedModel.model`, features) -> (tiles, tokens, text width), or a multiple of it where later layers take features too.
    tokens_per_tile, feature_width, tile_shape: config -> tokens of a tile, width of its features, shape of its pixel values.
    num_tiles: (config, (height, width) of an image, number of its tokens that features fill) -> how many tiles it is.
    unused: (config, tower) -> names of its parameters that never get a gradient, so that they must not train.
    feature_settings: config -> names what the features depend on beside weights and pixels.
    tower: what its cost depends on.
    processor: class name of its processor in transformers; processor_settings: config -> what that class wants to be told besides, None for what it
    cannot be told.
    layout: how the hub spells the weights. has_flat_config: whether the hub's config.json has the language model's settings beside the others, without a
    section of their own, which is how transformers 4 reads it.
    prompt_style, system_prompt: those its models were trained with; None for what goes with the tokenizer, and with the style.
    tiling: None where an image's tokens are those of its tiles, in order.
    processor_tokens: (contents of a processor_config.json, config) -> tokens of a tile as that processor counts them, None where the file does not say.
    sees_whole_images: whether the tokens of an image attend to each other in both directions. An image's own tokens never stand next to another image's.
    """

    vision_tower: str
    projector: tuple[str, ...]
    language_model: str
    images: Callable[[PretrainedConfig, BaseImageProcessor, PreTrainedTokenizerBase], Images]
    check: Callable[[PretrainedConfig, str | None], None]
    image_processor: Callable[[BaseImageProcessor, PretrainedConfig, str | None], BaseImageProcessor]
    features: Callable[[PretrainedConfig, Any, torch.Tensor, Sizes], torch.Tensor]
    project: Callable[[Any, torch.Tensor], torch.Tensor]
    tokens_per_tile: Callable[[PretrainedConfig], int]
    feature_width: Callable[[PretrainedConfig], int]
    tile_shape: Callable[[PretrainedConfig], tuple[int, ...]]
    num_tiles: Callable[[PretrainedConfig, tuple[int, int], int], int]
    unused: Callable[[PretrainedConfig, nn.Module], list[str]]
    feature_settings: Callable[[PretrainedConfig], str]
    tower: Tower
    processor: str
    processor_settings: Callable[[PretrainedConfig], dict[str, Any]]
    layout: Layout
    prompt_style: StyleName | None = None
    system_prompt: str | None = None
    tiling: Tiling | None = None
    processor_tokens: Callable[[Mapping[str, Any], PretrainedConfig], int | None] | None = None
    sees_whole_images: bool = False
    has_flat_config: bool = False

    @property
    def projector_in_tower(self) -> list[str]:
        """Those of the projector's modules that stand inside the vision tower, by their names there."""
        inside = f"{self.vision_tower}."
        return [name.removeprefix(inside) for name in self.projector if name.startswith(inside)]


_LLAVA: dict[str, Any] = {
    "vision_tower": "vision_tower",
    "projector": ("multi_modal_projector",),
    "language_model": "language_model",
    "images": llava.LlavaImages,
    "check": llava.check_llava,
    "image_processor": llava.llava_image_processor,
    "features": llava.llava_features,
    "project": llava.llava_project,
    "tokens_per_tile": llava.llava_tokens,
    "feature_width": llava.llava_width,
    "tile_shape": llava.square_tile,
    "num_tiles": llava.one_tile,
    "unused": llava.unused_llava_parameters,
    "feature_settings": llava.llava_features_of,
    "tower": Tower(llava.square_patches, llava.tower_tokens, llava.tower_width, llava.attends_to_tile),
    "processor": "LlavaProcessor",
    "processor_settings": llava.llava_processor,
    "processor_tokens": llava.llava_processor_tokens,
    "layout": LLAVA_LAYOUT,
}
_LLAVA_NEXT = _LLAVA | {
    "images": llava.NextImages,
    "check": llava.check_next,
    "image_processor": llava.tiling_image_processor,
    "num_tiles": llava.next_num_tiles,
    "processor": "LlavaNextProcessor",
    "tiling": Tiling("image_newline", llava.next_assemble),
}
_LLAVA_ONEVISION = _LLAVA_NEXT | {
    "images": llava.OnevisionImages,
    "check": llava.check_onevision,
    "num_tiles": llava.onevision_num_tiles,
    "processor": "LlavaOnevisionProcessor",
    "processor_settings": llava.onevision_processor,
    "processor_tokens": llava.onevision_processor_tokens,
    "tiling": Tiling("image_newline", llava.onevision_assemble),
}
_QWEN2_VL: dict[str, Any] = {
    "vision_tower": "visual",
    "projector": ("visual.merger",),
    "language_model": "language_model",
    "images": qwen_vl.QwenImages,
    "check": qwen_vl.check_qwen,
    "image_processor": qwen_vl.qwen_image_processor,
    "features": qwen_vl.qwen2_features,
    "project": qwen_vl.qwen_project,
    "tokens_per_tile": qwen_vl.one_token,
    "feature_width": qwen_vl.qwen2_width,
    "tile_shape": qwen_vl.qwen_tile,
    "num_tiles": qwen_vl.a_tile_per_token,
    "unused": qwen_vl.no_parameters,
    "feature_settings": qwen_vl.qwen_settings,
    "tower": Tower(qwen_vl.group_patches, qwen_vl.group_patches, qwen_vl.qwen2_tower_width, qwen_vl.attends_to_image, True),
    "processor": "Qwen2VLProcessor",
    "processor_settings": qwen_vl.no_settings,
    "layout": QWEN_VL_LAYOUT,
    "has_flat_config": True,
}
_QWEN2_5_VL = _QWEN2_VL | {
    "features": qwen_vl.qwen2_5_features,
    "feature_width": qwen_vl.qwen2_5_width,
    "tower": Tower(qwen_vl.group_patches, qwen_vl.group_patches, qwen_vl.qwen2_5_tower_width, qwen_vl.attends_to_windows, True),
    "processor": "Qwen2_5_VLProcessor",
}
_QWEN3_VL = _QWEN2_5_VL | {
    "projector": ("visual.merger", "visual.deepstack_merger_list"),
    "features": qwen_vl.qwen3_features,
    "project": qwen_vl.qwen3_project,
    "feature_width": qwen_vl.qwen3_width,
    "tower": Tower(qwen_vl.group_patches, qwen_vl.group_patches, qwen_vl.qwen2_5_tower_width, qwen_vl.attends_to_image, True),
    "processor": "Qwen3VLProcessor",
    "layout": (),  # as in memory
    "has_flat_config": False,
    "system_prompt": "",
}
_INTERNVL: dict[str, Any] = {
    "vision_tower": "vision_tower",
    "projector": ("multi_modal_projector",),
    "language_model": "language_model",
    "images": internvl.InternImages,
    "check": internvl.check_internvl,
    "image_processor": internvl.internvl_image_processor,
    "features": internvl.internvl_features,
    "project": llava.llava_project,
    "tokens_per_tile": internvl.tile_tokens,
    "feature_width": internvl.internvl_width,
    "tile_shape": internvl.internvl_tile,
    "num_tiles": internvl.num_tiles,
    "unused": internvl.unused_internvl_parameters,
    "feature_settings": qwen_vl.qwen_settings,
    "tower": Tower(internvl.tile_patches, internvl.tower_tokens, llava.tower_width, internvl.attends_to_tile),
    "processor": "InternVLProcessor",
    "processor_settings": internvl.internvl_processor,
    "layout": INTERNVL_LAYOUT,
    "prompt_style": "internvl",
    "system_prompt": "",
}
_SMOLVLM: dict[str, Any] = {
    "vision_tower": "vision_model",
    "projector": ("connector",),
    "language_model": "text_model",
    "images": smolvlm.SmolImages,
    "check": smolvlm.check_smolvlm,
    "image_processor": smolvlm.smolvlm_image_processor,
    "features": smolvlm.smolvlm_features,
    "project": smolvlm.smolvlm_project,
    "tokens_per_tile": smolvlm.tile_tokens,
    "feature_width": smolvlm.smolvlm_width,
    "tile_shape": llava.square_tile,
    "num_tiles": smolvlm.num_tiles,
    "unused": qwen_vl.no_parameters,
    "feature_settings": qwen_vl.qwen_settings,
    "tower": Tower(llava.square_patches, llava.tower_tokens, llava.tower_width, llava.attends_to_tile),
    "processor": "SmolVLMProcessor",
    "processor_settings": smolvlm.smolvlm_processor,
    "layout": (),  # as in memory
    "prompt_style": "smolvlm",
    "system_prompt": "",
}
_IDEFICS3 = _SMOLVLM | {"processor": "Idefics3Processor"}  # SmolVLM-256M, -500M and -Instruct; SmolVLM2 is of the newer type
_GEMMA3: dict[str, Any] = {
    "vision_tower": "vision_tower",
    "projector": ("multi_modal_projector",),
    "language_model": "language_model",
    "images": gemma3.GemmaImages,
    "check": gemma3.check_gemma3,
    "image_processor": gemma3.gemma3_image_processor,
    "features": gemma3.gemma3_features,
    "project": gemma3.gemma3_project,
    "tokens_per_tile": gemma3.image_tokens,
    "feature_width": gemma3.gemma3_width,
    "tile_shape": llava.square_tile,
    "num_tiles": llava.one_tile,
    "unused": gemma3.unused_gemma3_parameters,
    "feature_settings": qwen_vl.qwen_settings,
    "tower": Tower(llava.square_patches, llava.tower_tokens, llava.tower_width, llava.attends_to_tile),
    "processor": "Gemma3Processor",
    "processor_settings": gemma3.gemma3_processor,
    "layout": LLAVA_LAYOUT,
    "prompt_style": "gemma",
    "sees_whole_images": True,
}
FAMILIES = {
    "llava": Family(**_LLAVA),
    "llava_next": Family(**_LLAVA_NEXT),
    "llava_onevision": Family(**_LLAVA_ONEVISION),
    "qwen2_vl": Family(**_QWEN2_VL),
    "qwen2_5_vl": Family(**_QWEN2_5_VL),
    "qwen3_vl": Family(**_QWEN3_VL),
    "internvl": Family(**_INTERNVL),
    "smolvlm": Family(**_SMOLVLM),
    "idefics3": Family(**_IDEFICS3),
    "gemma3": Family(**_GEMMA3),
}


REFUSED = {
    "paligemma": "all of a prompt attends to each other in both directions, text included, so that an answer cannot be a part of the next turn's "
    "prompt; packed attention is causal but for images",
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
        reason = f" ({REFUSED[config.model_type]})" if config.model_type in REFUSED else ""
        raise InputError(f"model_type {config.model_type!r} is not supported{reason}; supported: {', '.join(sorted(FAMILIES))}.{alone}")
    return FAMILIES[config.model_type]


def part_of(model: PreTrainedModel) -> Callable[[str], str]:
    """A function from names of parameters or modules of `model` (adapters included) to `vision_tower`, `projector` or `language_model`."""
    family = family_of(model.config)

    def part(name: str) -> str:
        plain = f".{name.replace('.modules_to_save.default', '').replace('.original_module', '')}."
        if any(f".{module}." in plain for module in family.projector) or (family.tiling is not None and plain.endswith(f".{family.tiling.newline}.")):
            return "projector"
        return "vision_tower" if f".{family.vision_tower}." in plain else "language_model"

    return part
