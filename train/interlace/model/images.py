"""How a model's images become tokens and pixel values: what all families have in common."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import PIL.Image
import torch
from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedTokenizerBase

from interlace.data.sample import BadRow
from interlace.errors import InputError


class Images(ABC):
    """The images of one model, from their sizes alone wherever that is enough.

    Args:
        config: of the model. image_processor: its own. tokenizer: knows what stands around an image.
    """

    def __init__(self, config: PretrainedConfig, image_processor: BaseImageProcessor, tokenizer: PreTrainedTokenizerBase):
        self.config, self.image_processor, self.tokenizer = config, image_processor, tokenizer

    @property
    @abstractmethod
    def settings(self) -> str:
        """Names what the numbers of image tokens depend on."""

    @abstractmethod
    def row_tokens(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Number of tokens of each image of one row, from their (width, height): all that stands in `ids`.

        Raises:
            BadRow: an image that the model cannot take.
        """

    @abstractmethod
    def pixels(self, images: Sequence[PIL.Image.Image], image_tokens: Sequence[int] | None) -> torch.Tensor:
        """See `Processing.process_images`."""

    @abstractmethod
    def generation_inputs(self, rows: Sequence[Sequence[PIL.Image.Image]], input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `Processing.generation_inputs`; there is an image at least."""

    def ids(self, tokens: int) -> Sequence[int]:
        """The ids of an image of this many tokens."""
        return [self.config.image_token_id] * tokens

    @property
    def video_token_id(self) -> int | None:
        """The id of a video's tokens, of a model that sees it as one medium; None: its frames are images."""
        return None

    def video_tokens(self, num_frames: int) -> list[int]:
        """Number of tokens of each frame of a video, where there is a `video_token_id`."""
        raise NotImplementedError(f"{type(self).__name__} sees frames as images")

    def videos(self, image_tokens: Sequence[int]) -> list[range]:
        """Which images of a row are the frames of a video that the model sees as one medium: their numbers of tokens tell."""
        return []

    @property
    def filled_ids(self) -> list[int]:
        """The ids that features fill."""
        return [self.config.image_token_id, *([] if self.video_token_id is None else [self.video_token_id])]

    @property
    def text(self) -> str:
        """What a chat template writes for an image, from which the model's processor makes all of `ids`."""
        return str(self.tokenizer.convert_ids_to_tokens(self.config.image_token_id))

    @property
    def has_grids(self) -> bool:
        """Whether the positions of tokens tell rows and columns in an image."""
        return False

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the tokens of an image of this (height, width)."""
        raise NotImplementedError(f"{type(self).__name__} has no grids")

    def bound(self, min_pixels: int | None, max_pixels: int | None) -> None:
        """Makes images grow to `min_pixels` and shrink to `max_pixels`; None leaves a bound as it is.

        Raises:
            InputError: the model takes images in sizes of its own, or no image could be within these bounds.
        """
        if min_pixels or max_pixels:
            raise InputError(
                f"min_pixels and max_pixels do not go with model_type {self.config.model_type!r}, which resizes images to sizes of its own; leave them out "
                "(image_aspect_ratio chooses among its ways)"
            )

    def picture(self, pixel_values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """The pixel values of one image of this (width, height) -> (channels, height, width), all of it as far as the model sees it: the first tile."""
        return pixel_values[0]

    def id_of(self, token: str) -> int:
        """The id of a control token that stands in or around images.

        Raises:
            InputError: the tokenizer has none.
        """
        known: dict[str, int] = self.tokenizer.get_added_vocab()
        if token not in known:
            raise InputError(f"the tokenizer has no {token!r}, which stands around images of a {self.config.model_type}; expected the model's own tokenizer")
        return known[token]

    def _changed(self, image: PIL.Image.Image, tokens: int) -> BadRow:
        return BadRow("changed_image", f"an image of {image.width} x {image.height} pixels, and {tokens} tokens were counted for one of another size")

    @cached_property
    def _table(self) -> np.ndarray:
        """(3, 256): what the processor's arithmetic makes of each value that a pixel can have, per channel."""
        settings: Any = self.image_processor
        values = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
        table: np.ndarray = settings.normalize(settings.rescale(values, settings.rescale_factor), settings.image_mean, settings.image_std)
        return table[:, 0]

    def processed(self, images: list[PIL.Image.Image], image_processor: BaseImageProcessor | None = None, **options: Any) -> torch.Tensor:
        """`pixel_values` (.., channels, height, width) as the processor gives them. Its arithmetic on every pixel takes half of the time, so it is done once
        for each of the 256 values a pixel can have.

        Args:
            image_processor: another one than the model's own, with the same arithmetic.
        """
        settings: Any = image_processor or self.image_processor
        if not (settings.do_rescale and settings.do_normalize):
            found: torch.Tensor = settings(images=images, return_tensors="pt", **options)["pixel_values"]
            return found
        pixels = settings(images=images, do_rescale=False, do_normalize=False, return_tensors="np", **options)["pixel_values"]
        assert pixels.dtype == np.uint8
        return torch.from_numpy(np.stack([self._table[channel].take(pixels[..., channel, :, :]) for channel in range(3)], axis=-3))
