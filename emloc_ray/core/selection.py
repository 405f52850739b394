"""Choosing among corrections by what rows lose under each: differences are taken row by row, where they are small."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor


class Gain(NamedTuple):
    """How much less is lost than by a reference, in nats a token, and the standard error of that over rows."""

    mean: float
    standard_error: float


def paired_gain(losses: Tensor, reference: Tensor, counts: Tensor) -> Gain:
    """Compares two models by their losses on the same rows ``(rows,)``, each summed over a row's ``counts`` of tokens.

    The mean is ``Σ d / Σ n`` with ``d = reference − losses``, a ratio of sums; its standard error is
    ``√(m / (m − 1) · Σ (d − mean · n)²) / Σ n`` over the m rows (Cochran, Sampling Techniques, 2.11). One row says
    nothing of its error: it is infinite.
    """
    gains, total = (reference - losses).double(), counts.double().sum().clamp_min(1)
    mean = gains.sum() / total
    rows = len(gains)
    if rows < 2:
        return Gain(float(mean), math.inf)
    spread = (gains - mean * counts).square().sum() * rows / (rows - 1)
    return Gain(float(mean), float(spread.sqrt() / total))


def choose(losses: Sequence[Tensor], counts: Tensor, reference: int) -> int:
    """The candidate of the smallest loss, or the reference unless the gain on it is above its standard error.

    ``losses`` has each candidate's rows ``(rows,)``. Candidates with a loss that is no number are left out; of equal
    ones the first is taken.
    """
    sums = {number: float(rows.double().sum()) for number, rows in enumerate(losses)}
    best = min((n for n, total in sums.items() if math.isfinite(total)), key=sums.__getitem__, default=reference)
    if not math.isfinite(sums[reference]):
        return best
    gain = paired_gain(losses[best], losses[reference], counts)
    return best if gain.mean > gain.standard_error else reference


def best_strength(losses: Mapping[float, float], most: float) -> float | None:
    """The minimum of the parabola through three strengths' losses, within 0 and ``most`` and at most twice the largest known.

    The three are the best strength and its neighbours, or the nearest three where it is at an end. A parabola without a
    minimum gives the upper bound where the loss falls towards it, else None.
    """
    known = sorted(strength for strength, loss in losses.items() if math.isfinite(loss))
    if len(known) < 3:
        return None
    most = min(most, 2 * known[-1])
    at = min(max(known.index(min(known, key=losses.__getitem__)), 1), len(known) - 2)
    (x0, x1, x2) = known[at - 1 : at + 2]
    left, right = (losses[x1] - losses[x0]) / (x1 - x0), (losses[x2] - losses[x1]) / (x2 - x1)
    curvature = (right - left) / (x2 - x0)
    if curvature <= 0:
        return most if losses[x2] < losses[x0] else None
    lowest = (x0 + x1) / 2 - left / (2 * curvature)
    return min(max(lowest, 0.0), most)


class Affordable(NamedTuple):
    """How many candidates to begin with, and how many rows each is scored on."""

    num_candidates: int
    num_rows: int


def affordable(
    row_tokens: Sequence[int], max_tokens: int | None, num_candidates: int, num_further: int, enough_rows: int
) -> Affordable:
    """The most candidates for whom ``enough_rows`` are left, and the most rows then, of the first ones.

    All candidates, and ``num_further`` that follow from them, are scored on the same rows: these have ``max_tokens``
    together at most (None: no bound). At least two candidates are begun with, of whom there have to be two; no rows are left
    where two are too many.
    """
    for begun in range(num_candidates, 1, -1):
        rows, left = 0, math.inf if max_tokens is None else max_tokens
        for tokens in row_tokens:
            left -= tokens * (begun + num_further)
            if left < 0:
                break
            rows += 1
        if rows >= min(enough_rows, len(row_tokens)):
            break
    return Affordable(begun, rows)
