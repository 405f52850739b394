"""Other ranks of a layer that has been factorized under the same Gram: fewer are there already, more are added to them.

``U_r`` holds eigenvectors of ``M = W G Wᵀ`` in descending order, so the best rank ``k ≤ r`` is its first columns; and with
``P = I − U_r U_rᵀ`` the next ones are the top eigenvectors of ``P M P``, that of the layer ``P W`` with the same ``G``.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from emloc_ray.core.factorization import Factorization, LowRankFactors, factorize, polish
from emloc_ray.core.whitening import Whitening, wide_product


def residual_energy(known: Factorization, rank: int) -> float:
    """``tr(Δ G Δᵀ)`` at ``rank`` up to that of ``known``: what it left, and the eigenvalues that go now; nothing cancels."""
    own = known.factors.up.shape[1]
    left = known.relative_error**2 * known.total_energy
    return left + float(known.eigenvalues[rank:own].to(torch.float64).clamp_min(0.0).sum())


def truncated(known: Factorization, rank: int) -> Factorization:
    """The best of ``rank``, which is within that of ``known``: its first columns. Nothing is computed anew.

    Raises:
        ValueError: ``rank`` is not within ``1 .. r``.
    """
    up, down = known.factors
    if not 1 <= rank <= up.shape[1]:
        raise ValueError(f"A factorization of rank {up.shape[1]} holds none of rank {rank}.")
    error = math.sqrt(residual_energy(known, rank) / known.total_energy) if known.total_energy > 0.0 else 0.0
    factors = LowRankFactors(up[:, :rank].contiguous(), down[:rank].contiguous())
    return dataclasses.replace(known, factors=factors, relative_error=error)


def extended(
    weight: Tensor, whitening: Whitening, known: Factorization, rank: int, *, seed: int = 0, name: str = "the layer"
) -> Factorization:
    """The best of a ``rank`` above that of ``known``: its columns, and those of what it leaves of ``weight (out, in)``.

    The factors may come as they are stored, in 16 bits: the columns are made orthonormal again, and what that turned them
    by is in what they leave, from which the new ones are taken.

    Raises:
        NumericsError: the weight holds a NaN or an Inf.
        ValueError: the shapes do not fit, or ``rank`` is not within ``r + 1 .. min(out, in)``.
    """
    own = known.factors.up.shape[1]
    if rank <= own:
        raise ValueError(f"{name} has rank {own} already, so it cannot be extended to {rank}.")
    stored = torch.float64 if weight.dtype == torch.float64 else torch.float32
    weight = weight.detach().to(stored)
    basis = polish(known.factors.up.to(stored))
    # In float64: what is left of the weight may be small beside it.
    rest = weight.to(torch.float64) - wide_product(basis.T, wide_product(basis, weight))
    added = factorize(rest.to(stored), whitening, rank - own, seed=seed, name=name)
    up = polish(torch.cat([basis, added.factors.up], dim=1))
    left = added.relative_error**2 * added.total_energy
    total = known.total_energy
    return Factorization(
        factors=LowRankFactors(up, up.T @ weight),
        eigenvalues=_joined(known.eigenvalues[:own], added.eigenvalues, min(weight.shape) - own),
        total_energy=total,
        relative_error=math.sqrt(left / total) if total > 0.0 else 0.0,
        solver=added.solver,
        dtype=added.dtype,
    )


def _joined(first: Tensor, others: Tensor, room: int) -> Tensor:
    """Eigenvalues that were found one after the other, without those zeros that stand for the first ones again."""
    return torch.cat([first.to(torch.float64), others[:room].to(torch.float64)])
