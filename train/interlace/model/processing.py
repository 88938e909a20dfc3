"""What stands between files and the model: tokenizer, template, and images as the model takes them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import PIL.Image
import torch
from transformers import BaseImageProcessor, LlavaImageProcessorPil, PretrainedConfig, PreTrainedTokenizerBase

from interlace.data.sample import BadRow
from interlace.data.template import ChatTemplate
from interlace.errors import InputError
from interlace.model.families import family_of
from interlace.model.tiles import Tiles


@dataclass(frozen=True)
class Processing:
    """What turns text and images into model inputs. `tokens_per_image` counts the tokens of one image, or of one tile."""

    tokenizer: PreTrainedTokenizerBase
    image_processor: BaseImageProcessor
    template: ChatTemplate
    config: PretrainedConfig
    tokens_per_image: int

    @cached_property
    def tiles(self) -> Tiles | None:
        """How images are cut into tiles; None if the model takes every image as one."""
        tiling = family_of(self.config).tiling
        return None if tiling is None else tiling.tiles(self.config)

    def row_image_tokens(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Number of tokens of each image of one row, from their (width, height)."""
        return [self.tokens_per_image] * len(sizes) if self.tiles is None else self.tiles.image_tokens(sizes)

    @property
    def image_settings(self) -> str:
        """Names what the numbers of image tokens depend on."""
        return f"{self.config.model_type} {self.tokens_per_image}" + ("" if self.tiles is None else f" {self.tiles}")

    def process_images(self, images: Sequence[PIL.Image.Image], image_tokens: Sequence[int] | None = None) -> torch.Tensor:
        """RGB images -> (tiles, channels, height, width), float32: the tiles of each image one behind the other.

        Args:
            image_tokens: the number of tokens counted for each image, which says how it is cut; None: each image whole, in one tile.

        Raises:
            BadRow: an image of another size than its tokens were counted for.
        """
        if self.tiles is None:
            return self._pixels(self.image_processor, list(images))
        if image_tokens is None:
            return self._pixels(with_aspect_ratio(self.image_processor, "squash", self.config), list(images))
        return torch.cat([self._cut(image, tokens, self.tiles) for image, tokens in zip(images, image_tokens, strict=True)])

    def _cut(self, image: PIL.Image.Image, tokens: int, tiles: Tiles) -> torch.Tensor:
        if not tiles.is_cut(tokens):
            return self._pixels(self._padding, [image])
        if tokens != tiles.cut_tokens(*image.size):
            raise BadRow("changed_image", f"an image of {image.width} x {image.height} pixels, and {tokens} tokens were counted for one of another size")
        return self._pixels(self.image_processor, [image])[0]

    @cached_property
    def _padding(self) -> BaseImageProcessor:
        return with_aspect_ratio(self.image_processor, "pad", self.config)

    @staticmethod
    def _pixels(image_processor: BaseImageProcessor, images: list[PIL.Image.Image]) -> torch.Tensor:
        """What the processor gives. Its arithmetic on every pixel takes half of the time, so it is done once for each of the 256 values a pixel can have."""
        settings: Any = image_processor
        if not (settings.do_rescale and settings.do_normalize):
            return image_processor(images=images, return_tensors="pt")["pixel_values"]
        pixels = image_processor(images=images, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
        assert pixels.dtype == np.uint8
        values = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
        table = settings.normalize(settings.rescale(values, settings.rescale_factor), settings.image_mean, settings.image_std)
        return torch.from_numpy(np.stack([table[channel, 0].take(pixels[..., channel, :, :]) for channel in range(3)], axis=-3))

    def generation_inputs(self, rows: Sequence[Sequence[PIL.Image.Image]]) -> dict[str, torch.Tensor]:
        """What `generate` takes of the images of some rows, beside their ids; nothing if there are none."""
        images = [image for row in rows for image in row]
        if not images:
            return {}
        tokens = [count for row in rows for count in self.row_image_tokens([image.size for image in row])]
        inputs = {"pixel_values": self.process_images(images, tokens)}
        if self.tiles is not None:
            inputs["image_sizes"] = torch.tensor([(image.height, image.width) for image in images])
            if self.tiles.single:
                inputs["batch_num_images"] = torch.tensor([len(row) for row in rows])
        return inputs

    def processor_settings(self) -> dict[str, Any]:
        """The contents of `processor_config.json`, which tell transformers how to count image tokens."""
        family = family_of(self.config)
        return {
            "image_token": self.tokenizer.convert_ids_to_tokens(self.config.image_token_id),
            "processor_class": family.processor,
            "vision_feature_select_strategy": self.config.vision_feature_select_strategy,
            **family.processor_settings(self.config),
        }


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
