"""SmolVLM, and Idefics 3 before it: an image is enlarged to whole tiles, each behind its row and column, and comes once more in one last tile."""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import PIL.Image
import torch
from transformers import BaseImageProcessor, PretrainedConfig
from transformers.models.smolvlm.image_processing_pil_smolvlm import get_resize_output_image_size

from interlace.errors import InputError
from interlace.model.images import Images
from interlace.model.internvl import side_by_side

Grids = Sequence[tuple[int, int]]
AROUND, WHOLE = "<fake_token_around_image>", "<global-img>"


class SmolImages(Images):
    """Before each tile `<fake_token_around_image>` and where it lies, behind each row a line break; the whole image's tile ends with the former."""

    @property
    def settings(self) -> str:
        processor: Any = self.image_processor
        return f"{self.config.model_type} {tile_tokens(self.config)} {processor.size} {processor.max_image_size} {processor.do_image_splitting}"

    def _rows_and_columns(self, width: int, height: int) -> tuple[int, int]:
        """Of the tiles beside the whole image; (0, 0) if there are none."""
        processor: Any = self.image_processor
        if not processor.do_image_splitting:
            return 0, 0
        side = processor.max_image_size["longest_edge"]
        height, width = get_resize_output_image_size(np.empty((0, height, width)), processor.size["longest_edge"])  # only its shape is wanted
        ratio = width / height  # then as the processor's resize_for_vision_encoder
        if width >= height:
            columns = math.ceil(width / side)
            rows = math.ceil(int(columns * side / ratio) / side)
        else:
            rows = math.ceil(height / side)
            columns = math.ceil(int(rows * side * ratio) / side)
        return (rows, columns) if max(rows, columns) > 1 else (0, 0)

    def row_tokens(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        return [len(self._ids(*self._rows_and_columns(*size))) for size in sizes]

    def ids(self, tokens: int) -> Sequence[int]:
        return self._layouts[tokens]

    @cached_property
    def _layouts(self) -> dict[int, list[int]]:
        """Number of tokens -> ids. The line breaks behind the rows tell apart what has as many tiles."""
        processor: Any = self.image_processor
        most = math.ceil(processor.size["longest_edge"] / processor.max_image_size["longest_edge"])
        shapes = [(0, 0), *((rows, columns) for rows in range(1, most + 1) for columns in range(1, most + 1) if rows * columns > 1)]
        layouts = {len(ids): ids for ids in (self._ids(*shape) for shape in shapes)}
        assert len(layouts) == len(shapes)
        return layouts

    def _ids(self, rows: int, columns: int) -> list[int]:
        tile = [self.config.image_token_id] * tile_tokens(self.config)
        ids: list[int] = []
        for row in range(1, rows + 1):
            for column in range(1, columns + 1):
                ids += [self.id_of(AROUND), *self._text_ids(f"<row_{row}_col_{column}>"), *tile]
            ids += self._text_ids("\n\n" if row == rows else "\n")
        return [*ids, self.id_of(AROUND), *self._text_ids(WHOLE), *tile, self.id_of(AROUND)]

    def _text_ids(self, text: str) -> list[int]:
        """What stands between control tokens: one token itself, or plain text to a tokenizer that does not know it (SmolVLM-Instruct's)."""
        if text not in self._known:
            self._known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._known[text]

    @cached_property
    def _known(self) -> dict[str, list[int]]:
        return {}

    def pixels(self, images: Sequence[PIL.Image.Image], image_tokens: Sequence[int] | None) -> torch.Tensor:
        if image_tokens is None:
            return torch.cat([self._tiles(image, do_image_splitting=False) for image in images])
        for image, tokens in zip(images, image_tokens, strict=True):
            if [tokens] != self.row_tokens([image.size]):
                raise self._changed(image, tokens)
        return torch.cat([self._tiles(image) for image in images])

    def _tiles(self, image: PIL.Image.Image, **options: Any) -> torch.Tensor:
        found: torch.Tensor = self.image_processor(images=[image], return_tensors="pt", **options)["pixel_values"][0]
        return found

    def generation_inputs(self, rows: Sequence[Sequence[PIL.Image.Image]], input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        images = [image for row in rows for image in row]
        return {"pixel_values": self.pixels(images, self.row_tokens([image.size for image in images]))[None]}

    def picture(self, pixel_values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return pixel_values[-1]


def check_smolvlm(config: PretrainedConfig, image_aspect_ratio: str | None) -> None:
    """See `Family.check`."""


def smolvlm_image_processor(image_processor: Any, config: PretrainedConfig, image_aspect_ratio: str | None) -> BaseImageProcessor:
    """See `Family.image_processor`."""
    if image_aspect_ratio not in (None, "squash", "anyres"):
        raise InputError(
            f"image_aspect_ratio: {image_aspect_ratio!r} does not go with model_type {config.model_type!r}: it stretches images to tiles; expected squash "
            "(one tile) or anyres (as its preprocessor_config.json says)"
        )
    if image_aspect_ratio is not None:
        image_processor.do_image_splitting = image_aspect_ratio == "anyres"
    return image_processor  # type: ignore[no-any-return]


def smolvlm_features(config: PretrainedConfig, tower: Any, pixel_values: torch.Tensor, grids: Grids) -> torch.Tensor:
    """See `Family.features`: squares of features side by side in one."""
    return side_by_side(tower(pixel_values, return_dict=True).last_hidden_state, config.scale_factor)


def smolvlm_project(model: Any, features: torch.Tensor) -> torch.Tensor:
    """See `Family.project`: the connector, whose other half has no weights and is a part of `smolvlm_features`."""
    projected: torch.Tensor = model.connector.modality_projection(features)
    return projected


def tile_tokens(config: PretrainedConfig) -> int:
    """See `Family.tokens_per_tile`."""
    vision = config.vision_config
    tokens: int = (vision.image_size // vision.patch_size) ** 2 // config.scale_factor**2
    return tokens


def num_tiles(config: PretrainedConfig, size: tuple[int, int], tokens: int) -> int:
    """See `Family.num_tiles`."""
    return tokens // tile_tokens(config)


def smolvlm_width(config: PretrainedConfig) -> int:
    """See `Family.feature_width`."""
    width: int = config.vision_config.hidden_size * config.scale_factor**2
    return width


def smolvlm_processor(config: PretrainedConfig) -> dict[str, Any]:
    """Settings of `SmolVLMProcessor` and `Idefics3Processor`, which know their image token themselves: transformers 4 stops at it."""
    return {"image_seq_len": tile_tokens(config), "image_token": None}
