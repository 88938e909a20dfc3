"""Images in tiles ("anyres"): how an image is cut and how many tokens come of it, from its size alone."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt

import torch
from transformers import PretrainedConfig
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, image_size_to_num_patches, unpad_image

from interlace.errors import InputError


@dataclass(frozen=True)
class Tiles:
    """How a model's images are cut.

    A cut image is the whole image in one tile, then the tiles of the resolution that suits its shape best. Their features form one picture; rows and
    columns of padding are taken away from it, and a newline feature ends each of its rows (`pack_image_features` of transformers).

    pinpoints: the resolutions, [height, width] in pixels. pixels: side of a tile. patches: how many lie along that side.
    most: a picture of more than this many tiles is scaled down to them (LLaVA-OneVision's anyres_max_N); None: never.
    single: only a row's single image is cut (LLaVA-OneVision); each of several is padded to a square and one tile, with one newline feature. A frame of a
    video is stretched to one tile, whose features are pooled two by two, and one newline feature ends the video.
    """

    pinpoints: list[list[int]]
    pixels: int
    patches: int
    most: int | None
    single: bool

    def image_tokens(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Number of tokens of each image of one row, from their (width, height)."""
        if self.single and len(sizes) > 1:
            return [self.uncut_tokens] * len(sizes)
        return [self.cut_tokens(*size) for size in sizes]

    @property
    def uncut_tokens(self) -> int:
        """Number of tokens of an image that is not cut."""
        return self.patches**2 + 1

    def cut_tokens(self, width: int, height: int) -> int:
        """Number of tokens of an image that is cut."""
        grid = get_anyres_image_grid_shape((height, width), self.pinpoints, self.pixels)
        picture = torch.empty(0, *(side * self.patches for side in grid))  # no channels: only its shape is wanted
        rows, columns = unpad_image(picture, (height, width)).shape[1:]
        if self.most is not None:  # transformers, LlavaOnevisionModel.pack_image_features
            ratio = sqrt(rows * columns / (self.most * self.patches**2))
            if ratio > 1.1:
                rows, columns = int(rows // ratio), int(columns // ratio)
        return self.patches**2 + rows * (columns + 1)

    @property
    def frame_tokens(self) -> int:
        """Number of tokens of a frame of a video; the last one has the newline besides."""
        return ceil(self.patches / 2) ** 2

    def is_frame(self, tokens: int) -> bool:
        """Whether what has this many tokens is a frame of a video: images have more."""
        return self.single and tokens <= self.frame_tokens + 1

    def is_cut(self, tokens: int) -> bool:
        """Whether an image that has this many tokens is cut; no size of a cut image leads to the number of an uncut one."""
        return not self.single or not (tokens == self.uncut_tokens or self.is_frame(tokens))

    def count(self, size: tuple[int, int], tokens: int) -> int:
        """Number of tiles of an image of this (height, width) that has this many tokens, the whole image among them."""
        return image_size_to_num_patches(size, self.pinpoints, self.pixels) if self.is_cut(tokens) else 1


def next_tiles(config: PretrainedConfig) -> Tiles:
    """LLaVA-NeXT: every image is cut."""
    return _tiles(config, None, single=False)


def onevision_tiles(config: PretrainedConfig) -> Tiles:
    """LLaVA-OneVision: a single image is cut, into `vision_aspect_ratio` tiles at most."""
    return _tiles(config, int(config.vision_aspect_ratio.removeprefix("anyres_max_")), single=True)


def _tiles(config: PretrainedConfig, most: int | None, single: bool) -> Tiles:
    vision, pinpoints = config.vision_config, config.image_grid_pinpoints
    if (config.vision_feature_select_strategy == "default") != (vision.model_type == "clip_vision_model"):
        raise InputError(
            f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} of a {vision.model_type} leaves no square of features, "
            'which tiles need; expected "default" with CLIP and "full" with other towers'
        )
    if any(side % vision.image_size for resolution in pinpoints for side in resolution):
        raise InputError(f"image_grid_pinpoints: expected multiples of the tower's image_size, {vision.image_size}; got {pinpoints}")
    return Tiles([list(resolution) for resolution in pinpoints], vision.image_size, vision.image_size // vision.patch_size, most, single)


def choose_next_tiles(config: PretrainedConfig, image_aspect_ratio: str | None) -> None:
    """LLaVA-NeXT knows `anyres` only.

    Raises:
        InputError: another way was asked for.
    """
    if image_aspect_ratio not in (None, "anyres"):
        raise InputError(_refusal(config, image_aspect_ratio, "it always cuts images, into as many tiles as its resolutions have", "anyres"))


def choose_onevision_tiles(config: PretrainedConfig, image_aspect_ratio: str | None) -> None:
    """Writes the largest number of tiles into `vision_aspect_ratio`, where transformers reads it; `anyres` is what no resolution exceeds.

    Args:
        image_aspect_ratio: None keeps the configuration's own.

    Raises:
        InputError: another way was asked for.
    """
    wanted = image_aspect_ratio or config.vision_aspect_ratio
    if wanted == "anyres":
        area = max(height * width for height, width in config.image_grid_pinpoints)
        wanted = f"anyres_max_{area // config.vision_config.image_size**2}"
    if not re.fullmatch(r"anyres_max_[1-9]\d*", wanted):
        raise InputError(_refusal(config, wanted, "it always cuts a row's single image", "anyres or anyres_max_N"))
    config.vision_aspect_ratio = wanted


def _refusal(config: PretrainedConfig, image_aspect_ratio: str | None, reason: str, expected: str) -> str:
    return (
        f"image_aspect_ratio: {image_aspect_ratio!r} does not go with model_type {config.model_type!r}: {reason}, and so do the tools "
        f"that will read what is saved; expected {expected}"
    )
