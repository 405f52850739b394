"""The leading left singular vectors of a matrix by subspace iteration: products of large matrices, as a GPU likes them.

Block Krylov spaces (:mod:`emloc_ray.core.krylov`) need a fraction of the products, but reorthogonalise narrow blocks, ask at
each whether that went well, and decompose spaces of several times the rank: on a GPU that is most of the time.
"""

import math

import torch
from torch import Tensor

from emloc_ray.core.krylov import (
    MIN_GAP,
    LeadingVectors,
    careful_vectors,
    complement_gain,
    is_lost,
    loss_bound,
    normal_numbers,
    ritz_pairs,
)
from emloc_ray.core.precision import has_fast_float64
from emloc_ray.core.products import energy, wide_product

# Columns beside the rank, as a share of it and at least. Measured at an order of 768, ranks 96 and 192: normal matrices
# settle in 7 to 10 steps, singular values that fall as i^-½, 1/i and 1/i² in 5, 3 and 2.
_SPARE_SHARE, _LEAST_SPARE = 0.3, 16
_ALIGNED = 64  # columns of a fast product
_MAX_SHARE = 0.75  # of the order: past it the full eigendecomposition is as fast
_FIRST_STEPS, _MOST_STEPS_AT_ONCE, _MAX_STEPS = 4, 6, 32


def leading_by_products(matrix: Tensor, rank: int, seed: int = 0) -> LeadingVectors | None:
    """As :func:`emloc_ray.core.krylov.leading_vectors` of ``A (n, k)``, to the same bounds; ``None`` where they do not settle.

    ``Q ← orth(A orth(Aᵀ Q))`` for more columns than the rank, then Rayleigh-Ritz. The host waits only at the
    checks, of which one or two are enough: how many steps go before the next follows from how far the loss is above the bound.
    """
    order = min(matrix.shape)
    width = _ALIGNED * math.ceil((rank + max(_LEAST_SPARE, _SPARE_SHARE * rank)) / _ALIGNED)
    width = min(width, int(_MAX_SHARE * order))
    if width < rank + min(_LEAST_SPARE, rank):
        return None
    total = energy(matrix)
    basis = normal_numbers(len(matrix), width, torch.Generator().manual_seed(seed), matrix)
    done, steps, before = 0, _FIRST_STEPS, math.inf
    while done + steps <= _MAX_STEPS:
        failed = torch.zeros((), dtype=torch.int32, device=matrix.device)
        for _ in range(steps):
            for turned in (matrix.T, matrix):
                basis, wrong = cholesky_qr(turned @ basis)
                failed = failed + wrong
        basis, wrong = cholesky_qr(basis)  # the second time to rounding
        images = matrix.T @ basis
        gram = wide_product(images, images)
        if int(failed + wrong) != 0:
            return None
        pairs = ritz_pairs(gram, rank, total, matrix.dtype)
        rotation = pairs.rotation[:, :rank].to(matrix.dtype)
        values, vectors = pairs.values[:rank], basis @ rotation
        gaps = torch.maximum(values - pairs.values[-1], MIN_GAP * values).clamp_min(torch.finfo(torch.float64).tiny)
        residuals = matrix @ (images @ rotation) - vectors * values.to(matrix.dtype)
        loss = float((residuals.to(torch.float64).square().sum(dim=0) / gaps).sum())
        bound = loss_bound(pairs.energy_left, float(values[0]), matrix.dtype)
        lost = is_lost(pairs.energy_left, total, matrix.dtype)
        if lost or loss <= bound:
            top = LeadingVectors(values, vectors, gaps, pairs.energy_left)
            if pairs.cancelled:
                top = careful_vectors(matrix, basis, images, gram, gaps)
            return top if lost or complement_gain(matrix, top, seed + 1) <= bound else None
        done, excess = done + steps, loss / bound
        per_step = (before / excess) ** (1 / steps) if excess < before < math.inf else 2.0
        steps = min(max(math.ceil(math.log(excess) / math.log(max(per_step, 1.2))), 1), _MOST_STEPS_AT_ONCE)
        before = excess
    return None


def cholesky_qr(columns: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of the span of ``columns (n, p)``, to their condition times rounding, and whether it failed: not 0.

    Nobody waits for an answer. The Gram is in float64, which takes columns as ill-conditioned as float32 can hold (Yamazaki,
    Tomov and Dongarra 2015, "Mixed-precision Cholesky QR factorization", https://doi.org/10.1137/14M0973773). Where float64 is
    slow, the same basis comes from reflections in float32.
    """
    if not has_fast_float64(columns.device):
        basis, upper = torch.linalg.qr(columns)
        turned = torch.where(upper.diagonal() < 0, -1.0, 1.0).to(basis.dtype)
        return basis * turned, torch.zeros((), dtype=torch.int32, device=columns.device)
    lower, failed = torch.linalg.cholesky_ex(wide_product(columns, columns))
    solved: Tensor = torch.linalg.solve_triangular(lower.T.to(columns.dtype), columns, upper=True, left=False)
    return solved, failed
