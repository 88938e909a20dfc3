"""A few real steps on small packed batches: how fast this machine runs this model."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from interlace.data.batch import PackedBatch
from interlace.model.costs import BatchShape, StepCosts, shape_of
from interlace.model.forward import model_inputs
from interlace.model.losses import supervised_loss
from interlace.model.tuning import TunedModel
from interlace.training.forecast import Speed

REPEATS = 2  # the faster one counts: other jobs only ever slow a step down


@dataclass(frozen=True)
class Timing:
    """Seconds of one micro-batch of a shape: the frozen tower's (0 if it learns), and all the rest."""

    shape: BatchShape
    tower_seconds: float
    rest_seconds: float


def probe(
    tuned: TunedModel,
    batches: Iterable[PackedBatch],
    costs: StepCosts,
    dtype: torch.dtype,
    device: torch.device,
    limit_seconds: float = 30.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Speed:
    """Trains on growing batches until they or the time are used up. The weights change: the model is of no use afterwards.

    Args:
        batches: micro-batches, the next about twice as large as the one before.
        dtype: autocast to this type, unless it is float32.
        limit_seconds: no batch is begun that would end later; the first two are always run.
        clock: seconds; `time.process_time` where other jobs share the cores.
    """
    tuned.packed.to(device).train()
    parameters = [parameter for parameter in tuned.packed.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    timings: list[Timing] = []
    step_seconds: list[float] = []
    start = clock()
    for batch in batches:
        last = timings[-1].tower_seconds + timings[-1].rest_seconds if timings else 0.0
        if len(timings) >= 2 and clock() - start + 2 * REPEATS * last > limit_seconds:
            break
        runs = []
        for _ in range(REPEATS + (not timings)):  # the very first run warms up
            runs.append(_time_batch(tuned, batch.to(device), costs.window, dtype, clock))
            before = clock()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            _wait(device)
            step_seconds.append(clock() - before)
        timings.append(Timing(runs[0].shape, min(run.tower_seconds for run in runs), min(run.rest_seconds for run in runs)))
    return fit_speed(timings, costs, min(step_seconds))


def _time_batch(tuned: TunedModel, batch: PackedBatch, window: int | None, dtype: torch.dtype, clock: Callable[[], float]) -> Timing:
    device = batch.input_ids.device
    before = clock()
    inputs = model_inputs(batch, tuned.tower)
    _wait(device)
    tower = clock() - before if tuned.tower is not None else 0.0
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
        scores = tuned.packed(**inputs)
    supervised_loss(scores.log_probs, batch.weights, batch.weights.sum()).backward()
    _wait(device)
    return Timing(shape_of(batch, window), tower, clock() - before - tower)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fit_speed(timings: list[Timing], costs: StepCosts, step_seconds: float) -> Speed:
    """The line through the two largest batches: seconds of any batch, and FLOPs per second.

    A single batch, or a larger one that took no longer, gives the plain ratio.
    """
    largest = max(timings, key=lambda timing: timing.shape.num_images)
    per_image = largest.tower_seconds / largest.shape.num_images if largest.shape.num_images else 0.0
    ruler = Speed(per_image, 1.0, 0.0, 0.0)  # only says which FLOPs count
    points = sorted((ruler.flops(costs, timing.shape), timing.rest_seconds) for timing in timings)[-2:]
    (flops_before, before), (flops, seconds) = points[0], points[-1]
    if len(points) < 2 or seconds <= before or flops <= flops_before:
        return Speed(per_image, flops / seconds, 0.0, step_seconds)
    rate = (flops - flops_before) / (seconds - before)
    if rate * seconds < flops:  # the line meets the axis below zero: the larger batch was slower per FLOP
        return Speed(per_image, flops / seconds, 0.0, step_seconds)
    return Speed(per_image, rate, seconds - flops / rate, step_seconds)
