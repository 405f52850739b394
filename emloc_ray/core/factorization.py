"""The emulator's layer: the best rank-r ``W_E`` under ``‖(W − W_E) G^½‖_F`` (paper, section 3.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from emloc_ray.core.gram import Gram
from emloc_ray.core.whitening import Whitening, is_finite
from emloc_ray.errors import NumericsError

Solver = Literal["auto", "exact", "subspace"]

# What `_rounding_share` decides. Over real layers, and layers with channels 30 to 3,000 times the others, up to the first
# bound the residual energy was off by less than 1e-3 and the factors' within 2e-4 of the optimum. Up to the second the
# factors' was within 7e-4 wherever the residual passed its direct check.
_SURE_ROUNDING_SHARE = 1e-3
_MAX_ROUNDING_SHARE = 5e-3
_MAX_RESIDUAL_DIFFERENCE = 1e-3

# The subspace solver stops where the estimated loss of energy is below this share of the residual energy. The true loss
# was up to 2.7 times the estimate over real layers, and the relative error loses half of it: less than 1e-3.
_MAX_LOSS_SHARE = 6e-4
# Columns carried beyond the rank, as a share of it, and at least so many.
_OVERSAMPLING = 0.25
_MIN_OVERSAMPLING = 8
# The roots of the Chebyshev polynomial of degree 3 on [0, 1], smallest first: the estimate of the interval's end settles
# while the first ones are used.
_SHIFTS = tuple((1.0 - math.cos(math.pi * (2 * j + 1) / 6.0)) / 2.0 for j in range(3))
# The interval to damp ends at this share of the mean of the last Rayleigh quotients, which lie above the eigenvalue there.
_DAMPED_SHARE = 0.85
_MAX_ROUNDS = 3
# Measured: below this order, or for ranks above this share of it, the full eigendecomposition is as fast.
_SUBSPACE_MIN_ORDER = 128
_SUBSPACE_MAX_SHARE = 0.35


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
            largest ``rank`` where only those were computed.
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


class _Eigenpairs(NamedTuple):
    """The top of a symmetric ``M (n, n)``.

    ``values (k,)`` descend: all ``n`` from the exact solver, ``r`` from the other; ``vectors (n, r)`` are orthonormal;
    ``residuals (r,)`` are ``‖M u − θ u‖²``; ``basis (n, > r)`` spans them and more, where there was one.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    basis: Tensor | None = None


def factorize(
    weight: Tensor,
    whitening: Whitening,
    rank: int,
    *,
    solver: Solver = "auto",
    seed: int = 0,
    name: str = "the layer",
) -> Factorization:
    """The best ``W_E = up @ down`` of ``rank`` for ``weight (out, in)`` under ``‖(W − W_E) G^½‖_F``.

    ``exact`` takes ``U_r`` from the full eigendecomposition of the smaller side: of ``W G Wᵀ`` where ``out ≤ in``, else of
    ``Lᵀ Wᵀ W L`` with ``G = L Lᵀ``, ``U_r = orth(W L V_r)``. ``subspace`` finds only the top eigenvectors, until the
    relative error is within 1e-3 (relative) of the optimum, and falls back to ``exact`` where it does not get there. ``auto``
    takes what is faster for the shape. Either is computed in float32 and once more in float64 where rounding could
    change the residual by 1e-3. The result depends on ``seed`` (the subspace's start) only within these bounds.

    Args:
        weight: ``(out, in)``, any floating dtype.
        whitening: the damped Gram of its inputs, shared by the linears that read the same tensor.
        rank: within ``1 .. min(out, in)``.
        solver: ``auto``, ``exact`` or ``subspace``.
        seed: of the subspace solver's start.
        name: the layer, for the errors.

    Raises:
        NumericsError: the weight holds a NaN or an Inf.
        ValueError: the shapes do not fit, or ``rank`` is out of its range.
    """
    out_features, in_features = weight.shape
    order = min(out_features, in_features)
    if in_features != whitening.in_features:
        raise ValueError(f"{name} reads {in_features} features, but its Gram is of {whitening.in_features}.")
    if not 1 <= rank <= order:
        raise ValueError(f"{name} has {order} ranks, so its rank cannot be {rank}.")
    if solver == "auto":
        pays = order >= _SUBSPACE_MIN_ORDER and rank <= _SUBSPACE_MAX_SHARE * order
        solver = "subspace" if pays else "exact"
    stored = torch.float64 if weight.dtype == torch.float64 else torch.float32
    scaled, scale = _scaled(weight.detach().to(stored), name)
    result, trusted, basis = _factorize_scaled(scaled, whitening, rank, solver, seed)
    if not trusted and stored == torch.float32:
        result, _, _ = _factorize_scaled(scaled.to(torch.float64), whitening, rank, solver, seed, basis)
    energy_scale = scale * scale * whitening.scale
    up, down = result.factors
    return Factorization(
        factors=LowRankFactors(up.to(stored).contiguous(), (down if scale == 1.0 else down * scale).to(stored)),
        eigenvalues=result.eigenvalues * energy_scale,
        total_energy=result.total_energy * energy_scale,
        relative_error=result.relative_error,
        solver=result.solver,
        dtype=result.dtype,
    )


def _scaled(weight: Tensor, name: str) -> tuple[Tensor, float]:
    """``(W / s, s)``: ``s = 1`` unless products of ``W``'s elements could leave float32's range.

    Raises:
        NumericsError: ``W`` holds a NaN or an Inf.
    """
    norm = float(torch.linalg.vector_norm(weight))
    typical = norm / math.sqrt(weight.numel())
    if 1e-6 < typical < 1e6:
        return weight, 1.0
    if not is_finite(weight):
        raise NumericsError(f"The weight of {name} holds a NaN or an Inf.")
    largest = float(weight.abs().max())
    if largest == 0.0:
        return weight, 1.0
    # A power of two, so that nothing is rounded; never below the normal range, where its inverse would overflow.
    scale = 2.0 ** max(math.frexp(largest)[1], -126)
    return weight / scale, scale


def _factorize_scaled(
    weight: Tensor, whitening: Whitening, rank: int, solver: Solver, seed: int, start: Tensor | None = None
) -> tuple[Factorization, bool, Tensor | None]:
    """The factorization in the dtype of ``weight`` under ``G'``, and whether that dtype was wide enough for it.

    The third is the subspace solver's basis, from which a wider dtype may ``start``.
    """
    tall = weight.shape[0] > weight.shape[1]
    if tall:
        whitened = whitening.whiten(weight)
        gram = Gram.zero(weight.shape[1], weight.dtype, weight.device)
        gram.update(whitened)
        # The eigendecomposition reads the lower triangle alone.
        matrix = gram.symmetric() if solver == "subspace" else gram.matrix
    else:
        matrix = whitening.outer(weight)
    total = float(matrix.diagonal().sum(dtype=torch.float64))
    top = _subspace(matrix, rank, seed, start) if solver == "subspace" else None
    used = "exact" if top is None else "subspace"
    if top is None:
        top = _exact(matrix, rank)
    values = top.values.to(torch.float64).clamp_min(0.0)
    residual = float(values[rank:].sum()) if len(values) == len(matrix) else total - float(values.sum())
    share = 0.0 if rank == len(matrix) or total <= 0.0 else _rounding_share(values, residual, rank, weight.dtype)
    up = top.vectors
    if tall:
        scales = values[:rank].sqrt().to(weight.dtype).clamp_min(torch.finfo(weight.dtype).tiny)
        up = _polish(whitened @ up / scales)
        # orth(W L V) captures tr((VᵀMV)⁻¹ VᵀM²V) of the energy, that is ‖M v − θ v‖² / θ more than V does.
        residual -= float((top.residuals / scales.square()).sum(dtype=torch.float64))
    factors = LowRankFactors(up, up.T @ weight)
    trusted = share <= _SURE_ROUNDING_SHARE
    if not trusted and share <= _MAX_ROUNDING_SHARE:
        direct = whitening.energy(weight - factors.up @ factors.down)
        trusted = abs(direct - residual) <= _MAX_RESIDUAL_DIFFERENCE * direct
        residual = direct
    error = math.sqrt(max(residual, 0.0) / total) if total > 0.0 else 0.0
    return Factorization(factors, values, total, error, used, weight.dtype), trusted, top.basis


def _rounding_share(values: Tensor, residual: float, rank: int, dtype: torch.dtype) -> float:
    """``r u λ₁ / Σ_{i > r} λ_i``, ``u`` the unit roundoff: how much of the residual energy rounding may move.

    Forming ``M`` and its eigenvectors moves each of ``r`` eigenvalues by some ``u λ₁``. The share costs nothing, and grows
    with both faults of a residual near the rounding: an eigenvalue tail that differs from the direct ``tr(Δ G Δᵀ)``, and
    eigenvectors that mix. A residual below the rounding gives a share of order one, whatever was computed, so that it
    is caught. The direct trace, whose own rounding is of order ``u``, is left to the layers between.
    """
    unit_roundoff = torch.finfo(dtype).eps / 2.0
    return rank * unit_roundoff * float(values[0]) / residual if residual > 0.0 else math.inf


def _exact(matrix: Tensor, rank: int) -> _Eigenpairs:
    """All eigenvalues and the top ``rank`` eigenvectors by a full eigendecomposition."""
    # The lower triangle, handed over as the upper one of the transpose: LAPACK is a tenth faster on that side.
    values, vectors = torch.linalg.eigh(matrix.mT, UPLO="U")
    return _Eigenpairs(values.flip(0), vectors[:, -rank:].flip(1), torch.zeros_like(values[:rank]))


def _subspace(matrix: Tensor, rank: int, seed: int, start: Tensor | None = None) -> _Eigenpairs | None:
    """The top ``rank`` eigenpairs of a positive semidefinite ``M (n, n)``, or ``None`` where they do not settle.

    Subspace iteration with oversampling: from ``orth(M Ω)``, each step ``Q ← orth((M − a x) Q)`` takes for ``x`` the next
    root of a Chebyshev polynomial on ``[0, 1]``, which damps the eigenvalues in ``[0, a]`` that are not wanted; applied
    factor by factor, because the whole polynomial would drown all in the largest eigenvalue. Then Rayleigh-Ritz
    (Zhou, Saad, Tiago and Chelikowsky, J. Comput. Phys. 219, 2006, without their recurrence).

    It has settled where the energy still missed, ``Σ ‖M u − θ u‖² / (θ − μ)`` to second order, ``μ`` the mean of the
    other eigenvalues, is below ``_MAX_LOSS_SHARE`` of the residual energy ``tr M − Σ θ``. In float32 it also ends where
    rounding is too much of that energy: ``start`` hands the basis it had to float64, which tries it before any step.
    """
    n = len(matrix)
    width = rank + max(_MIN_OVERSAMPLING, int(_OVERSAMPLING * rank))
    if 4 * width > 3 * n:
        return None
    total = float(matrix.diagonal().sum(dtype=torch.float64))
    if start is None:
        numbers = _random_numbers(n, width, seed, matrix)
        basis = matrix @ numbers
        # Two passes: the first by Ωᵀ M Ω, whose condition is that of M Ω's Gram without the square.
        basis = _orthonormal(_orthonormal(basis, numbers.T @ basis))
    else:
        basis = _orthonormal(start.to(matrix.dtype))
    last = max(1, width // 8)
    for done in range(_MAX_ROUNDS):
        for shift in _SHIFTS if done or start is None else ():
            image = matrix @ basis
            end = _DAMPED_SHARE * float((basis[:, -last:] * image[:, -last:]).sum()) / last
            basis = _orthonormal(image.sub_(basis, alpha=end * shift))
        image = matrix @ basis
        rotation = torch.linalg.eigh(basis.T @ image).eigenvectors.flip(1)
        top = _ritz_pairs(basis @ rotation[:, :rank], image @ rotation[:, :rank])
        missed = total - float(top.values.sum(dtype=torch.float64))
        share = _rounding_share(top.values, missed, rank, matrix.dtype)
        if matrix.dtype == torch.float32 and share > _MAX_ROUNDING_SHARE:
            return top._replace(basis=basis)
        gaps = (top.values - missed / (n - rank)).clamp_min(torch.finfo(matrix.dtype).eps * float(top.values[0]))
        if float((top.residuals / gaps).sum()) <= _MAX_LOSS_SHARE * missed:
            return top._replace(basis=basis)
        basis = basis @ rotation
    return None


def _ritz_pairs(vectors: Tensor, images: Tensor) -> _Eigenpairs:
    """``U``, ``θ`` and ``‖M U − U θ‖²`` from nearly orthonormal ``U (n, r)`` and ``M U``, made orthonormal to rounding."""
    lower, failed = torch.linalg.cholesky_ex(vectors.T @ vectors)
    if int(failed) == 0:
        vectors, images = (torch.linalg.solve_triangular(lower.T, x, upper=True, left=False) for x in (vectors, images))
    values = (vectors * images).sum(dim=0)
    residuals = (images - vectors * values).square().sum(dim=0)
    return _Eigenpairs(values, vectors, residuals)


def _random_numbers(n: int, width: int, seed: int, like: Tensor) -> Tensor:
    """A Hankel matrix ``(n, width)`` of ``n + width`` normal numbers, drawn on the CPU: the same on every device.

    It serves as a full Gaussian one would, and drawing that takes longer than a product with ``M``.
    """
    numbers = torch.randn(n + width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return numbers.to(like.device, like.dtype).as_strided((n, width), (1, 1)).contiguous()


def _orthonormal(basis: Tensor, gram: Tensor | None = None) -> Tensor:
    """An orthonormal basis of the columns' span, by Cholesky of their Gram, or of the ``gram`` given, where it has one.

    Several times as fast as Householder's QR, which takes over where the columns are dependent.
    """
    lower, failed = torch.linalg.cholesky_ex(basis.T @ basis if gram is None else gram)
    if int(failed) != 0:
        return _householder(basis)
    solved: Tensor = torch.linalg.solve_triangular(lower.T, basis, upper=True, left=False)
    return solved


def _polish(basis: Tensor) -> Tensor:
    """Orthonormal to rounding: one pass of Cholesky where the columns nearly are already, else Householder's QR."""
    gram = basis.T @ basis
    if float((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max()) < 0.1:
        return _orthonormal(basis, gram)
    return _householder(basis)


def _householder(basis: Tensor) -> Tensor:
    """An orthonormal basis that holds the columns' span, even where they are dependent, by QR."""
    q: Tensor = torch.linalg.qr(basis).Q
    return q
