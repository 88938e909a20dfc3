"""What stands between files and the model: tokenizer, template, and images as the model takes them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import PIL.Image
import torch
from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedTokenizerBase

from interlace.data.batch import Collator, FindFeatures
from interlace.data.lengths import VideoTokens
from interlace.data.template import ChatTemplate
from interlace.model.families import family_of
from interlace.model.images import Images


@dataclass(frozen=True)
class Processing:
    """What turns text and images into model inputs; prompt_note: see `difference`, "" where the form of prompts was chosen or kept with the model."""

    tokenizer: PreTrainedTokenizerBase
    image_processor: BaseImageProcessor
    template: ChatTemplate
    config: PretrainedConfig
    prompt_note: str = ""

    @cached_property
    def images(self) -> Images:
        """How images become tokens and pixel values."""
        return family_of(self.config).images(self.config, self.image_processor, self.tokenizer)

    def row_image_tokens(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Number of tokens of each image of one row, from their (width, height).

        Raises:
            BadRow: an image that the model cannot take.
        """
        return self.images.row_tokens(sizes)

    @property
    def video_tokens(self) -> VideoTokens | None:
        """Number of frames of a video -> number of tokens of each, if the model sees it as one medium; None: its frames are images."""
        return None if self.images.video_token_id is None else self.images.video_tokens

    @property
    def image_settings(self) -> str:
        """Names what the numbers of image tokens depend on."""
        return self.images.settings

    def process_images(self, images: Sequence[PIL.Image.Image], image_tokens: Sequence[int] | None = None) -> torch.Tensor:
        """RGB images -> pixel values of all tiles, float32: the tiles of each image one behind the other.

        Args:
            image_tokens: the number of tokens counted for each image, which says how it is cut; None: each image whole.

        Raises:
            BadRow: an image of another size than its tokens were counted for.
        """
        return self.images.pixels(images, image_tokens)

    def generation_inputs(self, rows: Sequence[Sequence[PIL.Image.Image]], input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """What `generate` takes of the images of some rows, beside their (rows, length) ids; nothing if there are none."""
        return self.images.generation_inputs(rows, input_ids) if any(rows) else {}

    def collator(self, share_prefix: bool = False, features: FindFeatures | None = None) -> Collator:
        """What makes batches of rows; see there."""
        images = self.images
        grid = images.grid if images.has_grids else None
        return Collator(self.process_images, self.config.image_token_id, share_prefix, features, images.ids, grid, images.video_token_id)

    def processor_settings(self) -> dict[str, Any]:
        """The contents of `processor_config.json`, which tell transformers how to count image tokens."""
        family = family_of(self.config)
        settings = {"image_token": self.tokenizer.convert_ids_to_tokens(self.config.image_token_id), "video_token": self.template.video_text}
        settings |= {"processor_class": family.processor, **family.processor_settings(self.config)}
        return {name: value for name, value in settings.items() if value is not None}
