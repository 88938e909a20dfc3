"""Loss spikes: found where they are planted, with their rows, and not where there are none."""

import json
import math
import random
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

from interlace.data.reading import Row
from interlace.data.template import Encoded
from interlace.training.spikes import MOST_WAITING, LossRecord, LossWindow, Spike, report_spikes


def make_rows(count: int) -> list[Row]:
    nothing = np.zeros(0, np.int32)
    return [Row(f"part_{i % 2}.json", 100 + i, Encoded(nothing, nothing, nothing.astype(np.float32), 0, (), ()), (), (), 0) for i in range(count)]


def add(record: LossRecord, step: int, losses: dict[int, float], tokens: int = 4) -> None:
    """A micro-batch of one row per entry, row number -> loss of each of its tokens; negative numbers are fillers."""
    numbers = list(losses)
    sequence = torch.arange(len(numbers)).repeat_interleave(tokens)
    log_probs = -torch.tensor(list(losses.values())).repeat_interleave(tokens)
    weights = torch.tensor([float(number >= 0) for number in numbers]).repeat_interleave(tokens)
    record.add(step, log_probs.requires_grad_(), weights, sequence, numbers)


def warm(record: LossRecord, steps: int = 64) -> None:
    randomness = random.Random(0)
    for step in range(steps):
        add(record, step, {0: randomness.uniform(0.9, 1.1), 1: randomness.uniform(0.9, 1.1)})
    assert record.look(make_rows(2)) == []


def test_a_planted_spike_is_found_with_its_rows_largest_loss_first() -> None:
    record, rows = LossRecord(rank=3), make_rows(8)
    warm(record)
    add(record, 64, {2: 1.0, 4: 1.05})
    add(record, 65, {5: 1.0, 6: 11.0, 7: 3.0})
    add(record, 66, {3: 1.0})
    (spike,) = record.look(rows)
    assert (spike.step, spike.rank) == (65, 3)
    assert spike.loss == pytest.approx(5.0)
    assert 1.5 <= spike.threshold < 5.0
    assert [(row.file, row.index, row.loss) for row in spike.rows] == [("part_0.json", 106, 11.0), ("part_1.json", 107, 3.0), ("part_1.json", 105, 1.0)]
    assert record.look(rows) == []


def test_row_losses_are_weighted_means_per_token() -> None:
    record, generator = LossRecord(0), torch.Generator().manual_seed(0)
    warm(record)
    log_probs, weights = -10 * torch.rand(20, generator=generator) - 5, torch.rand(20, generator=generator)
    sequence = torch.tensor([0] * 3 + [1] * 12 + [2] * 5)
    record.add(64, log_probs, weights, sequence, (1, 3, 0))
    (spike,) = record.look(make_rows(4))
    by_index = {row.index: row for row in spike.rows}
    for place, number in enumerate((1, 3, 0)):
        mine = [i for i in range(20) if sequence[i] == place]
        weight = sum(float(weights[i]) for i in mine)
        assert by_index[100 + number].weight == pytest.approx(weight, rel=1e-6)
        assert by_index[100 + number].loss == pytest.approx(-sum(float(log_probs[i] * weights[i]) for i in mine) / weight, rel=1e-6)
    assert spike.loss == pytest.approx(float(-(log_probs * weights).sum() / weights.sum()), rel=1e-6)


def test_length_is_no_spike_and_fillers_do_not_count() -> None:
    record, rows = LossRecord(0), make_rows(4)
    warm(record)
    add(record, 64, {2: 1.0}, tokens=5000)
    add(record, 65, {~3: 50.0})
    add(record, 66, {2: 1.0, ~3: 50.0})
    assert record.look(rows) == []


def test_the_threshold_is_that_of_a_naive_computation_over_the_window() -> None:
    window, seen = LossWindow(), []
    randomness = random.Random(1)
    for _ in range(600):
        loss = randomness.lognormvariate(0, 0.4)
        if len(seen) >= 32:
            logs = sorted(math.log(value) for value in seen[-256:])
            middle = statistics.median(logs)
            spread = 1.4826 * statistics.median([abs(value - middle) for value in logs])
            assert window.threshold() == pytest.approx(math.exp(middle + max(6 * spread, math.log(1.5))))
        else:
            assert window.threshold() == math.inf
        list(window.spikes([loss]))
        seen.append(loss)


@pytest.mark.parametrize("name", ["normal", "long tail", "very long tail", "exponential", "falling", "learnt by heart"])
def test_ordinary_losses_raise_no_alarm(name: str) -> None:
    """3,000 losses; the seed is fixed."""
    draw = np.random.RandomState(0)
    losses = {
        "normal": 2 + 0.2 * draw.randn(3000),
        "long tail": np.exp(0.5 * draw.randn(3000)),
        "very long tail": np.exp(draw.randn(3000)),
        "exponential": draw.exponential(1, 3000),
        "falling": (0.5 + 9.5 * np.exp(-np.arange(3000) / 500)) * np.exp(0.3 * draw.randn(3000)),
        "learnt by heart": 1e-4 + 2e-5 * draw.rand(3000),
    }[name]
    assert list(LossWindow().spikes(losses.tolist())) == []


def test_one_spike_does_not_hide_the_next_and_a_new_level_becomes_normal() -> None:
    window, draw = LossWindow(), np.random.RandomState(0)
    calm = (1 + 0.1 * draw.rand(100)).tolist()
    assert [number for number, _ in window.spikes([*calm, 9.0, 1.0, 9.0, 9.0, 1.0, 9.0])] == [100, 102, 103, 105]
    found = list(window.spikes([9.0] * 500))
    assert 50 < len(found) < 256
    assert found[-1][0] < 256


def test_losses_that_are_not_finite_are_left_to_others() -> None:
    window = LossWindow()
    assert list(window.spikes([1.0] * 40 + [math.nan, math.inf, 1.0])) == []
    assert len(window.logarithms) == 41


def test_nothing_is_kept_of_the_graph_and_memory_is_bounded() -> None:
    record = LossRecord(0)
    for step in range(MOST_WAITING + 10):
        add(record, step, {0: 1.0}, tokens=1)
    assert len(record._waiting) == MOST_WAITING
    assert not any(sums.requires_grad for _, sums, _ in record._waiting)


def test_spikes_are_appended_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = LossRecord(1)
    warm(record)
    add(record, 64, {0: 8.0, 1: 1.0})
    spikes = record.look(make_rows(2))
    for _ in range(2):
        report_spikes(spikes, tmp_path / "loss_spikes.jsonl")
    first, second = (json.loads(line) for line in (tmp_path / "loss_spikes.jsonl").read_text().splitlines())
    assert first == second
    assert (first["step"], first["rank"], first["rows"][0]) == (64, 1, {"file": "part_0.json", "index": 100, "loss": 8.0, "weight": 4.0})
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("loss spike at step 64, rank 1: 4.500 is above 1.")
    assert "part_0.json: row 100 (8.000), and 1 more" in line
    assert isinstance(spikes[0], Spike)
