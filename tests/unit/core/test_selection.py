"""The laws of choosing on few rows: against scipy's tests, numpy's parabolas, brute force and plain sums."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import stdtr
from torch import Tensor

from emloc_ray.core.selection import Gain, affordable_rows, lowest_between, paired_gain
from emloc_ray.stages.correct.search import certainty

seeds = st.integers(0, 2**31 - 1)


def rows(seed: int, candidates: int, count: int) -> list[Tensor]:
    """Losses of correlated candidates."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.rand(count, generator=generator, dtype=torch.float64)
    return list(shared + 0.1 * torch.randn(candidates, count, generator=generator, dtype=torch.float64))


def test_one_row_says_too_little() -> None:
    gain = paired_gain(torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([1]))
    assert gain == (2.0, math.inf)
    assert certainty(gain, 1) == 0.5


def test_rows_without_tokens_count_nothing() -> None:
    gain = paired_gain(torch.zeros(3), torch.zeros(3), torch.zeros(3, dtype=torch.int64))
    assert gain == (0.0, 0.0)
    assert certainty(gain, 3) == 0.5


@given(seeds, st.integers(2, 40))
def test_the_standard_error_is_that_of_resampled_rows(seed: int, count: int) -> None:
    """Of rows of one token each it is the textbook's: the standard deviation over the root of how many."""
    plain, other = rows(seed, 2, count)
    gain = paired_gain(other, plain, torch.ones(count))
    differences = (plain - other).numpy()
    assert gain.mean == pytest.approx(differences.mean(), abs=1e-12)
    assert gain.standard_error == pytest.approx(differences.std(ddof=1) / math.sqrt(count))


def test_of_rows_that_truly_gain_nothing_as_many_look_sure_as_it_says() -> None:
    """Brute force: of gains that are chance, a tenth of the trials is 90 % sure or more."""
    generator = np.random.default_rng(0)
    differences = torch.from_numpy(generator.normal(size=(2000, 6)))
    sure = [certainty(paired_gain(-d, torch.zeros(6), torch.ones(6)), 6) for d in differences]
    for level in (0.5, 0.9, 0.99):
        assert np.mean([one > level for one in sure]) == pytest.approx(1 - level, abs=0.03)


def test_without_an_error_a_gain_is_sure() -> None:
    assert certainty(Gain(0.1, 0.0), 3) == 1.0
    assert certainty(Gain(-0.1, 0.0), 3) == 0.0
    assert certainty(Gain(0.3, 0.1), 9) == float(stdtr(8, 3.0))


@given(seeds, st.sampled_from([(0.0, 1.0, 2.0), (0.0, 0.5, 1.0), (0.0, 0.3, 2.0)]))
def test_between_strengths_rows_are_on_their_parabolas(seed: int, strengths: tuple[float, float, float]) -> None:
    losses = dict(zip(strengths, rows(seed, 3, 5), strict=True))
    found = lowest_between(losses)
    table = torch.stack(list(losses.values())).numpy()
    curve = np.polyfit(strengths, table.sum(axis=1), 2)
    if found is None:
        assert curve[0] <= 1e-9
        return
    grid = np.linspace(0, strengths[-1], 20_001)
    assert 0 <= found.strength <= strengths[-1]
    assert np.polyval(curve, found.strength) == pytest.approx(np.polyval(curve, grid).min(), abs=1e-3 + 0.01 * curve[0])
    expected = [np.polyval(np.polyfit(strengths, row, 2), found.strength) for row in table.T]
    np.testing.assert_allclose(found.losses, expected, atol=1e-9)


def test_what_has_no_lowest_point_between() -> None:
    def losses(*sums: float) -> dict[float, Tensor]:
        return {float(at): torch.tensor([value]) for at, value in enumerate(sums)}

    assert lowest_between(losses(1.0, 2.0, 2.5)) is None
    assert lowest_between(losses(1.0, math.nan, 2.5)) is None
    assert lowest_between(losses(math.inf, 1.0, 2.5)) is None
    found = lowest_between(losses(3.0, 2.0, 1.5))
    assert found is not None
    assert found.strength == 2.0
    assert float(found.losses) == pytest.approx(1.5)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(0, 3000), st.integers(1, 5))
def test_the_budget_is_held_to_the_token_and_used(row_tokens: list[int], budget: int, passes: int) -> None:
    count = affordable_rows(row_tokens, budget, passes)
    fits = [passes * sum(row_tokens[:number]) <= budget for number in range(len(row_tokens) + 1)]
    assert count == max(number for number, fit in enumerate(fits) if fit)


def test_without_a_bound_all_rows_are_read() -> None:
    assert affordable_rows([7, 1, 90], None, 3) == 3
    assert affordable_rows([7, 1, 90], 0, 3) == 0
