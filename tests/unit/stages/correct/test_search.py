"""The choice of a strength, on losses that are known: against brute force, and on broken ones."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable

import pytest
import torch

from emloc_ray.core.correction import Candidate
from emloc_ray.errors import NumericsError
from emloc_ray.modeling.scoring import RowLosses
from emloc_ray.stages.correct.search import AUTO, ScoredChoice, best_choice

NONE, COVARIANCE, HALF, WHOLE = AUTO


def measure_of(loss: Callable[[Candidate], float], noise: float = 0.01) -> Callable[[Candidate], RowLosses]:
    """Rows whose differences are of a little noise beside a loss that all share."""
    shared = torch.tensor([1.0, 5.0, 2.0, 8.0], dtype=torch.float64)

    def measure(candidate: Candidate) -> RowLosses:
        own = noise * torch.tensor([1.0, -1.0, 1.0, -1.0]) * candidate.strength * (candidate.method != "none")
        return RowLosses(shared + loss(candidate) + own, torch.tensor([2, 2, 2, 2]))

    return measure


def search(measure: Callable[[Candidate], RowLosses]) -> ScoredChoice:
    """Measures each candidate, and chooses."""
    return best_choice({candidate: measure(candidate) for candidate in AUTO})


def bowl(lowest: float) -> Callable[[Candidate], float]:
    """Zero for ``none``, above it for ``covariance``, of ``adapted`` the lowest at some strength."""

    def loss(candidate: Candidate) -> float:
        if candidate.method != "adapted":
            return float(candidate == COVARIANCE)
        return 0.5 * (((candidate.strength - lowest) / lowest) ** 2 - 1)

    return loss


@pytest.mark.parametrize("lowest", [0.3, 0.45, 0.5, 0.75, 1.0, 1.4])
def test_it_finds_what_brute_force_finds_in_four_passes(lowest: float) -> None:
    loss = bowl(lowest)
    choice = search(measure_of(loss))
    grid = [dataclasses.replace(WHOLE, strength=number / 100) for number in range(1, 101)]
    assert choice.chosen.method == "adapted"
    assert loss(choice.chosen) <= min(map(loss, grid)) + 0.02
    assert list(choice.losses)[:4] == list(AUTO)
    between = [record for record in choice.records() if record["interpolated"]]
    assert len(between) == (lowest in (0.3, 0.75))
    for record in between:
        exact = measure_of(loss)(dataclasses.replace(WHOLE, strength=record["strength"]))
        assert record["loss"] == pytest.approx(float(exact.sums.sum()) / 8)


def test_where_nothing_gains_it_is_none() -> None:
    choice = search(measure_of(lambda candidate: candidate.strength * (candidate.method != "none")))
    assert choice.chosen == NONE
    assert choice.considered == HALF  # of half the strength, and so of half the loss
    assert list(choice.losses) == list(AUTO)
    assert choice.certainty(choice.considered) == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("best", [COVARIANCE, HALF])
def test_it_is_taken_where_it_loses_less(best: Candidate) -> None:
    gains = search(measure_of(lambda candidate: -0.001 * (candidate == best), noise=0.5))
    assert gains.chosen.method == best.method
    sure = gains.certainty(gains.chosen)
    assert sure is not None
    assert 0.5 < sure < 0.6
    assert gains.least_certainty() == 0.0


def test_the_best_of_some_is_as_sure_as_all_comparisons_together_leave() -> None:
    generator, trials, hits = torch.Generator().manual_seed(0), 400, 0
    for _ in range(trials):  # none of the candidates gains: one is taken for better by chance
        noise = {candidate: torch.randn(40, generator=generator) for candidate in AUTO}
        choice = best_choice({c: RowLosses(2 + rows, torch.ones(40)) for c, rows in noise.items()})
        least, own = choice.least_certainty(), choice.certainty(choice.considered)
        assert least is not None
        assert own is not None
        assert least <= own
        hits += least > 0.9
    assert hits / trials <= 0.1
    surely = best_choice({c: RowLosses(rows - float(c != NONE), torch.ones(40)) for c, rows in noise.items()})
    assert surely.least_certainty() == pytest.approx(1, abs=1e-2)


def test_the_same_losses_make_the_same_choice() -> None:
    first, second = (search(measure_of(bowl(0.7))) for _ in range(2))
    assert first.records() == second.records()
    assert first.chosen == second.chosen


@pytest.mark.parametrize("broken", [NONE, HALF, WHOLE])
def test_a_candidate_whose_loss_is_no_number_is_told_so_and_not_chosen(broken: Candidate) -> None:
    best = HALF if broken == WHOLE else WHOLE
    loss = bowl(best.strength)
    choice = search(measure_of(lambda candidate: math.nan if candidate == broken else loss(candidate)))
    records = choice.records()
    assert choice.chosen == best
    assert [row["loss"] is None for row in records] == [candidate == broken for candidate in choice.losses]
    json.dumps(records, allow_nan=False)


def test_no_loss_at_all_is_an_error() -> None:
    with pytest.raises(NumericsError, match="NaN or Inf, however corrected"):
        search(measure_of(lambda candidate: math.nan))


def test_what_is_told_of_each() -> None:
    choice = search(measure_of(lambda c: -0.4 * c.strength * (c.method != "none"), noise=0.0))
    none, _, first, *_ = choice.records()
    told = {"gain": 0.0, "standard_error": 0.0, "certainty": 0.5, "interpolated": False}
    assert none == {"method": "none", "clamp": 3.0, "strength": 1.0, "loss": 2.0, **told}
    assert first["gain"] == pytest.approx(0.1)
    assert first["loss"] == pytest.approx(1.9)
    assert first["certainty"] == 1.0


def test_one_row_chooses_none_and_can_be_told() -> None:
    def measure(candidate: Candidate) -> RowLosses:
        return RowLosses(torch.tensor([1.0 + (candidate.method == "none")]), torch.tensor([1]))

    choice = search(measure)
    assert choice.chosen == NONE
    assert choice.records()[2]["standard_error"] is None
    assert choice.records()[2]["certainty"] == 0.5


def test_a_strength_between_is_of_the_method_s_own_losses() -> None:
    """Where covariance is best, those of two strengths of adapted say nothing of its strengths."""
    losses = {NONE: 0.0, COVARIANCE: -0.52, HALF: -0.5, WHOLE: -0.4}
    choice = search(measure_of(losses.__getitem__))
    assert choice.chosen == COVARIANCE
    assert list(choice.losses) == list(AUTO)
