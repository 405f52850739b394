"""How many ranks a compression ratio leaves to a layer."""

from __future__ import annotations


def rank_for_ratio(out_features: int, in_features: int, compression_ratio: float) -> int | None:
    """``r = max(1, ⌊ratio · out · in / (out + in)⌋)``, or ``None`` for a layer that stays dense.

    ``compression_ratio`` is the fraction of the layer's parameters that the factors ``up (out, r)`` and
    ``down (r, in)`` keep. Ratio 1 is dense by definition, and so is a layer whose factors would be no smaller than it
    (paper, section 3.1).
    """
    if compression_ratio >= 1.0:
        return None
    rank = max(1, int(compression_ratio * out_features * in_features / (out_features + in_features)))
    if rank * (out_features + in_features) >= out_features * in_features:
        return None
    return rank


def factor_parameters(out_features: int, in_features: int, rank: int | None) -> int:
    """Parameters of a layer's factors, or of the layer itself where it has no rank."""
    return out_features * in_features if rank is None else rank * (out_features + in_features)
