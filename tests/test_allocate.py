"""The knapsack against trying everything."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool import allocate

OPTIONS = st.lists(st.tuples(st.integers(0, 60), st.floats(0, 10, allow_subnormal=False)), min_size=1, max_size=4)
GROUPS = st.lists(OPTIONS, min_size=1, max_size=5)


def totals(groups: list[list[tuple[int, float]]], picked: tuple[int, ...]) -> tuple[int, float]:
    chosen = [options[index] for options, index in zip(groups, picked, strict=True)]
    return sum(size for size, _ in chosen), sum(loss for _, loss in chosen)


@settings(max_examples=200, deadline=None)
@given(GROUPS, st.integers(0, 300), st.integers(0, 40))
def test_nothing_is_better(groups: list[list[tuple[int, float]]], limit: int, fixed: int) -> None:
    every = [totals(groups, picked) for picked in itertools.product(*(range(len(options)) for options in groups))]
    within = [(size + fixed, loss) for size, loss in every if size + fixed <= limit]
    if not within:
        with pytest.raises(ValueError, match="the smallest options"):
            allocate.choose(groups, limit, fixed)
        return
    full = [pair for pair in within if pair[0] >= allocate.FILL * limit]
    size, loss = totals(groups, tuple(allocate.choose(groups, limit, fixed)))
    assert size + fixed <= limit
    assert loss == pytest.approx(min(loss for _, loss in full or within), abs=1e-9)
    assert size + fixed >= allocate.FILL * limit or not full


@settings(max_examples=60, deadline=None)
@given(GROUPS, st.floats(0, 1))
def test_rounded_steps_never_exceed_the_limit(groups: list[list[tuple[int, float]]], share: float) -> None:
    """Sizes with no common divisor, far more than there are steps."""
    groups = [[(size * 10_000_019 + index, loss) for index, (size, loss) in enumerate(options)] for options in groups]
    least = sum(min(size for size, _ in options) for options in groups)
    most = sum(max(size for size, _ in options) for options in groups)
    limit = least + int(share * (most - least))
    picked = tuple(allocate.choose(groups, limit))
    size, loss = totals(groups, picked)
    assert size <= limit
    every = [totals(groups, one) for one in itertools.product(*(range(len(options)) for options in groups))]
    slack = len(groups) * ((limit - least) // allocate.MAX_STEPS + 1)
    reference = [other for used, other in every if used <= limit - slack and used >= allocate.FILL * limit + slack]
    assert not reference or loss <= min(reference) + 1e-9


def test_a_sharper_budget_moves_bits_to_where_they_matter() -> None:
    groups = [[(3, 8.0), (4, 2.0), (8, 0.0)], [(3, 0.8), (4, 0.2), (8, 0.0)], [(3, 80.0), (4, 20.0), (8, 0.5)]]
    assert allocate.choose(groups, 12) == [1, 1, 1]
    assert allocate.choose(groups, 15) == [1, 0, 2]
    assert allocate.choose(groups, 24) == [2, 2, 2]
