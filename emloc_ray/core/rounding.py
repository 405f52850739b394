"""What rounding a layer's factors adds to its error, without the product with the Gram that measures it."""

import torch

from emloc_ray.core.factorization import Factorization
from emloc_ray.core.whitening import Whitening


def rounding_energy(result: Factorization, whitening: Whitening, dtype: torch.dtype) -> float:
    """About ``tr(R G Rᵀ)`` of ``R = up down − up' down'``, the factors of :func:`factorize` in ``dtype`` being ``up'`` and
    ``down'``; G as ``whitening`` damps it.

    To first order ``R = up dD + dU down``. The error ``Δ`` of the best factors has no part in that: ``upᵀ Δ = 0``, and
    ``Δ G downᵀ = (I − up upᵀ) M up = 0``, for ``up`` spans an invariant subspace of ``M = W G Wᵀ``. So the energies add up.
    Rounding errors are as good as independent, so that on average ``tr(R G Rᵀ) = Σ_ij G_jj dD_ij² + Σ_ij λ_j dU_ij²``.
    """
    up, down = result.factors
    in_d, in_u = ((part - part.to(dtype)).square().sum(dim=0, dtype=torch.float64) for part in (down, up))
    diagonal = whitening.diagonal().double() * whitening.scale
    return float(in_d @ diagonal + in_u @ result.eigenvalues[: up.shape[1]].to(in_u.device))
