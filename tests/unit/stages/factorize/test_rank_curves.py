"""Allocation: the budget is a law, and nothing of the same cost gains more than the relaxation's bound."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emloc_ray.core.ranks import Storage, rank_for_ratio
from emloc_ray.stages.factorize.rank_curves import Curve, allocate


def curve(
    name: str,
    shape: tuple[int, int],
    gains: list[float],
    may_be_dense: bool = True,
    storage: Storage = "factors",
    as_they_are: bool = False,
) -> Curve:
    """Of gains in descending order, unless they are to be left ``as_they_are``."""
    ordered = torch.tensor(gains if as_they_are else sorted(gains, reverse=True), dtype=torch.float64)
    return Curve(name, *shape, ordered, may_be_dense, storage)


@st.composite
def curves(draw: st.DrawFn) -> list[Curve]:
    found = []
    storage: Storage = draw(st.sampled_from(["factors", "pivoted"]))
    for number in range(draw(st.integers(1, 5))):
        shape = (draw(st.integers(2, 12)), draw(st.integers(2, 12)))
        size = min(shape)
        value = st.floats(0, 1e3) | st.sampled_from([0.0, 1e-12, 1.0, 1e9])
        gains = draw(st.lists(value, min_size=size, max_size=size))
        found.append(curve(str(number), shape, gains, draw(st.booleans()), storage, draw(st.booleans())))
    return found


def uniform_ranks(found: list[Curve], ratio: float) -> dict[str, int]:
    """Those of the paper; a linear that they would leave dense gets what it may have."""
    ranks = {c.name: rank_for_ratio(c.out_features, c.in_features, ratio, c.storage) for c in found}
    return {c.name: min(ranks[c.name] or c.highest, c.highest) for c in found}


def bound(found: list[Curve], budget: int) -> float:
    """The relaxation's: every linear its one rank, then the steepest pieces of brute-force hulls, the last one in part."""
    left = float(budget - sum(c.cost(1) for c in found))
    gain = sum(c.gain(1) for c in found)
    pieces = []
    for c in found:
        points = [(c.cost(r), c.gain(r)) for r in [*range(1, c.highest + 1), *([None] if c.may_be_dense else [])]]
        points.sort()
        at = 0
        while at + 1 < len(points):
            slopes = [
                ((q[1] - points[at][1]) / max(q[0] - points[at][0], 1e-9), k) for k, q in enumerate(points) if k > at
            ]
            slope, following = max(slopes)
            if slope <= 0:
                break
            pieces.append((slope, points[following][0] - points[at][0]))
            at = following
    for slope, cost in sorted(pieces, reverse=True):
        taken = min(cost, left)
        gain, left = gain + slope * taken, left - taken
    return gain


@given(curves(), st.floats(0.05, 0.95))
def test_the_budget_is_met_and_the_gain_is_between_uniform_and_the_bound(found: list[Curve], ratio: float) -> None:
    fallback = uniform_ranks(found, ratio)
    budget = sum(c.cost(fallback[c.name]) for c in found)
    result = allocate(found, budget, fallback)
    assert list(result.ranks) == [c.name for c in found]
    assert result.used == sum(c.cost(result.ranks[c.name]) for c in found) <= budget
    for c in found:
        rank = result.ranks[c.name]
        if rank is None:
            assert c.may_be_dense
            continue
        assert 1 <= rank <= c.highest
        for higher in c.options(rank):  # none of more gain fits
            assert c.gain(higher) <= c.gain(rank) or c.cost(higher) - c.cost(rank) > budget - result.used
    assert result.gain == pytest.approx(sum(c.gain(result.ranks[c.name]) for c in found))
    limit = bound(found, budget)
    assert result.gain <= limit * (1 + 1e-9) + 1e-9
    assert result.gain >= sum(c.gain(fallback[c.name]) for c in found) * (1 - 1e-6)


@given(curves(), st.floats(0.05, 0.95))
def test_a_larger_budget_s_bound_is_within_a_piece(found: list[Curve], ratio: float) -> None:
    fallback = uniform_ranks(found, ratio)
    budget = sum(c.cost(fallback[c.name]) for c in found)
    gain = allocate(found, budget, fallback).gain
    largest = max(c.gain(None) for c in found)
    assert gain >= bound(found, budget) - largest - 1e-9


def test_small_cases_are_solved_as_by_trying_all() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        found = [
            curve(str(k), (6, 6), torch.rand(6, generator=generator).pow(3).tolist()) for k in range(3)
        ]  # equal steps: greedy is exact but for the dense pieces
        budget = 3 * 12 + 24
        result = allocate(found, budget, {c.name: 1 for c in found})
        options = [[1, 2, None]] * 3
        tried = [
            sum(c.gain(r) for c, r in zip(found, ranks, strict=True))
            for ranks in itertools.product(*options)
            if sum(c.cost(r) for c, r in zip(found, ranks, strict=True)) <= budget
        ]
        assert result.gain == pytest.approx(max(tried))


def test_a_linear_that_matters_is_left_dense_and_one_that_does_not_pays() -> None:
    flat, steep = [1.0] * 32, [100.0] + [1e-6] * 31
    found = [curve("flat", (32, 32), flat), curve("steep", (32, 32), steep)]
    uniform = rank_for_ratio(32, 32, 0.6)
    assert uniform == 9
    result = allocate(found, 18 * 64, {"flat": 9, "steep": 9})
    assert result.ranks == {"flat": None, "steep": 2}
    never = [curve("flat", (32, 32), flat, may_be_dense=False), found[1]]
    assert allocate(never, 18 * 64, {"flat": 9, "steep": 9}).ranks == {"flat": 15, "steep": 3}


@given(curves(), st.sampled_from([2, 3, 4]), st.floats(0.2, 0.95))
def test_ranks_lie_on_the_grid(found: list[Curve], multiple: int, ratio: float) -> None:
    found = [replace(c, multiple=multiple) for c in found]
    ranks = {c.name: rank_for_ratio(c.out_features, c.in_features, ratio, c.storage, multiple) for c in found}
    fallback = {c.name: min(ranks[c.name] or c.highest, c.highest) for c in found}
    budget = sum(c.cost(fallback[c.name]) for c in found)
    result = allocate(found, budget, fallback)
    assert result.used <= budget
    assert result.gain >= sum(c.gain(fallback[c.name]) for c in found) * (1 - 1e-6)
    for c in found:
        rank = result.ranks[c.name]
        assert rank is None or rank <= c.highest
        assert rank is None or rank % multiple == 0 or rank in (c.least, fallback[c.name])


def test_pieces_too_large_to_fit_do_not_leave_it_below_the_fallback() -> None:
    wide = curve("wide", (50, 50), [10.0] * 50, may_be_dense=False)
    narrow = curve("narrow", (2, 4), [1.0, 0.7], may_be_dense=False)
    result = allocate([wide, narrow], 206, {"wide": 2, "narrow": 1})
    assert result.ranks == {"wide": 2, "narrow": 1}
    with pytest.raises(ValueError, match="cost 106, above the budget of 100"):
        allocate([wide, narrow], 100, {"wide": 1, "narrow": 1})


def test_gains_that_ascend_count_as_they_are() -> None:
    late = curve("late", (8, 8), [0.0, 0.0, 6.0, *[0.0] * 5], may_be_dense=False, as_they_are=True)
    even = curve("even", (8, 8), [1.9, 1.9, *[0.0] * 6], may_be_dense=False)
    result = allocate([late, even], 48, {"late": 1, "even": 2})
    assert result.ranks == {"late": 1, "even": 2}
    assert result.gain == pytest.approx(3.8)
    more = allocate([late, even], 64, {"late": 1, "even": 2})
    assert more.ranks == {"late": 3, "even": 1}
    assert more.gain == pytest.approx(7.9)
