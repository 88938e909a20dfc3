"""The LLaVA families: images of one square size, or cut into tiles of it; a tower whose layer is chosen, a projector behind it."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

import PIL.Image
import torch
from torch import nn
from transformers import BaseImageProcessor, LlavaImageProcessorPil, PretrainedConfig

from interlace.errors import InputError
from interlace.model.images import Images
from interlace.model.tiles import Tiles, choose_next_tiles, choose_onevision_tiles, next_tiles, onevision_tiles

Grids = Sequence[tuple[int, int]]


class LlavaImages(Images):
    """Every image is one tile."""

    @property
    def settings(self) -> str:
        return f"{self.config.model_type} {llava_tokens(self.config)}"

    def row_tokens(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        return [llava_tokens(self.config)] * len(sizes)

    def pixels(self, images: Sequence[PIL.Image.Image], image_tokens: Sequence[int] | None) -> torch.Tensor:
        return self.processed(list(images))

    def generation_inputs(self, rows: Sequence[Sequence[PIL.Image.Image]], input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        images = [image for row in rows for image in row]
        tokens = [count for row in rows for count in self.row_tokens([image.size for image in row])]
        return {"pixel_values": self.pixels(images, tokens)}


class TiledImages(LlavaImages):
    """Images are cut; see `Tiles`."""

    tiles: Tiles

    @property
    def settings(self) -> str:
        return f"{super().settings} {self.tiles}"

    def row_tokens(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        return self.tiles.image_tokens(sizes)

    def pixels(self, images: Sequence[PIL.Image.Image], image_tokens: Sequence[int] | None) -> torch.Tensor:
        if image_tokens is None:
            return self.processed(list(images), self._squashing)
        return torch.cat([self._cut(image, tokens) for image, tokens in zip(images, image_tokens, strict=True)])

    def _cut(self, image: PIL.Image.Image, tokens: int) -> torch.Tensor:
        if not self.tiles.is_cut(tokens):
            return self.processed([image], self._padding)
        if tokens != self.tiles.cut_tokens(*image.size):
            raise self._changed(image, tokens)
        return self.processed([image])[0]

    @cached_property
    def _padding(self) -> BaseImageProcessor:
        return with_aspect_ratio(self.image_processor, "pad", self.config)

    @cached_property
    def _squashing(self) -> BaseImageProcessor:
        return with_aspect_ratio(self.image_processor, "squash", self.config)

    def generation_inputs(self, rows: Sequence[Sequence[PIL.Image.Image]], input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        sizes = torch.tensor([(image.height, image.width) for row in rows for image in row])
        inputs = super().generation_inputs(rows, input_ids) | {"image_sizes": sizes}
        return inputs | {"batch_num_images": torch.tensor([len(row) for row in rows])} if self.tiles.single else inputs


class NextImages(TiledImages):
    """LLaVA-NeXT."""

    @cached_property
    def tiles(self) -> Tiles:  # type: ignore[override]
        return next_tiles(self.config)


class OnevisionImages(TiledImages):
    """LLaVA-OneVision, which sees a video as one medium: the pooled features of its frames, and a newline. The number of tokens tells a frame from an image."""

    @cached_property
    def tiles(self) -> Tiles:  # type: ignore[override]
        return onevision_tiles(self.config)

    @property
    def video_token_id(self) -> int:
        return int(self.config.video_token_id)

    def video_tokens(self, num_frames: int) -> list[int]:
        return [self.tiles.frame_tokens] * (num_frames - 1) + [self.tiles.frame_tokens + 1]

    def videos(self, image_tokens: Sequence[int]) -> list[range]:
        found, start = [], 0
        for end, tokens in enumerate(image_tokens, 1):
            if tokens == self.tiles.frame_tokens + 1:
                found.append(range(start, end))
            if tokens != self.tiles.frame_tokens:
                start = end
        return found

    def ids(self, tokens: int) -> Sequence[int]:
        return [self.video_token_id] * tokens if self.tiles.is_frame(tokens) else super().ids(tokens)

    def _cut(self, image: PIL.Image.Image, tokens: int) -> torch.Tensor:
        return self.processed([image], self._squashing) if self.tiles.is_frame(tokens) else super()._cut(image, tokens)


def with_aspect_ratio(image_processor: BaseImageProcessor, image_aspect_ratio: str, config: PretrainedConfig) -> BaseImageProcessor:
    """An image processor that makes every image the model's square size: `squash` stretches it, `pad` first adds borders of the mean colour.

    Both are saved as processors that other tools know: padding is Hugging Face's `LlavaImageProcessor`, the original code's `expand2square`.

    Raises:
        InputError: the model cannot take images in this way.
    """
    if image_aspect_ratio not in ("squash", "pad"):
        reason = "it cuts images into tiles, which this model has no tokens for" if image_aspect_ratio.startswith("anyres") else "no such way"
        raise InputError(f"image_aspect_ratio: {image_aspect_ratio!r} does not go with model_type {config.model_type!r}: {reason}; expected squash or pad")
    side = config.vision_config.image_size
    kept = ("resample", "image_mean", "image_std", "rescale_factor", "do_rescale", "do_normalize", "do_convert_rgb")
    values = {name: getattr(image_processor, name) for name in kept if getattr(image_processor, name, None) is not None}
    return LlavaImageProcessorPil(size={"height": side, "width": side}, do_center_crop=False, do_pad=image_aspect_ratio == "pad", **values)


def check_llava(config: PretrainedConfig, image_aspect_ratio: str | None) -> None:
    """See `Family.check`; what `image_aspect_ratio` changes is the image processor."""
    vision = config.vision_config
    if config.vision_feature_select_strategy == "default" and vision.model_type != "clip_vision_model":
        patches = (vision.image_size // vision.patch_size) ** 2
        raise InputError(
            f'vision_feature_select_strategy "default" leaves the first of {patches} patches out, but a {vision.model_type} has no class token there: '
            f'{patches - 1} tokens per image, as in early files of the hub ports; set it to "full" in config.json'
        )


def check_next(config: PretrainedConfig, image_aspect_ratio: str | None) -> None:
    """See `Family.check`."""
    choose_next_tiles(config, image_aspect_ratio)
    next_tiles(config)


def check_onevision(config: PretrainedConfig, image_aspect_ratio: str | None) -> None:
    """See `Family.check`."""
    choose_onevision_tiles(config, image_aspect_ratio)
    onevision_tiles(config)


def llava_image_processor(image_processor: BaseImageProcessor, config: PretrainedConfig, image_aspect_ratio: str | None) -> BaseImageProcessor:
    """See `Family.image_processor`."""
    return image_processor if image_aspect_ratio is None else with_aspect_ratio(image_processor, image_aspect_ratio, config)


def tiling_image_processor(image_processor: BaseImageProcessor, config: PretrainedConfig, image_aspect_ratio: str | None) -> BaseImageProcessor:
    """See `Family.image_processor`; the choice stands in the configuration."""
    if getattr(image_processor, "image_grid_pinpoints", None) != config.image_grid_pinpoints:
        raise InputError("image_grid_pinpoints of the image processor and of the model differ; expected the same in both")
    return image_processor


def llava_features(config: PretrainedConfig, tower: Any, pixel_values: torch.Tensor, grids: Grids) -> torch.Tensor:
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
    """The module inside a tower that holds its blocks as `layers`."""
    return next(module for module in tower.modules() if isinstance(getattr(module, "layers", None), nn.ModuleList))


def _tensor(output: Any) -> torch.Tensor:
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found


def llava_project(model: Any, features: torch.Tensor) -> torch.Tensor:
    """See `Family.project`."""
    projected: torch.Tensor = model.multi_modal_projector(features)
    return projected


def llava_tokens(config: PretrainedConfig) -> int:
    """Patches of a square image; CLIP's class token counts under strategy "full"."""
    vision = config.vision_config
    patches: int = (vision.image_size // vision.patch_size) ** 2
    return patches + int(config.vision_feature_select_strategy == "full" and vision.model_type == "clip_vision_model")


def llava_width(config: PretrainedConfig) -> int:
    """See `Family.feature_width`."""
    layers = config.vision_feature_layer
    width: int = config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))
    return width


def square_tile(config: PretrainedConfig) -> tuple[int, ...]:
    """See `Family.tile_shape`."""
    vision = config.vision_config
    return vision.num_channels, vision.image_size, vision.image_size


def llava_features_of(config: PretrainedConfig) -> str:
    """See `Family.feature_settings`."""
    return f"{config.vision_feature_layer} {config.vision_feature_select_strategy}"


def unused_llava_parameters(config: PretrainedConfig, tower: nn.Module) -> list[str]:
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


def one_tile(config: PretrainedConfig, size: tuple[int, int], tokens: int) -> int:
    """See `Family.num_tiles`."""
    return 1


def next_num_tiles(config: PretrainedConfig, size: tuple[int, int], tokens: int) -> int:
    """See `Family.num_tiles`."""
    return next_tiles(config).count(size, tokens)


def onevision_num_tiles(config: PretrainedConfig, size: tuple[int, int], tokens: int) -> int:
    """See `Family.num_tiles`."""
    return onevision_tiles(config).count(size, tokens)


def llava_processor(config: PretrainedConfig) -> dict[str, Any]:
    """Settings of `LlavaProcessor` and `LlavaNextProcessor`."""
    tokens = int(config.vision_config.model_type == "clip_vision_model")
    return {
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "patch_size": config.vision_config.patch_size,
        "num_additional_image_tokens": tokens,
    }


def llava_processor_tokens(settings: Mapping[str, Any], config: PretrainedConfig) -> int | None:
    """See `Family.processor_tokens`; as `LlavaProcessor` and `LlavaNextProcessor` count."""
    patch = settings.get("patch_size")
    if not isinstance(patch, int) or patch < 1:
        return None
    more = settings.get("num_additional_image_tokens") or 0
    return (config.vision_config.image_size // patch) ** 2 + int(more) - int(settings.get("vision_feature_select_strategy") == "default")


def onevision_processor_tokens(settings: Mapping[str, Any], config: PretrainedConfig) -> int | None:
    """See `Family.processor_tokens`; as `LlavaOnevisionProcessor` counts."""
    tokens = settings.get("num_image_tokens")
    return tokens - int(settings.get("vision_feature_select_strategy") == "default") if isinstance(tokens, int) else None


def onevision_processor(config: PretrainedConfig) -> dict[str, Any]:
    """Settings of `LlavaOnevisionProcessor`; its count includes the class token that strategy "default" leaves out."""
    strategy = config.vision_feature_select_strategy
    tokens = llava_tokens(config) + int(strategy == "default")
    return {"vision_feature_select_strategy": strategy, "num_image_tokens": tokens, "vision_aspect_ratio": config.vision_aspect_ratio}


def next_assemble(model: Any, newline: torch.Tensor, features: Sequence[torch.Tensor], image_sizes: Grids, image_tokens: Sequence[int]) -> list[torch.Tensor]:
    """See `Tiling.assemble`."""
    strategy = model.config.vision_feature_select_strategy
    return model.pack_image_features(features, image_sizes, vision_feature_select_strategy=strategy, image_newline=newline)[0]


def onevision_assemble(
    model: Any, newline: torch.Tensor, features: Sequence[torch.Tensor], image_sizes: Grids, image_tokens: Sequence[int]
) -> list[torch.Tensor]:
    """See `Tiling.assemble`; of videos as in `get_video_features` of transformers."""
    tiles, most = onevision_tiles(model.config), model.config.vision_aspect_ratio
    rows: list[torch.Tensor] = []
    for are_frames, group in groupby(range(len(features)), key=lambda number: tiles.is_frame(image_tokens[number])):
        numbers = list(group)
        chosen = [features[number] for number in numbers]
        if are_frames:
            rows += model.apply_pooling(torch.cat(chosen))
        else:
            sizes = [image_sizes[number] for number in numbers]
            rows += model.pack_image_features(chosen, sizes, image_newline=newline, vision_aspect_ratio=most)[0]
    return [torch.cat((row, newline[None].to(row))) if tokens == tiles.frame_tokens + 1 else row for row, tokens in zip(rows, image_tokens, strict=True)]


def square_patches(config: PretrainedConfig) -> int:
    """See `Tower.patches`."""
    vision = config.vision_config
    patches: int = (vision.image_size // vision.patch_size) ** 2
    return patches


def tower_tokens(config: PretrainedConfig) -> int:
    """See `Tower.tokens`; CLIP has a class token besides."""
    return square_patches(config) + int(config.vision_config.model_type == "clip_vision_model")


def tower_width(config: PretrainedConfig) -> int:
    """See `Tower.width`."""
    width: int = config.vision_config.hidden_size
    return width


def attends_to_tile(config: PretrainedConfig, block: int) -> int | None:
    """See `Tower.attended`."""
    return tower_tokens(config)
