"""Allocation: the budget is a law, and nothing of the same cost gains more than the relaxation's bound."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_two_sided import DAMPING, best, root, sums

from emloc_ray.core.allocation import Curve, allocate, plain_gains, spectrum
from emloc_ray.core.ranks import Storage, rank_for_ratio
from emloc_ray.core.whitening import Whitening
from emloc_ray.errors import NumericsError


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


def uniform_ranks(found: list[Curve], ratio: float) -> dict[str, int | None]:
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
        assert rank == c.highest or c.cost(rank + 1) - c.cost(rank) > budget - result.used  # no further step fits
        assert not c.may_be_dense or c.dense - c.cost(rank) > budget - result.used or c.dense <= c.cost(rank)
    assert result.gain == pytest.approx(sum(c.gain(result.ranks[c.name]) for c in found))
    limit = bound(found, budget)
    assert result.gain <= limit * (1 + 1e-9) + 1e-9
    assert result.gain >= sum(c.gain(fallback[c.name]) for c in found) * (1 - 1e-12)


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
    assert result.gain >= sum(c.gain(fallback[c.name]) for c in found) * (1 - 1e-12)
    for c in found:
        rank = result.ranks[c.name]
        assert rank is None or rank <= c.highest
        assert rank is None or rank % multiple == 0 or rank == min(c.least, fallback[c.name])
        if rank is not None and c.highest >= (higher := rank - rank % multiple + multiple):
            assert c.cost(higher) - c.cost(rank) > budget - result.used


def test_pieces_too_large_to_fit_do_not_leave_it_below_the_fallback() -> None:
    wide = curve("wide", (50, 50), [10.0] * 50, may_be_dense=False)
    narrow = curve("narrow", (2, 4), [1.0, 0.7], may_be_dense=False)
    result = allocate([wide, narrow], 206, {"wide": 2, "narrow": 1})
    assert result.ranks == {"wide": 2, "narrow": 1}
    with pytest.raises(ValueError, match="A budget of 100 parameters is 6 short of what 2 linears need"):
        allocate([wide, narrow], 100, {"wide": 1, "narrow": 1})


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_spectra_are_those_of_the_roots_product(shape: tuple[int, int], scale: float) -> None:
    weight, gram, gradients = sums(shape)
    _, both = best(weight * scale, gram, gradients, 4, DAMPING)
    found = spectrum((weight * scale).float(), Whitening(gram.float()), Whitening(gradients.float(), DAMPING))
    torch.testing.assert_close(found, both, rtol=1e-3, atol=1e-5 * float(both[0]))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("scale", [1.0, 1e-9])
@pytest.mark.parametrize("tokens", [200, 1])
def test_gains_of_plain_factors_are_what_these_save(shape: tuple[int, int], scale: float, tokens: int) -> None:
    weight, gram, gradients = sums(shape, tokens)
    weight, rows = weight * scale, min(shape)
    left, right = (root(matrix, share) for matrix, share in ((gradients, DAMPING), (gram, 1e-6)))
    u, s, vh = torch.linalg.svd(weight @ right, full_matrices=False)
    saved = [0.0] + [float((left @ (u[:, :r] * s[:r]) @ vh[:r]).square().sum()) for r in range(1, rows + 1)]
    found = plain_gains(weight.float(), Whitening(gram.float()), Whitening(gradients.float(), DAMPING)).cumsum(0)
    torch.testing.assert_close(found, torch.tensor(saved[1:], dtype=torch.float64), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("shape", [(200, 260), (260, 200)])
def test_a_channel_far_above_the_others_leaves_the_tail_as_it_is(shape: tuple[int, int]) -> None:
    # λ₁ is some 1e10 of the others: float32 would leave these to chance.
    generator = torch.Generator().manual_seed(0)
    weight, tokens = torch.randn(*shape, generator=generator), torch.randn(900, shape[1], generator=generator)
    weight[:, 3] *= 30
    tokens[:, 3] *= 3000
    gram = tokens.double().T @ tokens.double()
    gradients = torch.eye(shape[0], dtype=torch.float64)
    right = root(gram, 1e-6)
    reference = torch.linalg.svdvals(weight.double() @ right).square()
    assert reference[0] > 1e9 * reference[50]
    for gains in (spectrum, plain_gains):
        found = gains(weight, Whitening(gram), Whitening(gradients, 0.0))
        torch.testing.assert_close(found, reference, rtol=1e-3, atol=0.0)


def test_gains_that_ascend_count_as_they_are() -> None:
    late = curve("late", (8, 8), [0.0, 0.0, 6.0, *[0.0] * 5], may_be_dense=False, as_they_are=True)
    even = curve("even", (8, 8), [1.9, 1.9, *[0.0] * 6], may_be_dense=False)
    result = allocate([late, even], 48, {"late": 1, "even": 2})
    assert result.ranks == {"late": 1, "even": 2}
    assert result.gain == pytest.approx(3.8)
    more = allocate([late, even], 64, {"late": 1, "even": 2})
    assert more.ranks == {"late": 3, "even": 1}
    assert more.gain == pytest.approx(7.9)


def test_a_weight_that_is_no_number_names_the_layer() -> None:
    weight, gram, _ = sums((24, 40))
    weight[3, 3] = torch.inf
    for gains in (spectrum, plain_gains):
        with pytest.raises(NumericsError, match="The weight of q_proj"):
            gains(weight, Whitening(gram), Whitening(torch.eye(24)), name="q_proj")
        with pytest.raises(ValueError, match="q_proj reads 40 features"):
            gains(weight, Whitening(torch.eye(3)), Whitening(torch.eye(24)), name="q_proj")
