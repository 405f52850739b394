"""The search over methods and strengths, on losses that are known: against brute force, and on broken ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

import pytest
import torch

from emloc_ray.core.correction import Candidate
from emloc_ray.errors import NumericsError
from emloc_ray.modeling.scoring import RowLosses
from emloc_ray.stages.correct.correct import candidates
from emloc_ray.stages.correct.search import NUM_FURTHER, ScoredChoice, best_choice, next_candidate

BEGUN = candidates("auto", 3.0, 1.0)


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
    while candidate := next_candidate(begun, {c: found.sums for c, found in losses.items()}, NUM_FURTHER):
        losses[candidate] = measure(candidate)
    return best_choice(losses)


def bowl(method: str, lowest: float, depth: float) -> Callable[[Candidate], float]:
    """Zero for ``none``; of one method the lowest at some strength, of the others above zero."""

    def loss(candidate: Candidate) -> float:
        if candidate.method == "none":
            return 0.0
        if candidate.method != method:
            return 9 * candidate.strength
        return depth * (((candidate.strength - lowest) / lowest) ** 2 - 1)

    return loss


@pytest.mark.parametrize("method", ["covariance", "projection"])
@pytest.mark.parametrize("lowest", [0.3, 0.6, 1.0, 1.7, 2.6, 3.5])
def test_it_finds_what_brute_force_finds(method: str, lowest: float) -> None:
    loss = bowl(method, lowest, 0.5)
    choice = search(BEGUN, measure_of(loss))
    found = choice.candidates[choice.chosen]
    grid = min(loss(Candidate(found.method, 3.0, strength / 100)) for strength in range(1, 401))
    assert found.method == method
    assert loss(found) <= grid + 0.01
    assert len(choice.candidates) <= len(BEGUN) + NUM_FURTHER
    assert list(choice.candidates[: len(BEGUN)]) == BEGUN


def test_where_nothing_gains_it_is_none() -> None:
    choice = search(BEGUN, measure_of(bowl("nothing", 1.0, 1.0)))
    assert choice.candidates[choice.chosen] == Candidate("none")
    halves = {c.strength for c in choice.candidates}
    assert halves == {1.0, 0.5}  # where a parabola says that less is better still, none is that


def test_a_gain_within_its_standard_error_is_none() -> None:
    loss = bowl("covariance", 1.0, 0.001)
    assert search(BEGUN, measure_of(loss, noise=0.0)).chosen == 1
    assert search(BEGUN, measure_of(loss, noise=0.5)).chosen == 0


def test_the_same_losses_make_the_same_choice() -> None:
    found = [search(BEGUN, measure_of(bowl("covariance", 1.7, 0.5))) for _ in range(2)]
    assert found[0].records() == found[1].records()
    assert found[0].candidates == found[1].candidates


@pytest.mark.parametrize("broken", ["none", "projection", "covariance"])
def test_a_candidate_whose_loss_is_no_number_is_told_so_and_not_chosen(broken: str) -> None:
    loss = bowl("covariance" if broken != "covariance" else "projection", 1.0, 0.5)
    choice = search(BEGUN, measure_of(lambda c: math.nan if c.method == broken else loss(c)))
    records = choice.records()
    assert choice.candidates[choice.chosen].method == ("covariance" if broken != "covariance" else "projection")
    assert {row["method"] for row in records if row["loss"] is None} == {broken}
    json.dumps(records, allow_nan=False)


def test_no_loss_at_all_is_an_error() -> None:
    with pytest.raises(NumericsError, match="NaN or Inf, however corrected"):
        search(BEGUN, measure_of(lambda candidate: math.nan))


def test_what_is_told_of_each() -> None:
    choice = search(BEGUN[:2], measure_of(lambda c: -0.4 * c.strength * (c.method != "none"), noise=0.0))
    none, first, *_ = choice.records()
    assert none == {"method": "none", "clamp": 3.0, "strength": 1.0, "loss": 2.0, "gain": 0.0, "standard_error": 0.0}
    assert first["gain"] == pytest.approx(0.2)
    assert first["loss"] == pytest.approx(1.8)


def test_one_row_chooses_none_and_can_be_told() -> None:
    def measure(candidate: Candidate) -> RowLosses:
        return RowLosses(torch.tensor([1.0 + (candidate.method == "none")]), torch.tensor([1]))

    choice = search(BEGUN, measure)
    assert choice.chosen == 0
    assert choice.records()[1]["standard_error"] is None
