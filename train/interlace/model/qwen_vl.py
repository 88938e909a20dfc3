"""The Qwen-VL families: images keep their shape, in patches whose groups of 2 x 2 become one token each; positions tell time, row and column.

A tile is one such group: its patches' pixels go into the tower, the hidden states of its patches come out, one behind the other. The tower runs on all images
of a batch at once; the projector ("merger"), which is a part of the tower's module, makes a token of each group.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import nn
from transformers import BaseImageProcessor, PretrainedConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from interlace.data.sample import BadRow
from interlace.errors import InputError
from interlace.model.images import Images

Grids = Sequence[tuple[int, int]]


class QwenImages(Images):
    """An image is resized to whole groups of patches, within the processor's bounds on its pixels; `<|vision_start|>` and `<|vision_end|>` stand around it."""

    @property
    def settings(self) -> str:
        processor: Any = self.image_processor
        return f"{self.config.model_type} {processor.patch_size} {processor.merge_size} {processor.size['shortest_edge']} {processor.size['longest_edge']}"

    @property
    def has_grids(self) -> bool:
        return True

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        processor: Any = self.image_processor
        side = processor.patch_size * processor.merge_size
        height, width = smart_resize(*size, side, processor.size["shortest_edge"], processor.size["longest_edge"])
        return height // side, width // side

    def bound(self, min_pixels: int | None, max_pixels: int | None) -> None:
        processor: Any = self.image_processor
        least, most = min_pixels or processor.size["shortest_edge"], max_pixels or processor.size["longest_edge"]
        token = (processor.patch_size * processor.merge_size) ** 2
        if not max(least, token) <= most:
            raise InputError(f"min_pixels {least:,} and max_pixels {most:,}: expected the second to be no less than the first and {token}, which are one token")
        processor.size = {"shortest_edge": least, "longest_edge": most}

    def row_tokens(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        return [self._tokens(*size) for size in sizes]

    def _tokens(self, width: int, height: int) -> int:
        try:
            rows, columns = self.grid((height, width))
        except ValueError as error:  # more than 200 times as long as wide
            raise BadRow("bad_image", f"an image of {width} x {height} pixels, which the model's processor refuses: {error}") from None
        return rows * columns + 2

    def ids(self, tokens: int) -> Sequence[int]:
        config = self.config
        return [config.vision_start_token_id, *[config.image_token_id] * (tokens - 2), config.vision_end_token_id]

    @property
    def text(self) -> str:
        start, end = (self.tokenizer.convert_ids_to_tokens(number) for number in (self.config.vision_start_token_id, self.config.vision_end_token_id))
        return f"{start}{super().text}{end}"

    def pixels(self, images: Sequence[PIL.Image.Image], image_tokens: Sequence[int] | None) -> torch.Tensor:
        for image, tokens in zip(images, image_tokens or (), strict=False):
            if tokens != self._tokens(*image.size):
                raise self._changed(image, tokens)
        pixels: torch.Tensor = self.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        processor: Any = self.image_processor
        return pixels.unflatten(0, (-1, processor.merge_size**2))

    def generation_inputs(self, rows: Sequence[Sequence[PIL.Image.Image]], input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        images = [image for row in rows for image in row]
        grids = [self.grid((image.height, image.width)) for image in images]
        return {
            "pixel_values": self.pixels(images, None).flatten(0, 1),
            "image_grid_thw": in_patches(self.config, grids),
            "mm_token_type_ids": (input_ids == self.config.image_token_id).int(),
        }

    def picture(self, pixel_values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        processor: Any = self.image_processor
        rows, columns = self.grid((size[1], size[0]))
        merge, side = processor.merge_size, processor.patch_size
        patches = pixel_values.reshape(rows, columns, merge, merge, 3, processor.temporal_patch_size, side, side)[:, :, :, :, :, 0]
        return patches.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * merge * side, columns * merge * side)


def check_qwen(config: PretrainedConfig, image_aspect_ratio: str | None) -> None:
    """See `Family.check`."""
    if image_aspect_ratio is not None:
        raise InputError(
            f"image_aspect_ratio: {image_aspect_ratio!r} does not go with model_type {config.model_type!r}: it takes every image in its own shape; "
            "leave it out (min_pixels and max_pixels say how many pixels an image keeps)"
        )


def qwen_image_processor(image_processor: BaseImageProcessor, config: PretrainedConfig, image_aspect_ratio: str | None) -> BaseImageProcessor:
    """See `Family.image_processor`."""
    vision, processor = config.vision_config, image_processor
    sizes = [(getattr(processor, "patch_size", None), getattr(processor, "merge_size", None)), (vision.patch_size, vision.spatial_merge_size)]
    if sizes[0] != sizes[1]:
        raise InputError(f"the image processor cuts patches of {sizes[0]} (pixels, patches merged), the model wants {sizes[1]}; expected the same in both")
    return image_processor


def in_patches(config: PretrainedConfig, grids: Grids) -> torch.Tensor:
    """(images, 3): `image_grid_thw` of transformers, from rows and columns of tokens."""
    merge = config.vision_config.spatial_merge_size
    return torch.tensor([(1, rows * merge, columns * merge) for rows, columns in grids])


def qwen2_features(config: PretrainedConfig, tower: Any, pixel_values: torch.Tensor, grids: Grids) -> torch.Tensor:
    """See `Family.features`: the hidden states of each group's patches behind the last block."""
    return _features(config, tower, pixel_values, grids, {})[0]


def qwen2_5_features(config: PretrainedConfig, tower: Any, pixel_values: torch.Tensor, grids: Grids) -> torch.Tensor:
    """The same; most blocks attend within windows."""
    vision = config.vision_config
    side, group = vision.window_size // vision.spatial_merge_size // vision.patch_size, vision.spatial_merge_size**2
    windows = [_windows(*grid, side) for grid in grids]
    starts = np.cumsum([0, *(len(numbers) for numbers in windows[:-1])])
    order = np.concatenate([start + np.argsort(numbers, kind="stable") for start, numbers in zip(starts, windows, strict=True)])
    ends = _ends(group * np.concatenate([np.bincount(numbers) for numbers in windows]))
    return _features(config, tower, pixel_values, grids, {"window_index": torch.tensor(order, device=pixel_values.device), "cu_window_seqlens": ends})[0]


def qwen3_features(config: PretrainedConfig, tower: Any, pixel_values: torch.Tensor, grids: Grids) -> torch.Tensor:
    """The same, and behind them the hidden states behind the blocks of `deepstack_visual_indexes`."""
    vision = config.vision_config
    side, merge = math.isqrt(vision.num_position_embeddings), vision.spatial_merge_size
    between = [_between(_patches(rows, columns, merge), (rows * merge, columns * merge), side) for rows, columns in grids]
    indices, weights = (torch.tensor(np.concatenate(values), device=pixel_values.device) for values in zip(*between, strict=True))
    known = {"interp_indices": indices, "interp_weights": weights}
    last, output = _features(config, tower, pixel_values, grids, known, len(vision.deepstack_visual_indexes))
    return torch.cat([last, *(features[:, None] for features in output.deepstack_features)], dim=-1)


def _features(
    config: PretrainedConfig, tower: Any, pixel_values: torch.Tensor, grids: Grids, known: dict[str, Any], num_deeper: int = 0
) -> tuple[torch.Tensor, Any]:
    """(tiles, 1, width), and all that the tower gives.

    What depends on the grids alone is handed to it. Where images end is no tensor: the attention asks for it in every block, which would wait for a GPU
    each time.
    """
    merge = config.vision_config.spatial_merge_size
    places = np.concatenate([_patches(rows, columns, merge) for rows, columns in grids])
    known |= {"position_ids": torch.tensor(places, device=pixel_values.device), "cu_seqlens": _ends(np.prod(grids, axis=1) * merge**2)}
    with _unmerged(tower, merge**2, num_deeper):
        output = tower(pixel_values.flatten(0, 1), grid_thw=in_patches(config, grids), return_dict=True, **known)
    return output.pooler_output[:, None], output


def _patches(rows: int, columns: int, merge: int) -> np.ndarray:
    """(patches, 2): row and column of each patch of an image of so many groups, group after group."""
    of_rows = merge * np.arange(rows)[:, None, None, None] + np.arange(merge)[:, None]
    of_columns = merge * np.arange(columns)[:, None, None] + np.arange(merge)
    return np.stack(np.broadcast_arrays(of_rows, of_columns), axis=-1).reshape(-1, 2)


def _windows(rows: int, columns: int, side: int) -> np.ndarray:
    """(groups,): the number of the window that each group of an image lies in."""
    across = -(-columns // side)
    numbers: np.ndarray = (np.arange(rows)[:, None] // side * across + np.arange(columns) // side).ravel()
    return numbers


def _between(places: np.ndarray, size: tuple[int, int], side: int) -> tuple[np.ndarray, np.ndarray]:
    """Which 4 of the (side, side) learned positions each patch lies between when they are spread over the image, and the weight of each; (patches, 4) both."""
    wanted = places.astype(np.float32) * (side - 1) / np.maximum(np.array(size) - 1, 1).astype(np.float32)
    first = np.floor(wanted).astype(np.int64)
    around = np.clip(first[..., None] + np.arange(2), 0, side - 1)  # (patches, 2, 2)
    shares = np.stack([1 - (wanted - first), wanted - first], axis=-1)
    indices = around[:, 0, :, None] * side + around[:, 1, None, :]
    weights = shares[:, 0, :, None] * shares[:, 1, None, :]
    return indices.reshape(-1, 4), weights.reshape(-1, 4).astype(np.float32)


def _ends(lengths: np.ndarray) -> np.ndarray:
    """(runs + 1,): where each run begins and the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths)])


class _Grouped(nn.Module):
    """(patches, width) -> (groups, width of all patches of a group): in the place of a merger."""

    def __init__(self, patches: int):
        super().__init__()
        self.patches = patches

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.view(-1, self.patches * hidden_states.shape[-1])


@contextmanager
def _unmerged(tower: Any, patches: int, num_deeper: int) -> Iterator[None]:
    """The tower without its mergers, the last one and those of DeepStack: they belong to the projector, which may learn where the tower is frozen."""
    groups: dict[str, nn.Module] = {"merger": _Grouped(patches)}
    if num_deeper:
        groups["deepstack_merger_list"] = nn.ModuleList(_Grouped(patches) for _ in range(num_deeper))
    mergers = {name: getattr(tower, name) for name in groups}
    try:
        for name, module in groups.items():
            setattr(tower, name, module)
        yield
    finally:
        for name, module in mergers.items():
            setattr(tower, name, module)


def qwen_project(model: Any, features: torch.Tensor) -> torch.Tensor:
    """See `Family.project`."""
    patches = model.config.vision_config.spatial_merge_size**2
    projected: torch.Tensor = model.visual.merger(features.reshape(patches * len(features), -1))
    return projected[:, None]


def qwen3_project(model: Any, features: torch.Tensor) -> torch.Tensor:
    """See `Family.project`: what enters with the tokens, then what is added behind each of the first layers (DeepStack, arXiv 2406.04334)."""
    mergers, patches = [model.visual.merger, *model.visual.deepstack_merger_list], model.config.vision_config.spatial_merge_size**2
    parts = [part.reshape(patches * len(features), -1) for part in features.chunk(len(mergers), dim=-1)]
    return torch.cat([merger(part) for merger, part in zip(mergers, parts, strict=True)], dim=-1)[:, None]


def one_token(config: PretrainedConfig) -> int:
    """See `Family.tokens_per_tile`."""
    return 1


def a_tile_per_token(config: PretrainedConfig, size: tuple[int, int], tokens: int) -> int:
    """See `Family.num_tiles`."""
    return tokens


def qwen2_width(config: PretrainedConfig) -> int:
    """See `Family.feature_width`."""
    vision = config.vision_config
    width: int = vision.embed_dim * vision.spatial_merge_size**2
    return width


def qwen2_5_width(config: PretrainedConfig) -> int:
    """See `Family.feature_width`."""
    vision = config.vision_config
    width: int = vision.hidden_size * vision.spatial_merge_size**2
    return width


def qwen3_width(config: PretrainedConfig) -> int:
    """See `Family.feature_width`."""
    return qwen2_5_width(config) * (1 + len(config.vision_config.deepstack_visual_indexes))


def qwen_tile(config: PretrainedConfig) -> tuple[int, ...]:
    """See `Family.tile_shape`."""
    vision = config.vision_config
    return vision.spatial_merge_size**2, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2


def qwen_settings(config: PretrainedConfig) -> str:
    """See `Family.feature_settings`: the weights and the image processor say it all."""
    return ""


def no_parameters(config: PretrainedConfig, tower: nn.Module) -> list[str]:
    """See `Family.unused`."""
    return []


def no_settings(config: PretrainedConfig) -> dict[str, Any]:
    """See `Family.processor_settings`."""
    return {}


def group_patches(config: PretrainedConfig) -> int:
    """See `Tower.patches`."""
    patches: int = config.vision_config.spatial_merge_size**2
    return patches


def qwen2_tower_width(config: PretrainedConfig) -> int:
    """See `Tower.width`."""
    width: int = config.vision_config.embed_dim
    return width


def qwen2_5_tower_width(config: PretrainedConfig) -> int:
    """See `Tower.width`."""
    width: int = config.vision_config.hidden_size
    return width


def attends_to_image(config: PretrainedConfig, block: int) -> int | None:
    """See `Tower.attended`."""
    return None


def attends_to_windows(config: PretrainedConfig, block: int) -> int | None:
    """See `Tower.attended`; windows at an image's edge are smaller."""
    vision = config.vision_config
    return None if block in vision.fullatt_block_indexes else (vision.window_size // vision.patch_size) ** 2
