"""InternVL: images cut into tiles that fill their shape best, and the whole image once more in a last tile; four features become one token."""

import re
from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch
from torch import nn
from transformers import BaseImageProcessor, PretrainedConfig

from interlace.errors import InputError
from interlace.model.images import Images

Grids = Sequence[tuple[int, int]]


class InternImages(Images):
    """`<img>` and `</img>` stand around the tokens of an image's tiles."""

    @property
    def settings(self) -> str:
        processor: Any = self.image_processor
        return f"{self.config.model_type} {tile_tokens(self.config)} {processor.size} {processor.min_patches} {processor.max_patches}"

    def row_tokens(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        return [self._tokens(*size) for size in sizes]

    def _tokens(self, width: int, height: int) -> int:
        processor: Any = self.image_processor
        return int(processor.get_number_of_image_patches(height, width, {"crop_to_patches": True})) * tile_tokens(self.config) + 2

    def ids(self, tokens: int) -> Sequence[int]:
        return [self.id_of("<img>"), *[self.config.image_token_id] * (tokens - 2), self.id_of("</img>")]

    def pixels(self, images: Sequence[PIL.Image.Image], image_tokens: Sequence[int] | None) -> torch.Tensor:
        if image_tokens is None:
            return self.processed(list(images), crop_to_patches=False)
        for image, tokens in zip(images, image_tokens, strict=True):
            if tokens != self._tokens(*image.size):
                raise self._changed(image, tokens)
        return self.processed(list(images), crop_to_patches=True)

    def generation_inputs(self, rows: Sequence[Sequence[PIL.Image.Image]], input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        images = [image for row in rows for image in row]
        return {"pixel_values": self.pixels(images, self.row_tokens([image.size for image in images]))}

    def picture(self, pixel_values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return pixel_values[-1]


def check_internvl(config: PretrainedConfig, image_aspect_ratio: str | None) -> None:
    """See `Family.check`."""
    if config.vision_feature_layer != -1 or config.vision_feature_select_strategy != "default":
        found = f"{config.vision_feature_layer} and {config.vision_feature_select_strategy!r}"
        raise InputError(f"vision_feature_layer and vision_feature_select_strategy of an InternVL: expected -1 and 'default', got {found}")


def internvl_image_processor(image_processor: Any, config: PretrainedConfig, image_aspect_ratio: str | None) -> BaseImageProcessor:
    """See `Family.image_processor`: how many tiles an image has at most, where transformers reads it."""
    found = re.fullmatch(r"squash|anyres|anyres_max_([1-9]\d*)", image_aspect_ratio or "anyres")
    if found is None:
        raise InputError(
            f"image_aspect_ratio: {image_aspect_ratio!r} does not go with model_type {config.model_type!r}: it stretches images to tiles; expected squash "
            "(one tile), anyres (as its preprocessor_config.json says) or anyres_max_N"
        )
    if found.group() != "anyres":
        image_processor.max_patches = int(found.group(1) or 1)
    return image_processor  # type: ignore[no-any-return]


def internvl_features(config: PretrainedConfig, tower: Any, pixel_values: torch.Tensor, grids: Grids) -> torch.Tensor:
    """See `Family.features`: squares of features side by side in one, without the class token."""
    return side_by_side(tower(pixel_values, return_dict=True).last_hidden_state[:, 1:], round(1 / config.downsample_ratio))


def side_by_side(features: torch.Tensor, factor: int) -> torch.Tensor:
    """(tiles, side x side, width) -> (tiles, (side / factor) x (side / factor), factor x factor x width): "pixel shuffle"."""
    tiles, places, width = features.shape
    side = round(places**0.5)
    squares = features.view(tiles, side // factor, factor, side // factor, factor, width).transpose(2, 3)
    return squares.reshape(tiles, (side // factor) ** 2, factor**2 * width)


def tile_tokens(config: PretrainedConfig) -> int:
    """See `Family.tokens_per_tile`."""
    return tile_patches(config) // round(1 / config.downsample_ratio) ** 2


def tile_patches(config: PretrainedConfig) -> int:
    """See `Tower.patches`."""
    vision = config.vision_config
    patches: int = (vision.image_size[0] // vision.patch_size[0]) * (vision.image_size[1] // vision.patch_size[1])
    return patches


def tower_tokens(config: PretrainedConfig) -> int:
    """See `Tower.tokens`: one more than there are patches."""
    return tile_patches(config) + 1


def attends_to_tile(config: PretrainedConfig, block: int) -> int | None:
    """See `Tower.attended`."""
    return tower_tokens(config)


def num_tiles(config: PretrainedConfig, size: tuple[int, int], tokens: int) -> int:
    """See `Family.num_tiles`."""
    return tokens // tile_tokens(config)


def internvl_width(config: PretrainedConfig) -> int:
    """See `Family.feature_width`."""
    width: int = config.vision_config.hidden_size * round(1 / config.downsample_ratio) ** 2
    return width


def internvl_tile(config: PretrainedConfig) -> tuple[int, ...]:
    """See `Family.tile_shape`."""
    return config.vision_config.num_channels, *config.vision_config.image_size


def unused_internvl_parameters(config: PretrainedConfig, tower: nn.Module) -> list[str]:
    """See `Family.unused`: what masks patches in pre-training."""
    return [name for name, _ in tower.named_parameters() if name.endswith("mask_token")]


def internvl_processor(config: PretrainedConfig) -> dict[str, Any]:
    """Settings of `InternVLProcessor`."""
    return {"image_seq_length": tile_tokens(config)}
