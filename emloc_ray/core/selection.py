"""Choosing among corrections by what rows lose under each: differences are taken row by row, where they are small."""

import bisect
import itertools
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


class Between(NamedTuple):
    """A strength that was not measured, and each row's loss there ``(rows,)``."""

    strength: float
    losses: Tensor


def lowest_between(losses: Mapping[float, Tensor]) -> Between | None:
    """Where the parabola through three strengths' summed losses is lowest, between the first and the last of them.

    ``losses`` has each row's loss ``(rows,)`` at a strength; a row's loss between is on the row's own parabola. None where
    the summed one has no minimum, or a sum is no number.
    """
    (x0, first), (x1, middle), (x2, last) = sorted(losses.items())
    sums = [float(rows.double().sum()) for rows in (first, middle, last)]
    left, right = (sums[1] - sums[0]) / (x1 - x0), (sums[2] - sums[1]) / (x2 - x1)
    curvature = (right - left) / (x2 - x0)
    if not 0 < curvature < math.inf:
        return None
    x = round(min(max((x0 + x1) / 2 - left / (2 * curvature), x0), x2), 2)
    weights = (
        (x - x1) * (x - x2) / ((x0 - x1) * (x0 - x2)),
        (x - x0) * (x - x2) / ((x1 - x0) * (x1 - x2)),
        (x - x0) * (x - x1) / ((x2 - x0) * (x2 - x1)),
    )
    return Between(x, weights[0] * first + weights[1] * middle + weights[2] * last)


def affordable_rows(row_tokens: Sequence[int], max_tokens: int | None, num_passes: int) -> int:
    """How many of the first rows ``num_passes`` models may read within ``max_tokens`` together; all where it is None."""
    if max_tokens is None:
        return len(row_tokens)
    return bisect.bisect_right(list(itertools.accumulate(row_tokens)), max_tokens // num_passes)
