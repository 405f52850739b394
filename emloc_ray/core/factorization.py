"""The emulator's layer: the best rank-r ``W_E`` under ``‖(W − W_E) G^½‖_F`` (paper, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from emloc_ray.core.whitening import Whitening
from emloc_ray.errors import NumericsError


class LowRankFactors(NamedTuple):
    """``W_E = up @ down``: ``up (out, r)`` with orthonormal columns, ``down (r, in) = upᵀ W``."""

    up: Tensor
    down: Tensor


@dataclass(frozen=True)
class Factorization:
    """What :func:`factorize` found.

    Attributes:
        factors: the low-rank factors, in float32 (float64 for a float64 weight).
        eigenvalues: of ``W G Wᵀ`` with the damped ``G``, descending, float64: all ``min(out, in)`` of them, or the
            largest where only those were computed.
        total_energy: ``tr(W G Wᵀ)``, so that ``1 − Σ_{i ≤ r} eigenvalues_i / total_energy`` is the squared relative
            error of the best rank ``r``, for every ``r``.
        relative_error: ``‖(W − W_E) G^½‖_F / ‖W G^½‖_F`` with the damped ``G``; 0 for a weight of zeros.
        solver: ``"exact"`` or ``"subspace"``.
        dtype: what the layer was computed in: float64 where float32 was not enough.
    """

    factors: LowRankFactors
    eigenvalues: Tensor
    total_energy: float
    relative_error: float
    solver: str
    dtype: torch.dtype


def factorize(
    weight: Tensor,
    whitening: Whitening,
    rank: int,
    *,
    solver: Literal["auto", "exact", "subspace"] = "auto",
    seed: int = 0,
    name: str = "the layer",
) -> Factorization:
    """The best ``W_E = up @ down`` of ``rank`` for ``weight (out, in)`` under ``‖(W − W_E) G^½‖_F``.

    Raises:
        NumericsError: the weight holds a NaN or an Inf; the sentence names ``name``.
        ValueError: the shapes do not fit, or ``rank`` is not within ``1 .. min(out, in)``.
    """
    out_features, in_features = weight.shape
    if in_features != whitening.in_features:
        raise ValueError(f"{name} reads {in_features} features, but its Gram is of {whitening.in_features}.")
    if not 1 <= rank <= min(out_features, in_features):
        raise ValueError(f"{name} has {min(out_features, in_features)} ranks, so rank cannot be {rank}.")
    if not bool(torch.isfinite(weight).all()):
        raise NumericsError(f"The weight of {name} holds a NaN or an Inf.")
    dtype = torch.float64
    w = weight.detach().to(dtype)
    if out_features <= in_features:
        values, vectors = torch.linalg.eigh(w @ whitening.matrix(dtype) @ w.T)
        up = vectors[:, -rank:].flip(1)
    else:
        whitened = w @ whitening.root(dtype)
        values, vectors = torch.linalg.eigh(whitened.T @ whitened)
        up = torch.linalg.qr(whitened @ vectors[:, -rank:].flip(1)).Q
    values = values.flip(0).clamp_min(0) * whitening.scale
    total = float(values.sum())
    error = (float(values[rank:].sum()) / total) ** 0.5 if total > 0 else 0.0
    kept = torch.float64 if weight.dtype == torch.float64 else torch.float32
    factors = LowRankFactors(up.to(kept).contiguous(), (up.T @ w).to(kept))
    return Factorization(factors, values, total, error, "exact", dtype)
