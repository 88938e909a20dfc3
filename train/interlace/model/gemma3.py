"""Gemma 3: every image is one square of one size, squares of whose features are averaged to one token; its tokens attend to each other in both directions."""

from collections.abc import Sequence
from functools import cached_property
from math import isqrt
from typing import Any

import PIL.Image
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BaseImageProcessor, PretrainedConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

from interlace.errors import InputError
from interlace.model.images import Images

Grids = Sequence[tuple[int, int]]
START, END = "<start_of_image>", "<end_of_image>"


class GemmaImages(Images):
    """`<start_of_image>` and `<end_of_image>` stand around an image's tokens; the line breaks around these are text, which the prompt style writes."""

    @property
    def settings(self) -> str:
        return f"{self.config.model_type} {self.config.mm_tokens_per_image}"

    def row_tokens(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        return [self.config.mm_tokens_per_image + 2] * len(sizes)

    def ids(self, tokens: int) -> Sequence[int]:
        start, end = self._around
        return [start, *[self.config.image_token_id] * (tokens - 2), end]

    @cached_property
    def _around(self) -> tuple[int, int]:
        return self.id_of(START), self.id_of(END)

    @property
    def text(self) -> str:
        return START

    def pixels(self, images: Sequence[PIL.Image.Image], image_tokens: Sequence[int] | None) -> torch.Tensor:
        return self.processed(list(images))

    def generation_inputs(self, rows: Sequence[Sequence[PIL.Image.Image]], input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        pixels = self.pixels([image for row in rows for image in row], None)
        return {"pixel_values": pixels, "token_type_ids": (input_ids == self.config.image_token_id).long()}


def check_gemma3(config: PretrainedConfig, image_aspect_ratio: str | None) -> None:
    """See `Family.check`."""
    text, vision = config.get_text_config(), config.vision_config
    side, patches = isqrt(config.mm_tokens_per_image), vision.image_size // vision.patch_size
    if side**2 != config.mm_tokens_per_image or patches % side:
        raise InputError(f"mm_tokens_per_image: {config.mm_tokens_per_image} tokens are no square that {patches} x {patches} patches can be averaged to")
    if text.use_bidirectional_attention:
        raise InputError("use_bidirectional_attention: in this model the text attends in both directions, so it cannot learn to answer; expected false")
    if config.image_token_id >= text.vocab_size:
        raise InputError(f"image_token_index {config.image_token_id} is outside the vocabulary of {text.vocab_size}; config.json is of another model")


def gemma3_image_processor(image_processor: Any, config: PretrainedConfig, image_aspect_ratio: str | None) -> BaseImageProcessor:
    """See `Family.image_processor`."""
    if image_aspect_ratio not in (None, "squash"):
        raise InputError(
            f"image_aspect_ratio: {image_aspect_ratio!r} does not go with model_type {config.model_type!r}: it stretches images to its square; expected squash"
        )
    if image_processor.do_pan_and_scan:
        raise InputError(
            "do_pan_and_scan in preprocessor_config.json: crops beside the whole image, with words of their own in the prompt, are not supported; set it to "
            "false, as in the published models"
        )
    return image_processor  # type: ignore[no-any-return]


def gemma3_features(config: PretrainedConfig, tower: Any, pixel_values: torch.Tensor, grids: Grids) -> torch.Tensor:
    """See `Family.features`: means of squares of features. It is the part of the projector that has no weights, so it need not be done more than once."""
    features = tower(pixel_values, return_dict=True).last_hidden_state
    side = isqrt(features.shape[1])
    squares = features.transpose(1, 2).unflatten(2, (side, side)).contiguous()
    return F.avg_pool2d(squares, side // isqrt(config.mm_tokens_per_image)).flatten(2).transpose(1, 2)


def gemma3_project(model: Any, features: torch.Tensor) -> torch.Tensor:
    """See `Family.project`: the projector without its averages. It is called as a whole, since engines that slice weights gather them around that call."""
    called = model.multi_modal_projector
    projectors: list[Any] = [
        module for module in called.modules() if isinstance(module, Gemma3MultiModalProjector)
    ]  # beside an adapter two, a frozen and a learning one
    averages, patches = projectors[0].avg_pool, projectors[0].patches_per_image
    try:
        for projector in projectors:
            projector.avg_pool, projector.patches_per_image = nn.Identity(), isqrt(features.shape[1])
        projected: torch.Tensor = called(features)
    finally:
        for projector in projectors:
            projector.avg_pool, projector.patches_per_image = averages, patches
    return projected


def image_tokens(config: PretrainedConfig) -> int:
    """See `Family.tokens_per_tile`."""
    tokens: int = config.mm_tokens_per_image
    return tokens


def gemma3_width(config: PretrainedConfig) -> int:
    """See `Family.feature_width`."""
    width: int = config.vision_config.hidden_size
    return width


def unused_gemma3_parameters(config: PretrainedConfig, tower: nn.Module) -> list[str]:
    """See `Family.unused`: a head that pools the image to one vector."""
    return [name for name, _ in tower.named_parameters() if "head" in name.split(".")]


def gemma3_processor(config: PretrainedConfig) -> dict[str, Any]:
    """Settings of `Gemma3Processor`, which asks the tokenizer for its image tokens."""
    return {"image_seq_length": config.mm_tokens_per_image, "image_token": None}
