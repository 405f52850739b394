"""The emulator's layer: the best rank-r ``W_E`` under ``‖(W − W_E) G^½‖_F`` (paper, section 3.1).

Stored as ``U (Uᵀ W)``, which needs no inverse of ``G^½``; Swift-SVD (https://arxiv.org/abs/2604.01609) stores ``V (Vᵀ W)``.
"""

import math
import operator
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from emloc_ray.core.gram import Gram
from emloc_ray.core.krylov import MAX_LOSS_SHARE, LeadingVectors, is_lost, leading_vectors
from emloc_ray.core.precision import exact_products, has_fast_float64
from emloc_ray.core.products import energy, is_finite, wide_product
from emloc_ray.core.subspace_iteration import leading_by_products
from emloc_ray.core.whitening import Whitening
from emloc_ray.errors import NumericsError

Solver = Literal["auto", "exact", "subspace", "products"]

# What `_rounding_share` decides. Over real layers, and layers with channels 30 to 3,000 times the others, up to the first
# bound the residual energy was off by less than 1e-3 and the factors' within 2e-4 of the optimum. Up to the second the
# factors' was within 7e-4 wherever the residual passed its direct check.
SURE_ROUNDING_SHARE = 1e-3
_MAX_ROUNDING_SHARE = 5e-3
MAX_RESIDUAL_DIFFERENCE = 1e-3

# Columns of ``W L V`` come from float32 where that moves less than this share of the residual energy.
_MOVED_SHARE = 1e-4
# A probe of the exact operator may find so many times the loss that the solver allowed itself.
PROBED_EXCESS = 1.5
_PROBES = 8
# A layer with so many times as many inputs as outputs is wide, the other way round tall.
_ASPECT = 2
# Measured: up to this order the products of a tall layer cost more than the Gram that spares them.
_SMALL = 1024
# Measured: below this order, or for ranks above this share of it, the full eigendecomposition is as fast.
_SUBSPACE_MIN_ORDER = 256
_SUBSPACE_MAX_SHARE = 0.2
# Of the order, on a GPU, where decompositions cost many times what products do.
_PRODUCTS_MAX_SHARE = 0.5


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
        solver: ``"exact"``, ``"subspace"`` or ``"products"``.
        dtype: what the layer was computed in: float64 where float32 was not enough.
    """

    factors: LowRankFactors
    eigenvalues: Tensor
    total_energy: float
    relative_error: float
    solver: str
    dtype: torch.dtype


@exact_products
def factorize(
    weight: Tensor,
    whitening: Whitening | Gram | Tensor,
    rank: int,
    *,
    solver: Solver = "auto",
    seed: int = 0,
    name: str = "the layer",
) -> Factorization:
    """The best ``W_E = up @ down`` of ``rank`` for ``weight (out, in)`` under ``‖(W − W_E) G^½‖_F``.

    ``exact`` takes ``U_r`` from the full eigendecomposition of the smaller side: of ``W G Wᵀ`` where ``out ≤ in``, else of
    ``Lᵀ Wᵀ W L`` with ``G = L Lᵀ``, ``U_r = orth(W L V_r)``. ``subspace`` finds only the top eigenvectors, until the relative
    error is within 1e-3 (relative) of the optimum, and falls back to ``exact`` where it does not get there; ``products`` does
    so by subspace iteration, as a GPU likes it. ``auto`` takes what is faster for the shape and the device. Each is computed in
    float32 and once more in float64 where rounding could change the residual by 1e-3, on the CPU where the device's float64 is
    slow. The result depends on ``seed`` (the subspace's start) only within these bounds.

    The weight is of any floating dtype, on the device of the whitening, where it is computed; a :class:`Gram` in its place, or
    its ``symmetric()``, is whitened for this weight alone. Raises NumericsError where the weight or the Gram holds a NaN or an
    Inf, or the factors would; ValueError where shapes do not fit, the weight is not of floats or on the meta device, ``rank`` is
    no whole number within ``1 .. min(out, in)``, there is no such ``solver``, or a matrix in the Gram's place is not symmetric.
    ``name`` is the layer's, for these.
    """
    rank = _checked_rank(weight, rank, solver, name)
    whitening = whitening if isinstance(whitening, Whitening) else Whitening(whitening, name=name)
    whitening.check_reads(weight, name)
    order = min(weight.shape)
    if solver == "auto":
        share, faster = _faster_solver(weight.device)
        solver = faster if order >= _SUBSPACE_MIN_ORDER and rank <= share * order else "exact"
    stored = torch.float64 if weight.dtype == torch.float64 else torch.float32
    scaled, scale = scaled_weight(weight.detach().to(stored), name)
    result, trusted = _factorize_scaled(scaled, whitening, rank, solver, seed)
    if not trusted and stored == torch.float32:
        if not has_fast_float64(weight.device):
            scaled, whitening = scaled.cpu(), whitening.on_cpu()
            solver = "subspace" if solver == "products" else solver
        result, _ = _factorize_scaled(scaled.to(torch.float64), whitening, rank, solver, seed)
    energy_scale = scale * scale * whitening.scale
    up, down = (factor.to(weight.device) for factor in result.factors)
    down = (down if scale == 1.0 else down * scale).to(stored)
    if scale != 1.0 and not is_finite(down):
        raise NumericsError(f"The weight of {name} is so large that its factors overflow {stored}: scale it down.")
    return Factorization(
        factors=LowRankFactors(up.to(stored).contiguous(), down),
        eigenvalues=result.eigenvalues.to(weight.device) * energy_scale,
        total_energy=result.total_energy * energy_scale,
        relative_error=result.relative_error,
        solver=result.solver,
        dtype=result.dtype,
    )


def _checked_rank(weight: Tensor, rank: int, solver: str, name: str) -> int:
    """The rank as an int; raises ValueError where weight, rank or solver are none that :func:`factorize` takes."""
    if weight.ndim != 2 or weight.is_meta:
        shape = tuple(weight.shape)
        raise ValueError(
            f"{name} has a weight of shape {shape} on {weight.device}: give a matrix (out, in) with its values."
        )
    if solver not in get_args(Solver):
        raise ValueError(f"solver is {solver!r}: give one of {', '.join(get_args(Solver))}.")
    try:
        rank = operator.index(rank)
    except TypeError:
        raise ValueError(f"The rank of {name} is {rank!r}: give a whole number.") from None
    order = min(weight.shape)
    if not 1 <= rank <= order:
        raise ValueError(f"{name} has {order} ranks, so its rank cannot be {rank}.")
    return rank


def _faster_solver(device: torch.device) -> tuple[float, Solver]:
    """Up to what share of the order which solver is faster than the full eigendecomposition."""
    return (_SUBSPACE_MAX_SHARE, "subspace") if device.type == "cpu" else (_PRODUCTS_MAX_SHARE, "products")


@exact_products
def relative_error(
    weight: Tensor, approximation: Tensor, whitening: Whitening, *, name: str = "the layer"
) -> tuple[float, float]:
    """``‖(W − W_E) G^½‖_F / ‖W G^½‖_F`` of any ``W_E (out, in)``, directly, and ``tr(W G Wᵀ)``; with the damped ``G``. The
    error is 0 for a weight of zeros. Raises NumericsError where the weight holds a NaN or an Inf, ValueError where shapes do not
    fit or the weight is not of floats."""
    whitening.check_reads(weight, name)
    if approximation.shape != weight.shape:
        shapes = tuple(weight.shape), tuple(approximation.shape)
        raise ValueError(f"{name} has a weight of shape {shapes[0]}, but its approximation is of {shapes[1]}.")
    scaled, scale = scaled_weight(weight.detach().to(torch.float32), name)
    total = whitening.energy(scaled)
    left = whitening.energy(scaled - approximation.to(torch.float32) / scale)
    error = math.sqrt(max(left, 0.0) / total) if total > 0.0 else 0.0
    return error, total * scale * scale * whitening.scale


def scaled_weight(weight: Tensor, name: str) -> tuple[Tensor, float]:
    """``(W / s, s)``: ``s = 1`` unless products of ``W``'s elements could leave float32's range. Raises NumericsError where
    ``W`` holds a NaN or an Inf, ValueError where it holds nothing."""
    if not weight.numel():
        raise ValueError(f"The weight of {name} is of shape {tuple(weight.shape)}, which holds no number.")
    norm = float(torch.linalg.vector_norm(weight))
    typical = norm / math.sqrt(weight.numel())
    if 1e-6 < typical < 1e6:
        return weight, 1.0
    if not is_finite(weight):
        raise NumericsError(f"The weight of {name} holds a NaN or an Inf.")
    largest = float(weight.abs().max())
    if largest == 0.0:
        return weight, 1.0
    # A power of two, so that nothing is rounded; both it and its inverse are normal numbers.
    limit = math.frexp(torch.finfo(weight.dtype).max)[1] - 2
    scale = 2.0 ** min(max(math.frexp(largest)[1], -limit), limit)
    return weight / scale, scale


def _factorize_scaled(
    weight: Tensor, whitening: Whitening, rank: int, solver: Solver, seed: int
) -> tuple[Factorization, bool]:
    """The factorization in the dtype of ``weight`` under ``G'``, and whether that dtype was wide enough for it."""
    factors = None if solver == "exact" else _by_subspace(weight, whitening, rank, seed, solver)
    return _by_eigendecomposition(weight, whitening, rank) if factors is None else factors


def _by_subspace(
    weight: Tensor, whitening: Whitening, rank: int, seed: int, solver: Solver
) -> tuple[Factorization, bool] | None:
    """From the leading singular vectors of ``W L``; ``None`` where they do not settle, or ``G'`` has no cheap root.

    Of ``W G' Wᵀ`` or ``Lᵀ Wᵀ W L`` first where that saves more than it costs and rounding lets it pass: for a wide layer
    Cholesky's factor of ``G'``, for a small tall one most of the products.
    """
    squares = solver == "subspace"
    if squares and weight.shape[1] >= _ASPECT * weight.shape[0]:
        matrix = whitening.outer(weight)
        top = _of_square(matrix, rank, seed)
        if top is not None:
            top = top._replace(vectors=polish(top.vectors))
            return _of_vectors(weight, top, float(matrix.diagonal().sum(dtype=torch.float64)), solver), True
    if not whitening.is_identity and whitening.cholesky(weight.dtype) is None:
        return None
    whitened = whitening.whiten(weight)
    tall = weight.shape[0] > weight.shape[1]
    small = squares and weight.shape[1] <= _SMALL and weight.shape[0] >= _ASPECT * weight.shape[1]
    top = _of_square(_inner_gram(whitened).symmetric(), rank, seed) if small else None
    if top is None:
        leading = leading_vectors if squares else leading_by_products
        top = leading(whitened.T if tall else whitened, rank, seed)
    if top is None:
        return None
    total = energy(whitened)
    sure = _is_sure(top, rank, weight.dtype)
    if tall:
        # In float64 where what float32 adds to each column, some roundoffs of σ₁, would count beside what is left.
        moved = rank * (4 * torch.finfo(weight.dtype).eps / 2.0) ** 2 * float(top.values[0])
        narrow = moved <= _MOVED_SHARE * top.energy_left
        up = whitened @ top.vectors if narrow else wide_product(whitened.T, top.vectors)
        scales = top.values.sqrt().to(up.dtype).clamp_min(torch.finfo(up.dtype).tiny)
        top = top._replace(vectors=up / scales)
    top = top._replace(vectors=polish(top.vectors).to(weight.dtype))
    trusted = sure or (
        weight.dtype == torch.float32
        and not is_lost(top.energy_left, total, weight.dtype)
        and _survives_probes(weight, whitened, whitening, top, seed)
    )
    return _of_vectors(weight, top, total, solver), trusted


def _of_square(matrix: Tensor, rank: int, seed: int) -> LeadingVectors | None:
    """The leading vectors of ``A Aᵀ``, where they settle and squaring cost them nothing."""
    top = leading_vectors(matrix, rank, seed, squared=True)
    return top if top is not None and _is_sure(top, rank, matrix.dtype) else None


def _is_sure(top: LeadingVectors, rank: int, dtype: torch.dtype) -> bool:
    return _rounding_share(top.values, top.energy_left, rank, dtype) <= SURE_ROUNDING_SHARE


def _inner_gram(whitened: Tensor) -> Gram:
    """``Lᵀ Wᵀ W L (in, in)``, its lower triangle current."""
    gram = Gram.zero(whitened.shape[1], whitened.dtype, whitened.device)
    gram.update(whitened)
    return gram


def _of_vectors(weight: Tensor, top: LeadingVectors, total: float, solver: Solver) -> Factorization:
    up = top.vectors
    error = math.sqrt(top.energy_left / total) if total > 0.0 else 0.0
    return Factorization(LowRankFactors(up, up.T @ weight), top.values, total, error, solver, weight.dtype)


def _survives_probes(weight: Tensor, whitened: Tensor, whitening: Whitening, top: LeadingVectors, seed: int) -> bool:
    """Whether float32 was enough, by products of a few vectors with ``M = W G' Wᵀ`` itself in float64.

    With ``g`` normal and ``x = Σ g_i u_i / (θ_i − ρ)^½``, ``‖P M x‖²``, ``P = I − U Uᵀ``, is on average the energy that ``U``
    misses to second order, for want of convergence or by rounding in ``L``, ``W L`` or ``U``. And with ``z`` normal
    outside ``U``, ``zᵀ M z``, on average the residual energy, must be what ``W L`` makes of the same ``z``.
    """
    generator = torch.Generator().manual_seed(seed + 2)
    count = len(top.values) + len(weight)
    numbers = torch.randn(count, _PROBES, generator=generator, device="cpu", dtype=torch.float64)
    inside, outside = numbers.to(weight.device).split([len(top.values), len(weight)])
    vectors = top.vectors.to(torch.float64)
    inside = vectors @ (inside / top.gaps.sqrt()[:, None])
    outside = outside - vectors @ (vectors.T @ outside)
    read = wide_product(weight, torch.cat([inside, outside], dim=1))
    images = wide_product(weight.T, whitening.times(read))
    missed = images[:, :_PROBES] - vectors @ (vectors.T @ images[:, :_PROBES])
    if float(missed.square().sum()) / _PROBES > PROBED_EXCESS * MAX_LOSS_SHARE * top.energy_left:
        return False
    direct = float((outside * images[:, _PROBES:]).sum())
    seen = float(wide_product(whitened, outside).square().sum())
    return abs(direct - seen) <= MAX_RESIDUAL_DIFFERENCE * direct


def _by_eigendecomposition(weight: Tensor, whitening: Whitening, rank: int) -> tuple[Factorization, bool]:
    """From all eigenvalues of the smaller side and its top ``rank`` eigenvectors."""
    tall = weight.shape[0] > weight.shape[1]
    if tall:
        whitened = whitening.whiten(weight)
        matrix = _inner_gram(whitened).matrix
    else:
        matrix = whitening.outer(weight)
    total = float(matrix.diagonal().sum(dtype=torch.float64))
    # The lower triangle, handed over as the upper one of the transpose: LAPACK is a tenth faster on that side.
    values, vectors = torch.linalg.eigh(matrix.mT, UPLO="U")
    values, up = values.flip(0).to(torch.float64).clamp_min(0.0), vectors[:, -rank:].flip(1)
    residual = float(values[rank:].sum())
    share = 0.0 if rank == len(matrix) or total <= 0.0 else _rounding_share(values, residual, rank, weight.dtype)
    if tall:
        up = polish(whitened @ up / values[:rank].sqrt().to(weight.dtype).clamp_min(torch.finfo(weight.dtype).tiny))
    factors = LowRankFactors(up, up.T @ weight)
    trusted = share <= SURE_ROUNDING_SHARE
    summed = share * (len(values) - rank) / rank  # the residual sums the others, each as much in error
    if share <= _MAX_ROUNDING_SHARE and max(share, summed) > SURE_ROUNDING_SHARE:
        direct = whitening.energy(weight - factors.up @ factors.down)
        trusted = trusted or abs(direct - residual) <= MAX_RESIDUAL_DIFFERENCE * direct
        residual = direct
    error = math.sqrt(max(residual, 0.0) / total) if total > 0.0 else 0.0
    return Factorization(factors, values, total, error, "exact", weight.dtype), trusted


def _rounding_share(values: Tensor, residual: float, rank: int, dtype: torch.dtype) -> float:
    """``r u λ₁ / Σ_{i > r} λ_i``, ``u`` the unit roundoff: how much of the residual energy rounding may move.

    Forming ``M`` and its eigenvectors moves each of ``r`` eigenvalues by some ``u λ₁``. The share costs nothing, and grows
    with both faults of a residual near the rounding: an eigenvalue tail that differs from the direct ``tr(Δ G Δᵀ)``, and
    eigenvectors that mix. A residual below the rounding gives a share of order one, whatever was computed, so that it
    is caught. The direct trace, whose own rounding is of order ``u``, is left to the layers between.
    """
    unit_roundoff = torch.finfo(dtype).eps / 2.0
    return rank * unit_roundoff * float(values[0]) / residual if residual > 0.0 else math.inf


def polish(basis: Tensor) -> Tensor:
    """Orthonormal to rounding: one pass of Cholesky where the columns nearly are already, else Householder's QR."""
    gram = basis.T @ basis
    if float((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max()) < 0.1:
        lower = torch.linalg.cholesky(gram)
        solved: Tensor = torch.linalg.solve_triangular(lower.T, basis, upper=True, left=False)
        return solved
    q: Tensor = torch.linalg.qr(basis).Q
    return q
