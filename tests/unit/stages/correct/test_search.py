"""The search over methods and strengths, on losses that are known: against brute force, and on broken ones."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence

import pytest
import torch

from emloc_ray.core.correction import Candidate
from emloc_ray.core.selection import Gain
from emloc_ray.errors import NumericsError
from emloc_ray.modeling.scoring import RowLosses
from emloc_ray.stages.correct.search import (
    BEGUN,
    NUM_FURTHER,
    ScoredChoice,
    best_choice,
    certainty,
    least_gain,
    next_candidate,
)

NONE, COVARIANCE, PROJECTION = BEGUN


def measure_of(loss: Callable[[Candidate], float], noise: float = 0.01) -> Callable[[Candidate], RowLosses]:
    """Rows whose differences are of a little noise beside a loss that all share."""
    shared = torch.tensor([1.0, 5.0, 2.0, 8.0], dtype=torch.float64)

    def measure(candidate: Candidate) -> RowLosses:
        own = noise * torch.tensor([1.0, -1.0, 1.0, -1.0]) * candidate.strength * (candidate.method != "none")
        return RowLosses(shared + loss(candidate) + own, torch.tensor([2, 2, 2, 2]))

    return measure


def search(begun: Sequence[Candidate], measure: Callable[[Candidate], RowLosses]) -> ScoredChoice:
    """Measures one candidate after another until the search has no more."""
    losses: dict[Candidate, RowLosses] = {}
    while candidate := next_candidate(begun, {c: rows.sums for c, rows in losses.items()}, NUM_FURTHER):
        losses[candidate] = measure(candidate)
    return best_choice(losses)


def bowl(method: str, lowest: float, depth: float = 0.5) -> Callable[[Candidate], float]:
    """Zero for ``none``; of one method the lowest at some strength, of the others above zero."""

    def loss(candidate: Candidate) -> float:
        if candidate.method == "none":
            return 0.0
        if candidate.method != method:
            return 9 * candidate.strength
        return depth * (((candidate.strength - lowest) / lowest) ** 2 - 1)

    return loss


@pytest.mark.parametrize("method", ["covariance", "projection"])
@pytest.mark.parametrize("share", [0.6, 1.0, 1.3, 1.7, 2.0, 2.6])
def test_it_finds_what_brute_force_finds_in_four_passes(method: str, share: float) -> None:
    first = next(candidate for candidate in BEGUN if candidate.method == method)
    lowest, twice = share * first.strength, dataclasses.replace(first, strength=2 * first.strength)
    loss = bowl(method, lowest)
    choice = search(BEGUN, measure_of(loss))
    grid = [dataclasses.replace(first, strength=twice.strength * number / 100) for number in range(1, 101)]
    assert choice.chosen.method == method
    assert loss(choice.chosen) <= min(map(loss, grid)) + 0.02
    assert list(choice.losses)[:4] == [*BEGUN, twice]
    assert choice.num_measured == 4
    between = [record for record in choice.records() if record["interpolated"]]
    assert len(between) <= 1
    assert between or min(abs(lowest - known) for known in (first.strength, twice.strength)) < 0.2 or share > 2
    for record in between:
        exact = measure_of(loss)(dataclasses.replace(first, strength=record["strength"]))
        assert record["loss"] == pytest.approx(float(exact.sums.sum()) / 8)


def test_projection_has_to_gain_for_sure() -> None:
    clear, noisy = (search(BEGUN, measure_of(bowl("projection", 0.5, 0.1), noise)) for noise in (0.01, 0.5))
    assert clear.chosen == PROJECTION
    assert noisy.chosen == NONE
    assert noisy.considered == PROJECTION
    first, second = clear.certainty(PROJECTION), noisy.certainty(PROJECTION)
    assert first is not None
    assert second is not None
    assert 0.5 < second < 0.8 < 0.99 < first


@pytest.mark.parametrize("gain", [Gain(0.06, 0.035), Gain(0.08, 0.035), Gain(0.01, 0.0), Gain(-0.01, 0.0)])
def test_the_least_gain_is_above_zero_where_95_per_cent_are_sure(gain: Gain) -> None:
    assert (least_gain(gain, 6) > 0) == (certainty(gain, 6) > 0.95)


def test_one_row_tells_no_least_gain() -> None:
    assert least_gain(Gain(1.0, math.inf), 1) == -math.inf


def test_a_noisy_projection_leaves_covariance_its_place() -> None:
    def loss(candidate: Candidate) -> float:
        return {"none": 0.0, "covariance": -0.05, "projection": -0.1}[candidate.method]

    measured = {c: measure_of(loss, noise=0.01 if c == COVARIANCE else 2.0)(c) for c in BEGUN}
    assert best_choice(measured).chosen == COVARIANCE


def test_where_nothing_gains_it_is_none() -> None:
    choice = search(BEGUN, measure_of(bowl("nothing", 1.0)))
    assert choice.chosen == NONE
    assert list(choice.losses) == list(BEGUN)
    assert choice.certainty(choice.considered) == pytest.approx(0.0, abs=1e-3)


def test_covariance_is_taken_where_it_loses_less() -> None:
    gains = search(BEGUN, measure_of(lambda c: -0.001 * (c.method == "covariance"), noise=0.5))
    assert gains.chosen.method == "covariance"
    sure = gains.certainty(gains.chosen)
    assert sure is not None
    assert 0.5 < sure < 0.6


def test_the_same_losses_make_the_same_choice() -> None:
    first, second = (search(BEGUN, measure_of(bowl("covariance", 1.7))) for _ in range(2))
    assert first.records() == second.records()
    assert first.chosen == second.chosen


@pytest.mark.parametrize("broken", ["none", "projection", "covariance"])
def test_a_candidate_whose_loss_is_no_number_is_told_so_and_not_chosen(broken: str) -> None:
    best = PROJECTION if broken == "covariance" else COVARIANCE
    loss = bowl(best.method, best.strength)
    choice = search(BEGUN, measure_of(lambda c: math.nan if c.method == broken else loss(c)))
    records = choice.records()
    assert choice.chosen == best
    assert {row["method"] for row in records if row["loss"] is None} == {broken}
    json.dumps(records, allow_nan=False)


def test_no_loss_at_all_is_an_error() -> None:
    with pytest.raises(NumericsError, match="NaN or Inf, however corrected"):
        search(BEGUN, measure_of(lambda candidate: math.nan))


def test_what_is_told_of_each() -> None:
    choice = search(BEGUN, measure_of(lambda c: -0.4 * c.strength * (c.method != "none"), noise=0.0))
    none, first, *_ = choice.records()
    told = {"gain": 0.0, "standard_error": 0.0, "certainty": 0.5, "interpolated": False}
    assert none == {"method": "none", "clamp": 3.0, "strength": 1.0, "loss": 2.0, **told}
    assert first["gain"] == pytest.approx(0.2)
    assert first["loss"] == pytest.approx(1.8)
    assert first["certainty"] == 1.0


def test_one_row_chooses_none_and_can_be_told() -> None:
    def measure(candidate: Candidate) -> RowLosses:
        return RowLosses(torch.tensor([1.0 + (candidate.method == "none")]), torch.tensor([1]))

    choice = search(BEGUN, measure)
    assert choice.chosen == NONE
    assert choice.records()[1]["standard_error"] is None
    assert choice.records()[1]["certainty"] == 0.5
