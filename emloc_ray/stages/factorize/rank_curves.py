"""Which linear gets how many ranks: the same parameters in all, spent where they gain most.

Each linear has a curve: what it gains by its first r ranks, at ``r (out + in)`` parameters (pivoted: ``r (out + in − r)``),
and dense, at ``out · in``, by all of them (:mod:`emloc_ray.core.spectra`). Of every curve one point is taken
(:mod:`emloc_ray.stages.factorize.knapsack`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from emloc_ray.core.ranks import Storage, factor_parameters
from emloc_ray.stages.factorize.knapsack import pack

_MOST_RANKS = 128  # of a linear that are tried: one lies within a hundredth of the highest from any that it may have


@dataclass(frozen=True)
class Curve:
    """What a linear's ranks gain and cost.

    Attributes:
        name: the linear.
        out_features, in_features: of its weight.
        gains: of each rank, ``(min(out, in),)``, not negative; dense gains their sum.
        may_be_dense: whether it may be left as it is.
        storage: how its factors would be stored.
        multiple: of which its ranks are multiples.
    """

    name: str
    out_features: int
    in_features: int
    gains: Tensor
    may_be_dense: bool = True
    storage: Storage = "factors"
    multiple: int = 1

    @property
    def dense(self) -> int:
        """Parameters of the weight."""
        return self.out_features * self.in_features

    @property
    def least(self) -> int:
        """The lowest rank: the multiple, or 1 where that would be no smaller than the weight."""
        return self.multiple if self.multiple <= self._limit else 1

    @property
    def highest(self) -> int:
        """The highest rank whose factors are smaller than the weight; at least 1."""
        return max(self.least, self._limit - self._limit % self.multiple)

    @property
    def _limit(self) -> int:
        if self.storage == "pivoted":
            return max(1, min(self.out_features, self.in_features) - 1)
        return max(1, (self.dense - 1) // (self.out_features + self.in_features))

    def options(self, uniform: int) -> list[int | None]:
        """The ranks that it may have, None where it may be dense: the ``uniform`` one, the least, and multiples above that, some
        hundred of them at most."""
        step = self.multiple * math.ceil(self.highest / (self.multiple * _MOST_RANKS))
        ranks = sorted({uniform, self.least, *range(step, self.highest + 1, step)})
        return [*ranks, *([None] if self.may_be_dense else [])]

    def cost(self, rank: int | None) -> int:
        """Parameters at a rank; of the weight where that is None."""
        return factor_parameters(self.out_features, self.in_features, rank, self.storage)

    def gain(self, rank: int | None) -> float:
        """What a rank gains, with all before it; dense all of them."""
        return float((self.gains if rank is None else self.gains[:rank]).sum())

    def missed(self, options: Sequence[int | None]) -> list[float]:
        """What each rank does not gain: the sum of those after it."""
        after: list[float] = [*self.gains.flip(0).cumsum(0).flip(0).tolist(), 0.0]
        return [after[len(self.gains) if rank is None else rank] for rank in options]


@dataclass(frozen=True)
class Allocation:
    """The rank of every linear (None: it stays dense), what all of them cost, and what they gain together."""

    ranks: dict[str, int | None]
    used: int
    gain: float


def allocate(curves: Sequence[Curve], budget: int, uniform: Mapping[str, int]) -> Allocation:
    """The ranks that gain most at a cost of at most ``budget`` parameters: multiples of the curves', or the ``uniform`` ones.

    Raises ValueError where the budget holds neither the least ranks nor the uniform ones.
    """
    options = [curve.options(uniform[curve.name]) for curve in curves]
    packed = pack(
        [[curve.cost(rank) for rank in ranks] for curve, ranks in zip(curves, options, strict=True)],
        [curve.missed(ranks) for curve, ranks in zip(curves, options, strict=True)],
        budget,
    )
    ranks = {curve.name: each[pick] for curve, each, pick in zip(curves, options, packed.picks, strict=True)}
    return Allocation(ranks, packed.used, sum(curve.gain(ranks[curve.name]) for curve in curves))
