"""The plan: every row once, budgets kept, ranks agreed."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interlace.data.packing import Plan, token_budget

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
