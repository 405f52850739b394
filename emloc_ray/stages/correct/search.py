"""Which correction is best on the selection rows: a few methods first, then the strength of the best of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from emloc_ray.core.correction import Candidate
from emloc_ray.core.selection import best_strength, choose, paired_gain
from emloc_ray.errors import NumericsError

if TYPE_CHECKING:
    from emloc_ray.modeling.scoring import RowLosses

NUM_FURTHER = 3
"""How many strengths of the best method are tried beside the first."""

ENOUGH_ROWS = 8
"""Differences between corrections are of one sign on most rows: fewer candidates are begun with rather than fewer rows."""

_MOST = 4.0
_NEAR = 0.1  # of a strength, or of 1 where it is smaller: differences that no loss tells apart


@dataclasses.dataclass(frozen=True)
class ScoredChoice:
    """The candidates in the order they were tried, each with its rows' losses, and which is chosen."""

    candidates: tuple[Candidate, ...]
    losses: tuple[Tensor, ...]
    counts: Tensor
    chosen: int

    def records(self) -> list[dict[str, Any]]:
        """Each candidate with its loss in nats a token and its gain on ``none``, with the gain's standard error; None
        where a loss is no number."""
        plain = self.losses[0]
        rows = []
        for candidate, losses in zip(self.candidates, self.losses, strict=True):
            loss = float(losses.double().sum() / self.counts.sum().clamp_min(1))
            gain = paired_gain(losses, plain, self.counts)
            known = {"loss": loss, "gain": gain.mean, "standard_error": gain.standard_error}
            shown = {key: value if math.isfinite(value) else None for key, value in known.items()}
            rows.append({**dataclasses.asdict(candidate), **shown})
        return rows


def next_candidate(begun: Sequence[Candidate], tried: Mapping[Candidate, Tensor], num_further: int) -> Candidate | None:
    """What to measure after what was ``tried``, in its order, with each row's loss: ``none``, which is the first of ``begun``,
    and the others; then up to ``num_further`` strengths of the best method and λ. None at the end.

    These are twice the first, or half of it where that did not gain; then, twice, where a parabola through the strengths'
    losses is lowest.
    """
    if len(tried) < len(begun):
        return begun[len(tried)]
    return _further(tried) if len(tried) < len(begun) + num_further else None


def best_choice(losses: Mapping[Candidate, RowLosses]) -> ScoredChoice:
    """The best of the candidates that were measured, of which ``none`` is the first: see
    :func:`emloc_ray.core.selection.choose`.

    Raises:
        NumericsError: where no candidate's loss is a number.
    """
    sums = [row_losses.sums for row_losses in losses.values()]
    if not any(math.isfinite(_total(values)) for values in sums):
        raise NumericsError(
            "The loss of the original with the adapter is NaN or Inf, however corrected: check the weights of model and"
            " adapter, and model.dtype."
        )
    counts = next(iter(losses.values())).counts
    return ScoredChoice(tuple(losses), tuple(sums), counts, choose(sums, counts, reference=0))


def _further(tried: Mapping[Candidate, Tensor]) -> Candidate | None:
    """The strength to try next, of the method and λ that did best."""
    none, *others = ((candidate, _total(losses)) for candidate, losses in tried.items())
    known = [(candidate, loss) for candidate, loss in others if math.isfinite(loss)]
    if not known:
        return None
    best = min(known, key=lambda pair: pair[1])[0]
    losses = {c.strength: loss for c, loss in known if (c.method, c.clamp) == (best.method, best.clamp)}
    if len(losses) == 1:
        gains = losses[best.strength] < none[1] or not math.isfinite(none[1])
        strength: float | None = 2 * best.strength if gains else best.strength / 2
    else:
        strength = best_strength({0.0: none[1], **losses}, _MOST)
    if strength is None or any(abs(strength - near) < _NEAR * max(1.0, near) for near in (0.0, *losses)):
        return None
    return dataclasses.replace(best, strength=round(strength, 2))


def _total(losses: Tensor) -> float:
    return float(losses.double().sum())
