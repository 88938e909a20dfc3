"""The plan: every row once, budgets kept, ranks agreed."""

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interlace.data.packing import Plan, Prefixes, pack, split_to, token_budget
from interlace.model.costs import step_costs
from interlace.training.outline import empty_model
from interlace.training.planning import Columns
from tests.test_costs import ARGUMENTS, interleave_05b

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=60)


@settings(max_examples=200, deadline=None)
@given(lengths=LENGTHS, rows=st.integers(1, 6), world=st.integers(1, 4), accumulation=st.integers(1, 3), epochs=st.integers(1, 3), packing=st.booleans())
def test_every_row_once_per_epoch_within_the_budget_on_every_rank_equally_often(
    lengths: list[int], rows: int, world: int, accumulation: int, epochs: int, packing: bool
) -> None:
    budget = token_budget(lengths, rows, None)
    plan = Plan(lengths, lengths, budget, None if packing else rows, epochs, 0, world, accumulation)
    for epoch in range(epochs):
        steps = plan.steps(epoch)
        assert len(steps) == plan.steps_per_epoch
        assert all(len(step) == world * accumulation for step in steps)
        batches = [batch for step in steps for batch in step]
        assert Counter(row for batch in batches for row in batch if row >= 0) == Counter(range(len(lengths)))
        assert all(len(batch) >= 1 for batch in batches)
        if packing:
            assert all(sum(lengths[max(row, ~row)] for row in batch) <= budget for batch in batches)
        shares = [plan.share(epoch, rank) for rank in range(world)]
        assert {len(share) for share in shares} == {plan.batches_per_rank}
        for number, step in enumerate(steps):
            dealt = [batch for share in shares for batch in share[number * accumulation : (number + 1) * accumulation]]
            assert sorted(map(tuple, dealt)) == sorted(map(tuple, step))


def test_steps_do_not_depend_on_how_the_ranks_share_them() -> None:
    lengths = [3 + i % 7 for i in range(40)]
    plans = [Plan(lengths, lengths, 20, None, 2, 5, world, 4 // world) for world in (1, 2, 4)]
    assert plans[0].steps(1) == plans[1].steps(1) == plans[2].steps(1)


def test_order_is_seeded_and_differs_between_epochs() -> None:
    lengths = [3 + i % 7 for i in range(40)]
    plan, again, other = (Plan(lengths, lengths, 20, None, 2, seed) for seed in (1, 1, 2))
    assert plan.steps(0) == again.steps(0) != other.steps(0)
    assert plan.steps(0) != plan.steps(1)


def test_batches_are_nearly_full() -> None:
    lengths = [20 + (i * 37) % 80 for i in range(2000)]
    budget = token_budget(lengths, 8, None)
    plan = Plan(lengths, lengths, budget, None, 1, 0)
    assert sum(lengths) / (plan.batches_per_epoch * budget) > 0.95


@pytest.mark.parametrize(("rows", "wanted", "expected"), [(2, None, 100), (1, None, 90), (2, 30, 90), (2, 500, 500)])
def test_token_budget(rows: int, wanted: int | None, expected: int) -> None:
    assert token_budget([10, 90], rows, wanted) == expected


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_each_row_goes_into_the_fullest_batch_that_takes_it(sizes: list[int]) -> None:
    """As a plain loop over all batches packs them: fewer than are kept open."""
    expected: list[list[int]] = []
    for item, size in enumerate(sizes):
        fitting = [group for group in expected if sum(sizes[i] for i in group) + size <= 50]
        if fitting:
            max(fitting, key=lambda group: sum(sizes[i] for i in group)).append(item)
        else:
            expected.append([item])
    found = pack(sizes, 50)
    assert sorted(item for group in found for item in group) == list(range(len(sizes)))
    assert sorted(sum(sizes[i] for i in group) for group in found) == sorted(sum(sizes[i] for i in group) for group in expected)


@settings(max_examples=100, deadline=None)
@given(counts=st.lists(st.integers(1, 5), min_size=1, max_size=8), more=st.integers(0, 30))
def test_split_batches_hold_the_same_rows_and_then_fillers(counts: list[int], more: int) -> None:
    rows = iter(range(100))
    batches = [[next(rows) for _ in range(count)] for count in counts]
    found = split_to(batches, len(batches) + more, 3)
    assert len(found) == len(batches) + more
    assert sorted(row for batch in found for row in batch if row >= 0) == list(range(sum(counts)))
    fillers = [batch for batch in found if batch[0] < 0]
    assert len(fillers) == max(0, len(found) - sum(counts)) and all(batch == [~3] for batch in fillers)


def draw_mixture(shares: dict[int, float], count: int) -> Columns:
    """Rows with so many images in these shares; prompts around 60 tokens, answers around 100."""
    randomness = random.Random(0)
    images = np.array(randomness.choices(list(shares), list(shares.values()), k=count))
    answers = np.array([max(1, round(100 * randomness.lognormvariate(0, 0.7))) for _ in range(count)])
    prompts = np.array([max(1, round(60 * randomness.lognormvariate(0, 0.5))) for _ in range(count)])
    return Columns(images * 729 + prompts + answers, images, answers)


MIXTURE = {1: 25, 2: 30, 3: 10, 4: 10, 5: 8, 6: 5, 8: 7, 10: 3, 16: 2}  # PERFORMANCE's
LIKE_M4 = {0: 5, 1: 27, 2: 15, 3: 10, 4: 10, 6: 5, 8: 10, 12: 4, 16: 14}  # text, single images, several, videos and scenes


def test_the_mixture_fills_its_budget() -> None:
    """97% of it; random batches of four rows, padded to their longest, use about half."""
    rows = draw_mixture(MIXTURE, 20_000)
    plan = Plan(rows.lengths.tolist(), rows.lengths, token_budget(rows.lengths, 4, None), None, 1, 0)
    assert rows.lengths.sum() / plan.batches_per_epoch / plan.budget >= 0.97
    padded = rows.lengths.reshape(-1, 4)
    assert padded.sum() / (4 * padded.max(1)).sum() < 0.6


@pytest.mark.parametrize("shares", [MIXTURE, LIKE_M4])
@pytest.mark.parametrize("arguments", [{}, {"lora": True}])
def test_ranks_that_wait_for_each_other_do_equal_work(shares: dict[int, float], arguments: dict[str, bool]) -> None:
    """8 ranks, one micro-batch each: FLOPs of the 0.5B, most over mean of each step, in the mean over steps."""
    rows = draw_mixture(shares, 20_000)
    costs = rows.flops(step_costs(empty_model(interleave_05b(), {**ARGUMENTS, **arguments})))
    plan = Plan(rows.lengths.tolist(), costs, token_budget(rows.lengths, 4, None), None, 1, 0, world_size=8)
    per_rank = np.array([[sum(costs[max(row, ~row)] for row in batch) for batch in step] for step in plan.steps(0)])
    assert (per_rank.max(1) / per_rank.mean(1)).mean() <= 1.03
    unsorted = np.random.default_rng(0).permutation(per_rank.ravel()).reshape(per_rank.shape)
    assert (unsorted.max(1) / unsorted.mean(1)).mean() > 1.05


@settings(max_examples=200, deadline=None)
@given(
    groups=st.lists(st.integers(-1, 4), min_size=1, max_size=50),
    most=st.integers(2, 5),
    world=st.integers(1, 3),
    room=st.integers(1, 4),
    rows_per_batch=st.none() | st.integers(1, 6),
)
def test_rows_that_share_a_prefix_are_planned_together_within_the_budget(
    groups: list[int], most: int, world: int, room: int, rows_per_batch: int | None
) -> None:
    prefix_lengths = np.array([10, 20, 30, 40, 50])
    lengths = [1 + i % 7 + (int(prefix_lengths[group]) if group >= 0 else 0) for i, group in enumerate(groups)]
    prefixes = Prefixes(np.array(groups), prefix_lengths, np.ones(5), prefix_lengths * 2.0, most)
    budget = token_budget(lengths, room, None)
    plan = Plan(lengths, [2 * length for length in lengths], budget, rows_per_batch, 2, 0, world, prefixes=prefixes)
    for epoch in range(2):
        batches = [batch for step in plan.steps(epoch) for batch in step]
        assert Counter(row for batch in batches for row in batch if row >= 0) == Counter(range(len(lengths)))
        for batch in batches:
            rows = [max(row, ~row) for row in batch]
            own = sum(lengths[row] - (prefix_lengths[groups[row]] if groups[row] >= 0 else 0) for row in rows)
            tokens = own + sum(prefix_lengths[group] for group in {groups[row] for row in rows} if group >= 0)
            assert plan.num_tokens(batch) == tokens
            assert plan.cost(batch) == 2 * tokens
            assert rows_per_batch is not None or tokens <= budget


def test_no_more_rows_share_a_prefix_than_allowed() -> None:
    groups = np.repeat(np.arange(5), 40)
    prefixes = Prefixes(groups, np.full(5, 100), np.ones(5), np.full(5, 100.0), 8)
    units, sizes = prefixes.units(list(np.random.default_rng(0).permutation(200)), [103] * 200, 10_000)
    assert [len(unit) for unit in units] == [8] * 25 and sizes == [100 + 8 * 3] * 25
    assert all(len({groups[row] for row in unit}) == 1 for unit in units)
