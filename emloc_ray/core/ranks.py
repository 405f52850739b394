"""How many ranks a compression ratio leaves to a layer."""

import math
from fractions import Fraction
from typing import Literal

# How a layer's factors are stored: ``up`` and ``down``, or pivoted (:mod:`emloc_ray.core.pivoting`).
Storage = Literal["factors", "pivoted"]


# By a layer's smaller side, from which on its ranks are multiples of what: a GPU's matrix products run in tiles of 64, and
# below a multiple of 8 without its tensor cores. Rounding down costs up to 6 % of the rank at ratio 0.5, and 3 % with 8.
_MULTIPLES = ((4096, 64), (1024, 8))
_MOST_RANKS = 128  # that are tried of a layer: one lies within a hundredth of the highest from any that it may have


def rank_multiple(out_features: int, in_features: int, asked: int | Literal["auto"] = "auto") -> int:
    """What a layer's ranks are multiples of: as asked, or 64 for a large layer, 8 for a small one, 1 for a tiny one."""
    if asked != "auto":
        return asked
    return next((multiple for side, multiple in _MULTIPLES if min(out_features, in_features) >= side), 1)


def rank_for_ratio(
    out_features: int, in_features: int, compression_ratio: float, storage: Storage = "factors", multiple: int = 1
) -> int | None:
    """The highest rank whose factors keep at most that share of the layer, at least 1; ``None`` for one that stays dense.

    It is a multiple of ``multiple``, or of 8 or 1 where it is below that.

    ``compression_ratio`` is the fraction of the layer's parameters that is kept: ``r = max(1, ⌊ratio · out · in / (out +
    in)⌋)`` for ``up (out, r)`` and ``down (r, in)``, and pivoted the largest r with ``r (out + in − r) ≤ ratio · out · in``.
    Ratio 1 is dense by definition, and so is a layer whose factors would be no smaller than it (paper, section 3.1).
    """
    if compression_ratio >= 1.0:
        return None
    dense = out_features * in_features
    if storage == "factors":
        rank = int(compression_ratio * dense / (out_features + in_features))
    else:
        half = (out_features + in_features) / 2
        rank = int(half - math.sqrt(half * half - compression_ratio * dense))
    # A ratio such as 0.69 is a little less in binary, and rounding may fall short of a whole rank besides.
    if factor_parameters(out_features, in_features, rank + 1, storage) <= Fraction(str(compression_ratio)) * dense:
        rank += 1
    rank -= rank % next((step for step in (multiple, 8) if multiple % step == 0 and step <= rank), 1)
    rank = max(1, rank)
    return None if factor_parameters(out_features, in_features, rank, storage) >= dense else rank


def possible_ranks(
    out_features: int, in_features: int, uniform: int, storage: Storage = "factors", multiple: int = 1
) -> list[int]:
    """The ranks whose factors are smaller than the layer, ascending: the ``uniform`` one and multiples of ``multiple``, some
    hundred of them at most; 1 where no multiple is low enough."""
    if storage == "pivoted":
        limit = min(out_features, in_features) - 1
    else:
        limit = (out_features * in_features - 1) // (out_features + in_features)
    least = multiple if multiple <= limit else 1
    step = multiple * max(1, math.ceil(limit / (multiple * _MOST_RANKS)))
    return sorted({uniform, least, *range(step, limit + 1, step)})


def factor_parameters(out_features: int, in_features: int, rank: int | None, storage: Storage = "factors") -> int:
    """Parameters of a layer's factors, or of the layer itself where it has no rank."""
    if rank is None:
        return out_features * in_features
    return rank * (out_features + in_features - (rank if storage == "pivoted" else 0))
