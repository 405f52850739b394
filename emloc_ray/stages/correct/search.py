"""Which correction is best on the selection rows: of ``none``, ``covariance`` and ``adapted``, and which strength of that."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from emloc_ray.core.correction import Candidate
from emloc_ray.core.selection import Gain, lowest_between, paired_gain
from emloc_ray.errors import NumericsError

if TYPE_CHECKING:
    from emloc_ray.modeling.scoring import RowLosses

AUTO = (Candidate("none"), Candidate("covariance"), Candidate("adapted", strength=0.5), Candidate("adapted"))
"""What ``auto`` measures. ``adapted`` gained most on emulators that keep predictions, ``covariance`` on uniform ones, and each
lost on some of the other's: see CHANGELOG."""

_NEAR = 0.1  # of a strength, or of 1 where it is smaller: differences that no loss tells apart


def certainty(gain: Gain, num_rows: int) -> float:
    """The probability that a mean gain over so many rows is above zero: Student's t with ``num_rows − 1`` degrees of freedom;
    0.5 where nothing is known, of one row, and where there is neither a gain nor an error. It holds for gains that are normal: of
    skewed ones, many that gain a little and few that lose much, it says more than it should."""
    from scipy.special import stdtr  # which the GPU's benchmark does without

    if not gain.standard_error:
        return 0.5 if not gain.mean else float(gain.mean > 0)
    if not math.isfinite(gain.standard_error):
        return 0.5
    return float(stdtr(num_rows - 1, gain.mean / gain.standard_error))


@dataclasses.dataclass(frozen=True)
class ScoredChoice:
    """Each candidate with its rows' losses, in the order in which they were measured, and the chosen one. ``considered``: the
    chosen one, or the best of the others where ``none`` is chosen."""

    losses: Mapping[Candidate, Tensor]
    counts: Tensor
    num_measured: int
    chosen: Candidate
    considered: Candidate

    def records(self) -> list[dict[str, Any]]:
        """Each candidate with its loss in nats a token, its gain on ``none``, the gain's standard error, how sure it is that
        it gains, and whether its rows' losses were interpolated; None where a loss is no number."""
        rows = []
        for number, (candidate, losses) in enumerate(self.losses.items()):
            gain = self.gain(candidate)
            known = {
                "loss": float(losses.double().sum() / self.counts.sum().clamp_min(1)),
                "gain": gain.mean,
                "standard_error": gain.standard_error,
            }
            shown = {key: value if math.isfinite(value) else None for key, value in known.items()}
            sure = {"certainty": self.certainty(candidate), "interpolated": number >= self.num_measured}
            rows.append({**dataclasses.asdict(candidate), **shown, **sure})
        return rows

    def gain(self, candidate: Candidate) -> Gain:
        """On ``none``, which was measured first."""
        return paired_gain(self.losses[candidate], next(iter(self.losses.values())), self.counts)

    def certainty(self, candidate: Candidate) -> float | None:
        """That it is better than ``none``, by its own rows alone."""
        gain = self.gain(candidate)
        return certainty(gain, len(self.counts)) if math.isfinite(gain.mean) else None

    def least_certainty(self) -> float | None:
        """That ``considered`` is better than ``none``, at least: ``1 − m (1 − p)`` with its own certainty ``p``, as it is the
        best of ``m`` that were compared with it (Bonferroni's inequality; O. J. Dunn, JASA 56 (1961) 52)."""
        own, compared = self.certainty(self.considered), len(self.losses) - 1
        return None if own is None else max(0.0, 1 - compared * (1 - own))


def best_choice(measured: Mapping[Candidate, RowLosses]) -> ScoredChoice:
    """The best of the candidates that were measured, of which ``none`` is the first, and of the strengths between.

    On one row it is ``none``. Candidates with a loss that is no number are left out. Raises NumericsError where no candidate's
    loss is a number.
    """
    losses = {candidate: rows.sums for candidate, rows in measured.items()}
    counts = next(iter(measured.values())).counts
    if not any(math.isfinite(_total(rows)) for rows in losses.values()):
        raise NumericsError(
            "The loss of the original with the adapter is NaN or Inf, however corrected: check the weights of model and"
            " adapter, and model.dtype."
        )
    losses |= _interpolated(losses)
    none, *others = losses
    considered = min(others, key=lambda candidate: _total(losses[candidate]))
    gains = _total(losses[considered]) < _total(losses[none])
    chosen = considered if gains and (len(counts) > 1 or not math.isfinite(_total(losses[none]))) else none
    return ScoredChoice(losses, counts, len(measured), chosen, considered)


def _interpolated(losses: Mapping[Candidate, Tensor]) -> dict[Candidate, Tensor]:
    """The best correction at the strength where the parabola through ``none`` and two of its strengths is lowest, unless one
    that was measured is near."""
    none, *others = losses
    best = min(others, key=lambda candidate: _total(losses[candidate]))
    strengths = {0.0: losses[none], **{c.strength: losses[c] for c in others if c == _at(best, c.strength)}}
    between = lowest_between(strengths) if len(strengths) == 3 else None
    if between is None or any(abs(between.strength - known) < _NEAR * max(1.0, known) for known in strengths):
        return {}
    return {_at(best, between.strength): between.losses}


def _at(candidate: Candidate, strength: float) -> Candidate:
    return dataclasses.replace(candidate, strength=strength)


def _total(losses: Tensor) -> float:
    """The summed loss; infinite where it is no number."""
    total = float(losses.double().sum())
    return total if math.isfinite(total) else math.inf
