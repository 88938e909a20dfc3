"""Where a step's time goes, and MFU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from interlace.data.batch import PackedBatch
from interlace.model.costs import StepCosts, shape_of
from interlace.training import clock
from interlace.training.clock import PHASES, StepClock, peak_flops
from interlace.training.supervised import finetune
from interlace.training.tracking import time_budget
from tests.test_training import history

Make = Callable[..., dict[str, Any]]


KNOWN = {"NVIDIA H200": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H100 80GB HBM3": 989, "NVIDIA A100-SXM4-80GB": 312, "NVIDIA L40S": 362}


class Ticks:
    """A clock that goes on by a given time whenever it is asked."""

    def __init__(self, *steps: float):
        self.steps, self.now, self.count = list(steps), 0.0, 0

    def __call__(self) -> float:
        self.count += 1
        self.now += self.steps.pop(0) if self.steps else 1.0
        return self.now


def test_every_second_belongs_to_one_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock.time, "perf_counter", Ticks(0, 2, 3, 5, 7, 11))
    watch = StepClock(torch.device("cpu"))
    for phase in ("data", "forward", "", "data"):
        watch.mark(phase)
    assert watch.take() == {**dict.fromkeys(PHASES, 0.0), "data": 2 + 7, "forward": 3}
    watch.mark("backward")
    assert watch.take() == {**dict.fromkeys(PHASES, 0.0), "backward": 11}


def test_the_phases_of_a_run_add_up_to_its_time(make_arguments: Make, rows_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that ticks once per look: what is logged is every tick but those of a save and of what comes before the first step."""
    ticks, taken = Ticks(), []

    def take(self: StepClock) -> dict[str, float]:
        first = self._marks[0][1]
        seconds = original(self)
        taken.append((sum(seconds.values()), self._marks[0][1] - first))
        return seconds

    original = StepClock.take
    monkeypatch.setattr(clock.time, "perf_counter", ticks)
    monkeypatch.setattr(StepClock, "take", take)
    arguments = make_arguments(rows_file, lora=True, logging_steps=2, gradient_accumulation_steps=2, save_strategy="steps", save_steps=2)
    finetune(arguments)
    assert [found for found, _ in taken] == [passed for _, passed in taken[:1]] + [passed - 1 for _, passed in taken[1:]]  # one tick for the save
    logged = [entry for entry in history(arguments["output_dir"]) if "loss" in entry]
    for entry, (found, _) in zip(logged, taken, strict=True):
        assert sum(entry[f"{phase}_seconds"] for phase in PHASES) * 2 == pytest.approx(found)
        assert entry["data_wait_share"] == pytest.approx(2 * entry["data_seconds"] / found)
        assert entry["forward_seconds"] == entry["vision_seconds"] == entry["backward_seconds"] == 2 and entry["communication_seconds"] == 1
    lines = dict(time_budget(history(arguments["output_dir"])))
    assert set(lines) == {"seconds per step", "of these"} and "forward" in lines["of these"]


def test_flops_and_mfu_are_those_the_model_requires(make_arguments: Make, rows_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Summed over the step's micro-batches by hand; with cached features without the tower."""
    from interlace.training import trainer

    seen: list[tuple[StepCosts, PackedBatch]] = []

    def note(batch: PackedBatch, window: int | None) -> Any:
        seen.append((batch,))  # type: ignore[arg-type]
        return shape_of(batch, window)

    monkeypatch.setattr(trainer, "shape_of", note)
    monkeypatch.setattr(trainer, "peak_flops", lambda name: 1e12)
    monkeypatch.setattr(clock.time, "perf_counter", Ticks())
    arguments = make_arguments(rows_file, lora=True, bf16=True, gradient_accumulation_steps=2, feature_cache="memory", max_steps=20)
    costs: list[StepCosts] = []
    original = trainer.PackedTrainer.__init__

    def keep(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        costs.append(self.costs)

    monkeypatch.setattr(trainer.PackedTrainer, "__init__", keep)
    finetune(arguments)
    logged = [entry for entry in history(arguments["output_dir"]) if "loss" in entry]
    for number, entry in enumerate(logged):
        parts = [costs[0].parts(shape_of(batch)) for (batch,) in seen[2 * number : 2 * number + 2]]  # type: ignore[misc]
        required = sum(cost.required for part in parts for cost in part.values())
        seconds = sum(entry[f"{phase}_seconds"] for phase in PHASES)
        assert entry["tflops_per_second"] == pytest.approx(required / seconds / 1e12)
        assert entry["mfu"] == pytest.approx(required / seconds / 1e12)
        if number > len(logged) // 2:
            assert all(part["vision_tower"].required == 0 < part["language_model"].required for part in parts)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("cpu", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA RTX 4090 Laptop GPU", None),
        ("NVIDIA T400", None),
    ],
)
def test_peaks_of_known_devices(name: str, tflops: float | None) -> None:
    assert peak_flops(name) == (None if tflops is None else tflops * 1e12)
