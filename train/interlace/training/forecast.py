"""What a run will need, before it starts: memory per device and host, disk, time. Arithmetic on plain values; `rehearsal` and `probe` measure them."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from interlace.arguments import read_json
from interlace.data.batch import Segment
from interlace.data.packing import MicroBatch, Prefixes
from interlace.data.reading import Kind
from interlace.model.costs import BatchShape, Cost, StepCosts, attended_pairs
from interlace.model.families import part_of
from interlace.model.reference import copy_bytes
from interlace.model.tuning import TunedModel
from interlace.sharding_arguments import deepspeed_path
from interlace.training.outline import asks_reference, compute_dtype
from interlace.training.planning import Columns
from interlace.training.rehearsal import Rehearsal, rehearse

# Bytes of optimizer state for each parameter that trains; Adam in float32 keeps two numbers
OPTIMIZER_BYTES = {"sgd": 0.0, "rmsprop": 4.0, "adagrad": 4.0, "adafactor": 0.1, "lion_32bit": 4.0, "paged_lion_32bit": 4.0, "adamw_torch_4bit": 1.2}
ADAM_BYTES, EIGHT_BIT_ADAM_BYTES, EIGHT_BIT_LION_BYTES = 8.0, 2.1, 1.1
# bitsandbytes: NF4 in blocks of 64 with double quantisation (arXiv 2305.14314, section 3); int8 with one float32 scale per output
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
RUNTIME_BYTES = {"cpu": 30 << 20, "cuda": 600 << 20}  # kernels and their scratch space: measured on the CPU, usual for a CUDA context
LIBRARY_BYTES = 500 << 20  # Python with torch, transformers and the rest, in the host's memory
MARGIN = 0.1  # the forecast is right to about a tenth (benchmarks/results), so this much stays free


@dataclass(frozen=True)
class Sizes:
    """Bytes that stay as long as the run: `replica` is a frozen tower outside the wrapped module; `frozen` and `trainable` are weights inside it;
    `optimizer` its state; `workspace` one quantised weight, unpacked for its product; `reference` a second model, of preference tuning."""

    replica: int
    frozen: int
    trainable: int
    optimizer: int
    workspace: int = 0
    reference: int = 0


@dataclass(frozen=True)
class Sharding:
    """How many devices share what: `stage` 0 is DDP (or a single device), 1 to 3 are ZeRO's (arXiv 1910.02054)."""

    world_size: int = 1
    stage: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False


def sharding_of(arguments: Mapping[str, Any], world_size: int) -> Sharding:
    """What the keys `deepspeed` and `fsdp` make of this many devices; FSDP2 shares what ZeRO's stage 3 shares."""
    if arguments["deepspeed"]:
        zero = read_json(deepspeed_path(arguments["deepspeed"]), [])["zero_optimization"]
        optimizer, parameters = ((zero.get(name) or {}).get("device", "none") != "none" for name in ("offload_optimizer", "offload_param"))
        return Sharding(world_size, zero["stage"], optimizer, parameters)
    if arguments["fsdp"]:
        settings = arguments["fsdp_config"] or {}
        settings = read_json(Path(settings), []) if isinstance(settings, str) else settings
        offloads = "offload" in str(arguments["fsdp"]) or bool(settings.get("cpu_offload") or settings.get("fsdp_cpu_offload"))
        return Sharding(world_size, 3, offloads, offloads)
    return Sharding(world_size)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the fullest moment of a step; `host` is what offloading moves to the host's memory for each device."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    runtime: int
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(getattr(self, item.name) for item in fields(self) if item.name != "host")


@dataclass(frozen=True)
class MicroShape:
    """A micro-batch as the forecast sees it: the length of each segment, how many tiles of images and supervised tokens they have together, each segment's
    parent (-1: none), without which all are rows of their own, and pairs of tiles; see `BatchShape`."""

    lengths: tuple[int, ...]
    num_images: int
    num_rows: int
    parents: tuple[int, ...] = ()
    num_tile_pairs: float = 0.0

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The forest."""
        ends, parents = accumulate(self.lengths), self.parents or (-1,) * len(self.lengths)
        return tuple(Segment(end - length, end, parent) for length, end, parent in zip(self.lengths, ends, parents, strict=True))

    def shape(self, window: int | None = None) -> BatchShape:
        """What its cost depends on; window: see `StepCosts`."""
        near = 0.0 if window is None else attended_pairs(self.segments, window)
        return BatchShape(sum(self.lengths), attended_pairs(self.segments), self.num_images, self.num_rows, 0.0, self.num_tile_pairs, near)


def micro_shapes(batches: Sequence[MicroBatch], rows: Columns, prefixes: Prefixes | None = None) -> list[MicroShape]:
    """The shapes of planned micro-batches. Images count as distinct, but for those of a shared prefix."""
    return [_micro_shape(np.array([max(row, ~row) for row in batch]), rows, prefixes) for batch in batches]


def _micro_shape(numbers: np.ndarray, rows: Columns, prefixes: Prefixes | None) -> MicroShape:
    images, supervised = int(rows.num_images[numbers].sum()), int(rows.supervised[numbers].sum())
    pairs = float(np.broadcast_to(rows.num_tile_pairs, rows.lengths.shape)[numbers].sum())
    if prefixes is None:
        return MicroShape(tuple(rows.lengths[numbers].tolist()), images, supervised, (), pairs)
    alone = images
    lengths: list[int] = []
    parents: list[int] = []
    groups = prefixes.groups[numbers]
    for group in dict.fromkeys(groups.tolist()):
        own = rows.lengths[numbers[groups == group]].tolist()
        if group < 0 or len(own) == 1:
            lengths, parents = lengths + own, parents + [-1] * len(own)
            continue
        trunk, parent = int(prefixes.lengths[group]), len(lengths)
        lengths, parents = [*lengths, trunk, *(length - trunk for length in own)], [*parents, -1, *[parent] * len(own)]
        images -= (len(own) - 1) * int(prefixes.num_images[group])
    return MicroShape(tuple(lengths), images, supervised, tuple(parents), pairs * images / max(alone, 1))


def fullest(shapes: Sequence[MicroShape]) -> list[MicroShape]:
    """The micro-batches with most tokens and with most supervised tokens: one of them needs most memory."""
    return list(dict.fromkeys((max(shapes, key=lambda shape: (sum(shape.lengths), shape.num_rows)), max(shapes, key=lambda shape: shape.num_rows))))


def mean_shape(shapes: Sequence[MicroShape], window: int | None) -> BatchShape:
    """The mean over micro-batches; costs are linear in it. window: see `StepCosts`."""
    table = np.array([astuple(shape.shape(window)) for shape in shapes], np.float64)
    return BatchShape(*table.mean(0).tolist())


def sizes_of(tuned: TunedModel, arguments: Mapping[str, Any], kind: Kind = "supervised") -> Sizes:
    """What stays in memory, for the model of `empty_model`."""
    trainable = sum(parameter.nbytes for parameter in tuned.packed.parameters() if parameter.requires_grad)
    frozen = sum(parameter.nbytes for parameter in tuned.packed.parameters() if not parameter.requires_grad)
    reference = 0
    if asks_reference(arguments, kind) and not arguments["lora"]:
        reference = copy_bytes(tuned.packed, compute_dtype(arguments))
    elif asks_reference(arguments, kind) and (arguments["lora_path"] or arguments["lora_init"]):
        reference = trainable
    replica = 0 if tuned.tower is None else sum(parameter.nbytes for parameter in tuned.tower.module.parameters())
    workspace = 0
    if arguments["load_in_4bit"] or arguments["load_in_8bit"]:
        layers = [layer for name, layer in tuned.base.named_modules() if isinstance(layer, nn.Linear) and _is_quantised(tuned, name)]
        packed = [layer.weight.numel() * NF4_BYTES if arguments["load_in_4bit"] else layer.weight.numel() + 4 * layer.out_features for layer in layers]
        frozen += round(sum(packed)) - sum(layer.weight.nbytes for layer in layers)
        workspace = max(layer.weight.nbytes for layer in layers)
    return Sizes(replica, frozen, trainable, round(trainable / 4 * _state_bytes(arguments["optim"])), workspace, reference)


def _is_quantised(tuned: TunedModel, name: str) -> bool:
    words = name.split(".")
    return part_of(tuned.base)(name) == "language_model" and "lm_head" not in words and not any(word.startswith("lora_") for word in words)


def _state_bytes(optim: str) -> float:
    if "8bit" in optim:
        return EIGHT_BIT_LION_BYTES if "lion" in optim or "rmsprop" in optim else EIGHT_BIT_ADAM_BYTES
    return OPTIMIZER_BYTES.get(optim, ADAM_BYTES)


def memory_of(sizes: Sizes, rehearsals: Sequence[Rehearsal], sharding: Sharding, accumulation: int = 1, device: str = "cpu") -> Memory:
    """Memory of one device at its fullest moment.

    What trains is float32: 4 bytes of weight and 4 of gradient. Optimizer state is shared out from stage 1, gradients from stage 2, weights from stage 3;
    activations never are, nor a frozen tower, of which every device has a copy. DDP keeps its buckets beside the gradients. ZeRO's own buckets, and the layer
    that stage 3 has gathered at the moment, are not counted.

    Args:
        rehearsals: of the micro-batches that may need most.
        accumulation: micro-batches of a step on one device: from the second on, all gradients are there from the start.
    """
    world, stage = sharding.world_size, sharding.stage
    gradient_share = 1 / world if stage >= 2 else 1.0
    kept = sizes.trainable if accumulation > 1 else 0
    peaks = [rehearsal.peak(gradient_share, kept) for rehearsal in rehearsals]
    peak = max(peaks, key=lambda kinds: sum(kinds.values()))
    inside = (sizes.frozen + sizes.trainable + sizes.reference) // (world if stage == 3 else 1)
    optimizer = sizes.optimizer // (world if stage >= 1 else 1)
    buckets = sizes.trainable if world > 1 and stage == 0 else 0
    host = (inside if sharding.offload_parameters else 0) + (optimizer if sharding.offload_optimizer else 0)
    return Memory(
        weights=sizes.replica + (0 if sharding.offload_parameters else inside),
        gradients=peak["gradients"] + buckets,
        optimizer=0 if sharding.offload_optimizer else optimizer,
        activations=peak["activations"] + sizes.workspace,
        logits=peak["logits"],
        runtime=RUNTIME_BYTES[device],
        host=host,
    )


def rehearse_all(tuned: TunedModel, shapes: Sequence[MicroShape], dtype: torch.dtype) -> list[Rehearsal]:
    """Rehearses each of these micro-batches."""
    return [rehearse(tuned, shape.segments, shape.num_images, shape.num_rows, dtype) for shape in shapes]


@dataclass(frozen=True)
class Machine:
    """Bytes that one process may use on its device, and what the device is called."""

    device: str
    memory: int
    name: str


def machine_of(use_cpu: bool, memory: int | None = None) -> Machine:
    """The first GPU, or this computer with what Python and its libraries leave; with `memory`, one of that many bytes."""
    if memory is not None:
        return Machine("cpu" if use_cpu else "cuda", memory - (LIBRARY_BYTES if use_cpu else 0), "")
    if torch.cuda.is_available() and not use_cpu:
        return Machine("cuda", torch.cuda.mem_get_info()[1], torch.cuda.get_device_name())
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    allowed = int(limit.read_text()) if limit.is_file() and limit.read_text().strip().isdigit() else psutil.virtual_memory().total
    return Machine("cpu", min(allowed, psutil.virtual_memory().total) - LIBRARY_BYTES, "this computer's memory, less libraries")


def fits(memory: Memory, available: int) -> bool:
    """Whether the forecast leaves its margin of error free."""
    return memory.total * (1 + MARGIN) <= available


@dataclass(frozen=True)
class Speed:
    """What the probe measured on this machine.

    seconds_per_image: of a frozen tower; 0 if it learns, then its FLOPs count with the rest. flops_per_second: of the rest.
    batch_seconds: of every micro-batch, whatever its size. step_seconds: of the optimizer. data_seconds: to read and prepare an image.
    """

    seconds_per_image: float
    flops_per_second: float
    batch_seconds: float
    step_seconds: float
    data_seconds: float = 0.0

    def seconds(self, costs: StepCosts, shape: BatchShape) -> float:
        """Of a micro-batch, forward and backward."""
        return self.batch_seconds + shape.num_images * self.seconds_per_image + self.flops(costs, shape) / self.flops_per_second

    def flops(self, costs: StepCosts, shape: BatchShape) -> float:
        """Those that run at `flops_per_second`."""
        parts = costs.parts(shape)
        return sum((cost for name, cost in parts.items() if name != "vision_tower" or not self.seconds_per_image), Cost()).executed

    def step(self, costs: StepCosts, mean: BatchShape, accumulation: int, workers: int) -> float:
        """Seconds of an optimizer step on micro-batches of this mean shape; with worker processes, reading counts where it is slower than computing."""
        compute, reading = self.seconds(costs, mean), mean.num_images * self.data_seconds
        return accumulation * (max(compute, reading / workers) if workers else compute + reading) + self.step_seconds


@dataclass(frozen=True)
class Disk:
    """Bytes of one checkpoint, of the model at the end, and of all that is there at once."""

    checkpoint: int
    model: int
    total: int


def disk_of(tuned: TunedModel, sizes: Sizes, arguments: Mapping[str, Any], total_steps: int, epochs: float) -> Disk:
    """Disk space under `output_dir`: the checkpoints that stay, one more while it is written, and the result. Tokenizer and records are not counted."""
    model = sizes.trainable if tuned.peft is not None else sizes.replica + sizes.frozen + sizes.trainable
    every = arguments["save_steps"]
    interval = max(1, int(every) if every >= 1 else -(-every * total_steps // 1))
    saves = {"no": 0, "epoch": int(-(-epochs // 1)), "steps": -(-total_steps // interval)}.get(arguments["save_strategy"], total_steps)
    if arguments["lora_init"]:  # with the matrices it began with
        model += sum(parameter.nbytes for name, parameter in tuned.packed.named_parameters() if ".lora_A." in name or ".lora_B." in name)
    limit = arguments["save_total_limit"]
    kept = saves if limit is None else min(saves, limit + 1)
    checkpoint = model + sizes.optimizer
    return Disk(checkpoint, model, int(kept * checkpoint + model))
