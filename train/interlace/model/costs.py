"""What a training step costs in FLOPs, from the model and what learns in it: for the plan, the forecast and MFU alike.

Conventions: one multiplication with its addition is 2 FLOPs; only matrix products and convolutions count. A linear layer's backward pass is one more product
for the gradient of its input, if anything below it learns, and one for its weight, if that learns. The language model's attention counts the pairs of a
query and a key that the rule of the segments allows (the causal half) and twice as much backward, without the recomputation inside fused kernels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PretrainedConfig

from interlace.data.batch import PackedBatch, Segment
from interlace.model.attention import ancestors
from interlace.model.families import unused_vision_parameters
from interlace.model.tuning import TunedModel

# Linear layers that read the same input, in the order in which a block runs them
STAGES = ({"q_proj", "k_proj", "v_proj"}, {"o_proj", "out_proj"}, {"gate_proj", "up_proj", "fc1"}, {"down_proj", "fc2"})


@dataclass(frozen=True, slots=True)
class BatchShape:
    """What the cost of a micro-batch depends on; linear in all four, so shapes of batches may be summed or averaged.

    num_tokens: T. num_pairs: pairs of a query and a key that it attends to. num_images: distinct images. num_rows: N, the rows that `lm_head` sees.
    num_cached: of the images, those whose features are there already.
    """

    num_tokens: float
    num_pairs: float
    num_images: float
    num_rows: float
    num_cached: float = 0.0


def shape_of(batch: PackedBatch) -> BatchShape:
    """The shape of a batch."""
    new, cached = (0 if tensor is None else len(tensor) for tensor in (batch.pixel_values, batch.cached_features))
    return BatchShape(batch.num_tokens, attended_pairs(batch.segments), new + cached, len(batch.rows), cached)


def attended_pairs(segments: Sequence[Segment]) -> int:
    """How many pairs of a query and a key the segments allow: each token sees itself, the earlier ones of its segment, and its ancestors."""
    sizes = [segment.end - segment.start for segment in segments]
    return sum(size * (size + 1) // 2 + size * sum(sizes[other] for other in ancestors(segments, number)[:-1]) for number, size in enumerate(sizes))


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
    """The costs of the parts: of the tower and the projector per image, of the language model's layers per token and pair, of `lm_head` per row."""

    vision_tower: Cost
    projector: Cost
    language_model: Cost
    attention: Cost
    lm_head: Cost

    def parts(self, shape: BatchShape) -> dict[str, Cost]:
        """part -> its cost in a micro-batch, forward and backward."""
        return {
            "vision_tower": self.vision_tower.times(shape.num_images - shape.num_cached),
            "projector": self.projector.times(shape.num_images),
            "language_model": self.language_model.times(shape.num_tokens),
            "attention": self.attention.times(shape.num_pairs),
            "lm_head": self.lm_head.times(shape.num_rows),
        }

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
    vision, tower_learns = _tower_cost(tower, config, vision_checkpointing)
    projector, learns = _sum(_linears(getattr(base.model, family.projector), tower_learns), recomputed=False)
    model = getattr(base.model, family.language_model)
    # transformers makes the embeddings' output require a gradient when it checkpoints
    learns = bool(learns or base.get_input_embeddings().weight.requires_grad or checkpointing)
    layers, pairs = Cost(), Cost()
    width = config.get_text_config().num_attention_heads * model.layers[0].self_attn.head_dim
    for layer in model.layers:
        attention_learns = learns or any(parameter.requires_grad for parameter in layer.self_attn.parameters())
        cost, learns = _sum(_linears(layer, learns), recomputed=checkpointing)
        layers += cost
        pairs += _attention(width, attention_learns, checkpointing)
    head = base.get_output_embeddings().weight
    row = Cost(2.0 * head.numel(), 2.0 * head.numel() * (int(learns) + int(head.requires_grad)))
    return StepCosts(vision, projector.times(family.tokens_per_image(config)), layers, pairs, row)


def _tower_cost(tower: nn.Module, config: PretrainedConfig, checkpointing: bool) -> tuple[Cost, bool]:
    """Cost per image, and whether the tower learns."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    tokens = patches + int(vision.model_type == "clip_vision_model")
    total = Cost()
    for module in tower.modules():
        if isinstance(module, nn.Conv2d):  # the patches; pixels need no gradient
            size = 2.0 * module.weight.numel() * patches
            total += Cost(size, size * int(module.weight.requires_grad))
    unused = unused_vision_parameters(config, tower)
    learns = any(parameter.requires_grad for name, parameter in tower.named_parameters() if "embeddings" in name.split("."))
    for number, layer in enumerate(_layers(tower)):
        if any(f"layers.{number}.mlp.fc1." in name for name in unused):  # behind the selected layer: not run
            break
        attention_learns = learns or any(parameter.requires_grad for parameter in layer.self_attn.parameters())
        cost, learns = _sum(_linears(layer, learns), recomputed=checkpointing)
        total += cost.times(tokens)
        total += _attention(vision.hidden_size, attention_learns, checkpointing).times(tokens**2)
    return total, learns


def _layers(tower: nn.Module) -> list[Any]:
    return [module for name, module in tower.named_modules() if name.split(".")[-2:-1] == ["layers"]]


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


def _sum(linears: Iterator[tuple[str, float, bool, bool]], recomputed: bool) -> tuple[Cost, bool]:
    """The cost of a block per token, and whether its output needs a gradient. Recomputation stops before the last product: nothing is saved behind it."""
    forward = backward = last = 0.0
    gradient = False
    for _, last, learns, reached in linears:
        forward += last
        backward += last * (int(learns) + int(reached))
        gradient = gradient or learns or reached
    return Cost(forward, backward, (forward - last) * (recomputed and gradient)), gradient
