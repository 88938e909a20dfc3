"""What a training step costs in FLOPs, from the model and what learns in it: for the plan, the forecast and MFU alike.

Conventions: one multiplication with its addition is 2 FLOPs; only matrix products and convolutions count. A linear layer's backward pass is one more product
for the gradient of its input, if anything below it learns, and one for its weight, if that learns. The language model's attention counts the pairs of a
query and a key that the rule of the segments allows (the causal half, and of layers with a sliding window what lies in it) and twice as much backward,
without the recomputation inside fused kernels.
Of the last layer all tokens pass the keys and values only, where `last_layer` knows it; the rest is counted for the rows that are scored.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any

import numpy as np
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PretrainedConfig

from interlace.data.batch import PackedBatch, Segment
from interlace.model.attention import depths, window_of
from interlace.model.families import Family
from interlace.model.last_layer import ALL_TOKENS
from interlace.model.tuning import TunedModel

# Linear layers that read the same input, in the order in which a block runs them
STAGES = ({"q_proj", "k_proj", "v_proj"}, {"o_proj", "out_proj"}, {"gate_proj", "up_proj", "fc1"}, {"down_proj", "fc2"})
BLOCKS = ("layers", "blocks", "layer")  # what towers call the list of their blocks, what stands before these, and the attention in them
EMBEDDINGS, ATTENTION = {"embeddings", "patch_embed", "pos_embed"}, ("self_attn.", "attn.", "attention.")


@dataclass(frozen=True, slots=True)
class BatchShape:
    """What the cost of a micro-batch depends on; linear in all, so shapes of batches may be summed or averaged.

    num_tokens: T. num_pairs: pairs of a query and a key that it attends to. num_images: tiles of distinct images. num_rows: N, the rows that `lm_head` sees.
    num_cached: of the tiles, those whose features are there already. num_tile_pairs: pairs of two tiles of one image, of those that the tower sees.
    num_near_pairs: of the pairs, those within the sliding window, for a model that has layers with one.
    """

    num_tokens: float
    num_pairs: float
    num_images: float
    num_rows: float
    num_cached: float = 0.0
    num_tile_pairs: float = 0.0
    num_near_pairs: float = 0.0


def shape_of(batch: PackedBatch, window: int | None = None) -> BatchShape:
    """The shape of a batch; window: see `StepCosts`."""
    new, cached = (0 if tensor is None else len(tensor) for tensor in (batch.pixel_values, batch.cached_features))
    pairs = sum((rows * columns) ** 2 for rows, columns in batch.new_grids)
    near = 0 if window is None else attended_pairs(batch.segments, window)
    return BatchShape(batch.num_tokens, attended_pairs(batch.segments), new + cached, len(batch.targets), cached, pairs, near)


def attended_pairs(segments: Sequence[Segment], window: int | None = None) -> int:
    """How many pairs of a query and a key the segments allow: each token sees itself, the earlier ones of its segment, and its ancestors.

    Args:
        window: only so many tokens, itself included; None for all.
    """
    ends = ((depth, depth + segment.end - segment.start) for depth, segment in zip(depths(segments), segments, strict=True))
    return int(sum(path_pairs(end, window) - path_pairs(start, window) for start, end in ends))


def path_pairs(length: Any, window: int | None = None) -> Any:
    """The same of a path of this many tokens, a number or an array of them."""
    full = length if window is None else np.minimum(length, window)
    return full * (full + 1) / 2 + (0 if window is None else (length - full) * window)


@dataclass(frozen=True)
class Cost:
    """FLOPs of one unit (an image, a token, a pair, a row); `recompute` is what activation checkpointing adds."""

    forward: float = 0.0
    backward: float = 0.0
    recompute: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.forward + other.forward, self.backward + other.backward, self.recompute + other.recompute)

    def times(self, count: float) -> "Cost":
        """The cost of `count` units."""
        return Cost(self.forward * count, self.backward * count, self.recompute * count)

    @property
    def required(self) -> float:
        """FLOPs that the mathematics asks for: the numerator of MFU."""
        return self.forward + self.backward

    @property
    def executed(self) -> float:
        """FLOPs that are run, recomputation included."""
        return self.required + self.recompute


@dataclass(frozen=True)
class StepCosts:
    """The costs of the parts: of the tower and the projector per tile, of the tower's attention over whole images per pair of tiles, of the language model's
    layers per token, and per pair in those that see all and in those with a sliding window, of the last layer and `lm_head` per row.

    window: tokens that layers with a sliding window see; None where there are none. image_attention: per tile, of its tokens' attention to later ones of it.
    """

    vision_tower: Cost
    vision_attention: Cost
    projector: Cost
    language_model: Cost
    attention: Cost
    last_layer: Cost
    lm_head: Cost
    near_attention: Cost = Cost()
    image_attention: Cost = Cost()
    window: int | None = None

    def parts(self, shape: BatchShape) -> dict[str, Cost]:
        """part -> its cost in a micro-batch, forward and backward."""
        near = self.near_attention.times(shape.num_near_pairs) + self.image_attention.times(shape.num_images)
        return {
            "vision_tower": self.vision_tower.times(shape.num_images - shape.num_cached) + self.vision_attention.times(shape.num_tile_pairs),
            "projector": self.projector.times(shape.num_images),
            "language_model": self.language_model.times(shape.num_tokens) + self.last_layer.times(shape.num_rows),
            "attention": self.attention.times(shape.num_pairs) + near,
            "lm_head": self.lm_head.times(shape.num_rows),
        }

    def with_reference(self) -> "StepCosts":
        """With one more forward pass: preference tuning asks a reference model, too, which sees by itself only where the tower learns."""
        shared = ("window",) if self.vision_tower.backward else ("window", "vision_tower", "vision_attention")
        parts = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in shared}
        return replace(self, **{name: cost + Cost(cost.forward) for name, cost in parts.items()})

    def total(self, shape: BatchShape) -> Cost:
        """The cost of a micro-batch, forward and backward."""
        return sum(self.parts(shape).values(), Cost())


def step_costs(tuned: TunedModel, checkpointing: bool = False, vision_checkpointing: bool = False) -> StepCosts:
    """The costs of a model's parts. Only shapes and `requires_grad` are read, so the model may lie on the meta device.

    Args:
        tuned: the model with what learns set.
        checkpointing: the language model's layers recompute their activations.
        vision_checkpointing: so do the tower's, if it learns.
    """
    base, config, family = tuned.base, tuned.base.config, tuned.packed.family
    tower = tuned.packed.tower if tuned.tower is None else tuned.tower.module
    if isinstance(tower, ModulesToSaveWrapper):  # beside an adapter: a frozen original and the copy that learns
        tower = tower.modules_to_save["default"]
    assert tower is not None
    vision, vision_pairs, tower_learns = _tower_cost(tower, config, family, vision_checkpointing)
    projector, learns = _projector_cost(base.model, config, family, tower_learns)
    model = getattr(base.model, family.language_model)
    # transformers makes the embeddings' output require a gradient when it checkpoints
    learns = bool(learns or base.get_input_embeddings().weight.requires_grad or checkpointing)
    layers, pairs, near, last = Cost(), Cost(), Cost(), Cost()
    width = config.get_text_config().num_attention_heads * model.layers[0].self_attn.head_dim
    for layer in model.layers:
        attention_learns = learns or any(parameter.requires_grad for parameter in layer.self_attn.parameters())
        linears = list(_linears(layer, learns))
        if layer is model.layers[-1] and tuned.packed.is_trimmed:
            of_tokens, linears = [[item for item in linears if bool(ALL_TOKENS & set(item[0].split("."))) is wanted] for wanted in (True, False)]
            layers += _sum(of_tokens, checkpointing, ends=False)[0]
            last, learns = _sum(linears, checkpointing)
        else:
            cost, learns = _sum(linears, checkpointing)
            layers += cost
        cost = _attention(width, attention_learns, checkpointing)
        pairs, near = (pairs + cost, near) if window_of(layer.self_attn) is None else (pairs, near + cost)
    ahead = (pairs + near).times(math.comb(family.tokens_per_tile(config), 2) * family.sees_whole_images)
    head = base.get_output_embeddings().weight
    row = Cost(2.0 * head.numel(), 2.0 * head.numel() * (int(learns) + int(head.requires_grad)))
    return StepCosts(vision, vision_pairs, projector, layers, pairs, last, row, near, ahead, tuned.packed.window)


def _tower_cost(tower: nn.Module, config: PretrainedConfig, family: Family, checkpointing: bool) -> tuple[Cost, Cost, bool]:
    """Cost per tile, per pair of tiles of one image, and whether the tower learns."""
    facts = family.tower
    patches, tokens, width = facts.patches(config), facts.tokens(config), facts.width(config)
    total, pairs = Cost(), Cost()
    for module in tower.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):  # the patches; pixels need no gradient
            size = 2.0 * module.weight.numel() * patches
            total += Cost(size, size * int(module.weight.requires_grad))
    unused = set(family.unused(config, tower))
    learns = any(parameter.requires_grad for name, parameter in tower.named_parameters() if EMBEDDINGS & set(name.split(".")))
    for number, (name, block) in enumerate(_blocks(tower)):
        if unused.issuperset(f"{name}.{inside}" for inside, _ in block.named_parameters()):  # behind the selected layer: not run
            break
        attention_learns = learns or any(parameter.requires_grad for inside, parameter in block.named_parameters() if inside.startswith(ATTENTION))
        cost, learns = _sum(_linears(block, learns), recomputed=checkpointing)
        total += cost.times(tokens)
        attended = facts.attended(config, number)
        of_pair = _attention(width, attention_learns, checkpointing)
        total, pairs = (total, pairs + of_pair.times(tokens**2)) if attended is None else (total + of_pair.times(tokens * attended), pairs)
    return total, pairs, learns


def _blocks(tower: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in tower.named_modules() if name.split(".")[-2:-1] and name.split(".")[-2] in BLOCKS]


def _projector_cost(model: Any, config: PretrainedConfig, family: Family, below: bool) -> tuple[Cost, bool]:
    """Cost per tile, and whether anything up to the projector's output learns."""
    total, learns = Cost(), below
    for name in family.projector:
        part = model.get_submodule(name)
        others = [module for module in part.modules() if not isinstance(module, nn.Linear)]  # a norm, which stands in front of all
        norm_learns = any(parameter.requires_grad for module in others for parameter in module.parameters(recurse=False))
        cost, learned = _sum([*_linears(part, below or norm_learns), *_products(part, below or norm_learns)], recomputed=False)
        total, learns = total + cost, learns or learned
    return total.times(family.tokens_per_tile(config)), learns


def _attention(width: int, learns: bool, checkpointing: bool) -> Cost:
    """Of one pair in one layer: the score and the weighted value; backward two products for each."""
    forward = 4.0 * width
    return Cost(forward, 2 * forward * learns, forward * (learns and checkpointing))


def _linears(module: nn.Module, below: bool) -> Iterator[tuple[str, float, bool, bool]]:
    """(name, forward FLOPs per token, its weight learns, its input needs a gradient) of each linear layer that runs.

    Args:
        below: something before this module learns.
    """
    linears = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear) and "original_module" not in name.split(".")]

    def stage(item: tuple[str, nn.Linear]) -> object:
        return next((number for number, names in enumerate(STAGES) if names & set(item[0].split("."))), item[0])

    for _, group in groupby(linears, key=stage):
        reached = below
        for name, layer in group:
            learns = layer.weight.requires_grad
            yield name, 2.0 * layer.in_features * layer.out_features, learns, reached or (learns and "lora_B" in name.split("."))
            below = below or learns


def _products(module: nn.Module, below: bool) -> Iterator[tuple[str, float, bool, bool]]:
    """The same of matrices that stand in no layer of their own (Gemma 3's projector)."""
    for name, inner in module.named_modules():
        if not isinstance(inner, nn.Linear) and "original_module" not in name.split("."):
            for own, weight in inner.named_parameters(recurse=False):
                if weight.ndim == 2:
                    yield f"{name}.{own}", 2.0 * weight.numel(), weight.requires_grad, below


def _sum(linears: Iterable[tuple[str, float, bool, bool]], recomputed: bool, ends: bool = True) -> tuple[Cost, bool]:
    """The cost of a block per token, and whether its output needs a gradient. Recomputation stops before the last product: nothing is saved behind it.

    Args:
        ends: the last of these layers is the block's last.
    """
    forward = backward = last = 0.0
    gradient = False
    for _, last, learns, reached in linears:
        forward += last
        backward += last * (int(learns) + int(reached))
        gradient = gradient or learns or reached
    return Cost(forward, backward, (forward - last * ends) * (recomputed and gradient)), gradient
