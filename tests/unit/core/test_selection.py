"""The laws of choosing on few rows: against numpy's least squares, brute force and plain sums."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from emloc_ray.core.selection import affordable, best_strength, choose, paired_gain

seeds = st.integers(0, 2**31 - 1)


def rows(seed: int, candidates: int, count: int) -> tuple[list[Tensor], Tensor]:
    """Losses of correlated candidates, and each row's tokens."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 9, (count,), generator=generator)
    shared = torch.rand(count, generator=generator, dtype=torch.float64) * counts
    noise = torch.randn(candidates, count, generator=generator, dtype=torch.float64)
    return list(shared + 0.1 * noise), counts


@given(seeds, st.integers(1, 5), st.integers(1, 12))
def test_what_is_chosen_is_never_worse_than_the_reference(seed: int, candidates: int, count: int) -> None:
    losses, counts = rows(seed, candidates, count)
    for reference in range(candidates):
        chosen = choose(losses, counts, reference)
        assert losses[chosen].sum() <= losses[reference].sum()
        if chosen != reference:
            gain = paired_gain(losses[chosen], losses[reference], counts)
            assert gain.mean > gain.standard_error
            assert losses[chosen].sum() == min(rows.sum() for rows in losses)
        assert choose(losses, counts, reference) == chosen


def test_a_gain_on_every_row_is_taken_and_one_on_some_is_not() -> None:
    counts, plain = torch.tensor([2, 2, 2, 2]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert choose([plain, plain - 0.1], counts, 0) == 1
    assert choose([plain, plain - torch.tensor([1.0, -0.5, 0.1, -0.4])], counts, 0) == 0


def test_ties_go_to_the_reference_then_to_the_first() -> None:
    counts, plain = torch.tensor([1, 1, 1]), torch.tensor([1.0, 2.0, 3.0])
    assert choose([plain - 1, plain - 1, plain], counts, 2) == 0
    assert choose([plain, plain, plain.clone()], counts, 1) == 1


def test_one_row_says_too_little() -> None:
    losses = [torch.tensor([3.0]), torch.tensor([1.0])]
    assert choose(losses, torch.tensor([1]), 0) == 0
    assert paired_gain(losses[1], losses[0], torch.tensor([1])) == (2.0, math.inf)


def test_rows_without_tokens_count_nothing() -> None:
    gain = paired_gain(torch.zeros(3), torch.zeros(3), torch.zeros(3, dtype=torch.int64))
    assert gain == (0.0, 0.0)
    assert choose([torch.zeros(3), torch.zeros(3)], torch.zeros(3, dtype=torch.int64), 0) == 0


def test_a_loss_that_is_no_number_is_left_out() -> None:
    counts, plain = torch.tensor([1, 1, 1]), torch.tensor([1.0, 2.0, 3.0])
    broken = torch.tensor([0.0, math.nan, 0.0])
    assert choose([plain, broken, plain - 0.1], counts, 0) == 2
    assert choose([plain, broken, torch.full((3,), -math.inf)], counts, 0) == 0
    assert choose([broken, plain, plain + 1], counts, 0) == 1


@given(seeds, st.integers(2, 40))
def test_the_standard_error_is_that_of_resampled_rows(seed: int, count: int) -> None:
    """Of rows of one token each it is the textbook's: the standard deviation over the root of how many."""
    losses, _ = rows(seed, 2, count)
    gain = paired_gain(losses[1], losses[0], torch.ones(count))
    differences = (losses[0] - losses[1]).numpy()
    assert gain.mean == pytest.approx(differences.mean(), abs=1e-12)
    assert gain.standard_error == pytest.approx(differences.std(ddof=1) / math.sqrt(count))


@given(
    st.floats(0.1, 3.9),
    st.floats(0.01, 10),
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 3.0]), min_size=3, max_size=6, unique=True),
)
def test_a_parabola_s_lowest_point_is_found(lowest: float, curvature: float, strengths: list[float]) -> None:
    losses = {s: 2 + curvature * (s - lowest) ** 2 for s in strengths}
    assert best_strength(losses, 4.0) == pytest.approx(min(lowest, 2 * max(strengths)), abs=1e-6)


@given(seeds)
def test_it_is_numpy_s_fit(seed: int) -> None:
    generator = np.random.default_rng(seed)
    losses = dict(zip([0.0, 1.0, 2.0], generator.normal(size=3).tolist(), strict=True))
    found = best_strength(losses, 2.0)
    grid = np.linspace(0, 2, 20_001)
    curve = np.polyval(np.polyfit([0, 1, 2], list(losses.values()), 2), grid)
    if found is not None:
        assert np.interp(found, grid, curve) == pytest.approx(curve.min(), abs=1e-6)
    else:
        assert losses[0.0] <= losses[2.0]


def test_what_has_no_lowest_point() -> None:
    assert best_strength({0.0: 1.0, 1.0: 0.5}, 4.0) is None
    assert best_strength({0.0: 1.0, 1.0: 0.5, 2.0: math.nan}, 4.0) is None
    assert best_strength({0.0: 3.0, 1.0: 2.0, 2.0: 1.0}, 3.0) == 3.0
    assert best_strength({0.0: 1.0, 1.0: 2.0, 2.0: 2.5}, 4.0) is None


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=12),
    st.integers(0, 3000),
    st.integers(2, 5),
    st.integers(0, 3),
    st.integers(1, 8),
)
def test_the_budget_is_held_to_the_token_and_used(
    row_tokens: list[int], budget: int, candidates: int, further: int, enough: int
) -> None:
    begun, count = affordable(row_tokens, budget, candidates, further, enough)
    assert 2 <= begun <= candidates
    assert (begun + further) * sum(row_tokens[:count]) <= budget
    if count < len(row_tokens):  # one more row, or one more candidate on enough of them, would be too much
        assert (begun + further) * sum(row_tokens[: count + 1]) > budget
    if begun < candidates:
        assert (begun + 1 + further) * sum(row_tokens[:enough]) > budget


def test_without_a_bound_all_is_tried_on_all_rows() -> None:
    assert affordable([7, 1, 90], None, 4, 3, 8) == (4, 3)
    assert affordable([7, 1, 90], 0, 4, 3, 8) == (2, 0)
