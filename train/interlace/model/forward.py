"""Packed batch -> log-probs of the supervised rows: vision once per distinct image, segment attention, `lm_head` on those rows only."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from interlace.data.batch import PackedBatch, Segment
from interlace.errors import InputError
from interlace.model.attention import Forest, runs_of, window_of
from interlace.model.attention_kernels import install
from interlace.model.families import family_of
from interlace.model.features import FeatureCache
from interlace.model.head import RowHead, RowScores
from interlace.model.last_layer import can_trim, trim


class ProjectorInTower(nn.Module):
    """What stays in a model whose vision tower is taken out, where the projector is a part of the tower's module: the projector, under its old name."""


class FrozenTower:
    """A vision tower that never trains, kept outside the module that is wrapped for distributed training.

    Args:
        model: a model of a known family; its tower is taken out of it.
    """

    def __init__(self, model: PreTrainedModel):
        self.family, self.config = family_of(model.config), model.config
        self.module: nn.Module = getattr(model.model, self.family.vision_tower)
        self.module.requires_grad_(False).eval()
        self.cache: FeatureCache | None = None
        self.detach_from(model)

    def detach_from(self, model: PreTrainedModel) -> None:
        """Takes the tower out of the model; `attach_to` undoes it."""
        names = self.family.projector_in_tower
        left = ProjectorInTower() if names else None
        for name in names:
            setattr(left, name, getattr(self.module, name))
            setattr(self.module, name, nn.Identity())
        setattr(model.model, self.family.vision_tower, left)

    def attach_to(self, model: PreTrainedModel) -> None:
        """Puts the tower back, for saving a complete model."""
        for name in self.family.projector_in_tower:
            setattr(self.module, name, model.get_submodule(f"model.{self.family.vision_tower}.{name}"))
        setattr(model.model, self.family.vision_tower, self.module)

    @property
    def feature_bytes(self) -> int:
        """Bytes of the features of a tile."""
        size = next(self.module.parameters()).element_size()
        return self.family.tokens_per_tile(self.config) * self.family.feature_width(self.config) * size

    def features_of(self, batch: PackedBatch) -> torch.Tensor | None:
        """(tiles, tokens, width) of a batch's distinct images, those that are cached as they are; None without images."""
        made = None if batch.pixel_values is None else self.features(batch.pixel_values, batch.new_grids)
        if not batch.feature_keys:
            return made
        is_new = [not cached for cached in batch.is_cached]
        counts = [self.family.num_tiles(self.config, *image) for image in zip(batch.image_sizes, batch.image_tokens, strict=True)]
        parts: list[Sequence[torch.Tensor]] = []  # the new ones, the cached ones
        for tensor, wanted in ((made, is_new), (batch.cached_features, batch.is_cached)):
            parts.append([] if tensor is None else tensor.split([count for count, is_wanted in zip(counts, wanted, strict=True) if is_wanted]))
        if self.cache is not None:
            self.cache.keep(list(compress(batch.feature_keys, is_new)), parts[0], list(compress(batch.image_sizes, is_new)))
        if batch.cached_features is None:
            return made
        new, cached = map(iter, parts)
        return torch.cat([next(new) if fresh else next(cached) for fresh in is_new])

    @torch.no_grad()
    def features(self, pixel_values: torch.Tensor, grids: Sequence[tuple[int, int]] = ()) -> torch.Tensor:
        """Pixel values of tiles -> (tiles, tokens, width) before the projector; no graph. grids: see `PackedBatch.image_grids`, of these images."""
        parameter = next(self.module.parameters())
        if parameter.device != pixel_values.device:
            self.module.to(pixel_values.device)
        return self.family.features(self.config, self.module, pixel_values.to(parameter.dtype), grids)


class OwnWeight(nn.Module):
    """A weight that another module holds and no layer uses, behind a call of its own: an engine that slices weights makes it whole for a module's call, in the
    backward pass too. (DeepSpeed finds weights that are used elsewhere by itself; but not again in the step after an evaluation.)"""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self) -> torch.Tensor:
        """A copy of the weight."""
        return self.weight.clone()


class PackedModel(nn.Module):
    """The part of a vision-language model that is wrapped for training: everything, except a frozen vision tower.

    Args:
        model: a Hugging Face model of a known family, with adapters injected if any; its tower may have been taken out.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.config = model.config
        self.family, self.head = family_of(model.config), RowHead()
        self.newline = None if self.family.tiling is None else OwnWeight(getattr(model.model, self.family.tiling.newline))
        self.use_attention("sdpa")
        last = self._layers[-1]
        added_behind = len(getattr(self.config.vision_config, "deepstack_visual_indexes", ()))  # to all tokens, so these layers stay whole
        self.is_trimmed = can_trim(last) and added_behind < len(self._layers)
        if self.is_trimmed:
            trim(last)
        # layers that FSDP takes as its units, of those that are still in here
        present = {type(module).__name__ for module in model.modules()}
        self._no_split_modules = [name for name in model._no_split_modules or () if name in present]

    def use_attention(self, backend: str) -> None:
        """Chooses how the language model's segments attend; see `attention_kernels.choose`.

        Raises:
            InputError: the language model does more to the scores of attention than any backend does.
        """
        if getattr(self.config.get_text_config(), "attn_logit_softcapping", None) is not None:
            raise InputError("attn_logit_softcapping: the scores of this language model are capped, which packed attention does not do; it cannot be trained")
        self.model.set_attn_implementation({"text_config": install(backend), "vision_config": "sdpa"})

    @property
    def window(self) -> int | None:
        """How many tokens layers with a sliding window attend to; None where all layers see all. A configuration has one for all of them."""
        return next((window for layer in self._layers if (window := window_of(layer.self_attn)) is not None), None)

    @property
    def tower(self) -> nn.Module | None:
        """The vision tower, if it is part of this module."""
        found: nn.Module | None = getattr(self.model.model, self.family.vision_tower)
        return None if isinstance(found, ProjectorInTower) else found

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        """Recomputes the language model's activations in the backward pass; called by the Trainer. Never touches a frozen tower."""
        language_model = getattr(self.model.model, self.family.language_model)
        language_model.activation_checkpointing_enable(activation_checkpointing_kwargs=activation_checkpointing_kwargs or {"use_reentrant": False})

    def checkpoint_tower(self) -> None:
        """Recomputes the vision tower's activations in the backward pass, if it trains."""
        if self.tower is not None:
            self.tower.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        segments: Sequence[Segment],
        rows: torch.Tensor,
        row_index: torch.Tensor,
        targets: torch.Tensor,
        image_index: torch.Tensor,
        image_positions: torch.Tensor,
        image_sizes: Sequence[tuple[int, int]] = (),
        image_tokens: Sequence[int] = (),
        image_grids: Sequence[tuple[int, int]] = (),
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        with_statistics: bool = False,
    ) -> RowScores:
        """Scores the supervised rows of one `PackedBatch` (its fields; see there for shapes).

        Args:
            image_features: (tiles, tokens, vision width) from a frozen tower, in place of `pixel_values`.
            with_statistics: see `RowScores`.
        """
        embeddings = self.model.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            image_features = self._tower_features(pixel_values, image_grids)
        deeper: list[torch.Tensor] = []
        if image_features is None:
            embeddings = embeddings + self._nothing(embeddings)
        else:
            filled = self._image_rows(image_features, image_index, len(image_positions), image_sizes, image_tokens)
            first, *deeper = filled.split(embeddings.shape[-1], dim=-1)
            embeddings = embeddings.index_copy(1, image_positions, first[None].to(embeddings.dtype))
        language_model = getattr(self.model.model, self.family.language_model)
        image_of = runs_of(image_positions, embeddings.shape[1]) if self.family.sees_whole_images and len(image_positions) else None
        forest = Forest(segments, embeddings.device, rows if self.is_trimmed else None, image_of=image_of)
        with _added_behind(self._layers, deeper, image_positions):
            output = language_model(inputs_embeds=embeddings, position_ids=position_ids, attention_mask=None, use_cache=False, segments=forest)
        hidden = output.last_hidden_state[0] if self.is_trimmed else output.last_hidden_state[0, rows]
        return RowScores(*self.head(hidden[row_index], self.model.get_output_embeddings(), targets, with_statistics))

    def _image_rows(
        self, image_features: torch.Tensor, image_index: torch.Tensor, num_rows: int, image_sizes: Sequence[tuple[int, int]], image_tokens: Sequence[int]
    ) -> torch.Tensor:
        """(tiles, tokens, vision width) -> (num_rows, text width or a multiple): the tokens of the image at each place, one place behind the other."""
        projected = self.family.project(self.model.model, image_features.to(self._projector_dtype))
        if not image_sizes or (self.family.tiling is None and len(projected) == len(image_sizes)):  # every tile is an image
            return projected[image_index].flatten(0, 1)
        num_tiles = [self.family.num_tiles(self.config, *image) for image in zip(image_sizes, image_tokens, strict=True)]
        tiles = projected.split(num_tiles)
        if self.family.tiling is None or self.newline is None:
            images = [image.flatten(0, 1) for image in tiles]
        else:
            images = self.family.tiling.assemble(self.model.model, self.newline(), tiles, image_sizes, image_tokens)
        assert [len(image) for image in images] == list(image_tokens)
        lengths = torch.tensor(image_tokens, device=projected.device)
        at_place = lengths[image_index]
        # where each place's rows begin among all images' rows, less where they begin among all places' rows
        shift = (lengths.cumsum(0) - lengths)[image_index] - (at_place.cumsum(0) - at_place)
        rows = torch.arange(num_rows, device=projected.device) + shift.repeat_interleave(at_place, output_size=num_rows)
        return torch.cat(images)[rows]

    def _nothing(self, like: torch.Tensor) -> torch.Tensor:
        """A zero that hangs on all that images go through: every rank must call the same modules, so a text-only batch sends a zero row (or a blank
        image, if the tower trains) through them."""
        if self.tower is not None:
            features = self._tower_features(torch.zeros(1, *self.family.tile_shape(self.config), device=like.device), [(1, 1)])
        else:
            features = torch.zeros(1, 1, self.family.feature_width(self.config), device=like.device)
        total = self.family.project(self.model.model, features.to(self._projector_dtype)).sum()
        if self.newline is not None:
            total = total + self.newline().sum()
        return 0 * total.to(like.dtype)

    def _tower_features(self, pixel_values: torch.Tensor, grids: Sequence[tuple[int, int]]) -> torch.Tensor:
        assert self.tower is not None
        tower = active_module(self.tower)
        return self.family.features(self.config, tower, pixel_values.to(_dtype(tower)), grids)

    @property
    def _layers(self) -> nn.ModuleList:
        layers: nn.ModuleList = getattr(self.model.model, self.family.language_model).layers
        return layers

    @property
    def _projector_dtype(self) -> torch.dtype:
        return _dtype(self.model.model.get_submodule(self.family.projector[0]))


@contextmanager
def _added_behind(layers: nn.ModuleList, features: Sequence[torch.Tensor], image_positions: torch.Tensor) -> Iterator[None]:
    """Each of the first layers adds its features, (total image tokens, text width), to its output at the images' places (DeepStack, arXiv 2406.04334).

    transformers does so by a mask, whose places a GPU would have to be asked for in each of these layers.
    """

    def add(hidden_states: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return hidden_states.index_add(1, image_positions, values[None].to(hidden_states.dtype))

    hooks = [layer.register_forward_hook(lambda _, __, output, values=values: add(output, values)) for layer, values in zip(layers, features, strict=False)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def active_module(module: nn.Module) -> nn.Module:
    """What runs in a module's place beside an adapter: the copy that learns, or the original while the adapter is off; itself without one."""
    if not isinstance(module, ModulesToSaveWrapper):
        return module
    return module.original_module if module.disable_adapters else module.modules_to_save[module.active_adapters[0]]


def _dtype(module: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in module.parameters() if parameter.dtype.is_floating_point)


def model_inputs(batch: PackedBatch, tower: FrozenTower | None) -> dict[str, Any]:
    """The keyword arguments of `PackedModel.forward` for a batch; a frozen tower runs here."""
    images: dict[str, Any] = {"pixel_values": batch.pixel_values} if tower is None else {"image_features": tower.features_of(batch)}
    names = [
        "input_ids",
        "position_ids",
        "segments",
        "rows",
        "row_index",
        "targets",
        "image_index",
        "image_positions",
        "image_sizes",
        "image_tokens",
        "image_grids",
    ]
    return {**{name: getattr(batch, name) for name in names}, **images}
