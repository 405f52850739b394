"""The knapsack, against every combination of tiny problems; the laws that any answer keeps."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from emloc_ray.stages.factorize.knapsack import pack

Problem = tuple[list[list[int]], list[list[float]]]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    costs, losses = [], []
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, 5))
        costs.append(draw(st.lists(st.integers(1, 30), min_size=size, max_size=size)))
        loss = st.floats(1e-6, 1e3) | st.sampled_from([0.0, 1.0, 1e-9])
        losses.append(draw(st.lists(loss, min_size=size, max_size=size)))
    return costs, losses


def least_loss(problem: Problem, budget: int) -> float:
    """Of all combinations."""
    costs, losses = problem
    return min(
        sum(loss[k] for loss, k in zip(losses, picks, strict=True))
        for picks in itertools.product(*(range(len(cost)) for cost in costs))
        if sum(cost[k] for cost, k in zip(costs, picks, strict=True)) <= budget
    )


# One item loses a thousand times as much as the others can, whatever is chosen of it.
HEAVY: Problem = (
    [[13, 7, 19], [29, 1, 23, 3, 29], [30, 11, 2, 5, 17], [1]],
    [
        [0.2879, 0.0769, 0.0242],
        [0.0084, 0.2228, 0.2956, 0.113, 0.0509],
        [0.2377, 0.1024, 0.086, 0.071, 0.2618],
        [1000.0],
    ],
)


@given(problems(), st.integers(0, 60))
@example(HEAVY, 52 - 11)
def test_it_is_the_best_of_all_combinations(problem: Problem, more: int) -> None:
    costs, losses = problem
    budget = sum(map(min, costs)) + more
    packed = pack(costs, losses, budget)
    best = least_loss(problem, budget)
    assert packed.used == sum(cost[k] for cost, k in zip(costs, packed.picks, strict=True)) <= budget
    assert packed.loss == pytest.approx(sum(loss[k] for loss, k in zip(losses, packed.picks, strict=True)))
    unavoidable = sum(map(min, losses))
    assert packed.loss - unavoidable == pytest.approx(best - unavoidable, rel=2e-4, abs=1e-9 * best)
    assert packed.bound <= best * (1 + 1e-9)
    assert 0 <= packed.gap <= 1


@given(problems(), st.integers(0, 30), st.integers(0, 30))
def test_more_budget_is_never_worse(problem: Problem, less: int, more: int) -> None:
    budget = sum(map(min, problem[0])) + less
    assert pack(*problem, budget + more).loss <= pack(*problem, budget).loss * (1 + 2e-4)


def test_a_budget_below_the_cheapest_is_an_error() -> None:
    with pytest.raises(ValueError, match="cost 3, above the budget of 2"):
        pack([[1, 5], [2]], [[1.0, 0.0], [0.0]], 2)
    assert pack([], [], 0).picks == ()


def test_many_items_are_near_the_bound() -> None:
    numbers = np.random.default_rng(0)
    shares = np.sort(numbers.random((400, 40)), axis=1)
    sizes = 10 ** numbers.uniform(4, 8, (400, 1))
    losses = 10 ** numbers.uniform(-4, 1, (400, 1)) * np.exp(-8 * shares)
    costs = (sizes * shares).astype(int)
    packed = pack(costs.tolist(), losses.tolist(), int(0.3 * sizes.sum()))
    assert packed.used <= 0.3 * sizes.sum()
    assert packed.gap < 1e-4
