"""What each rank of a linear's factors gains, from its weight ``W`` and the calibration's sums.

With the eigenvalues ``λ_i`` of ``S^½ W G Wᵀ S^½`` over N tokens (:mod:`emloc_ray.core.two_sided`) the i-th rank saves
``½ λ_i / N`` nats of the KL divergence between the model's predictions and the emulator's, so that gains of different
linears may be added up and held against each other. Plain factors do not gain these: their i-th rank takes the eigenvector
``u_i`` of ``W G Wᵀ``, with eigenvalue ``μ_i``, and saves ``½ μ_i u_iᵀ S u_i / N``.
"""

import torch
from torch import Tensor

from emloc_ray.core.factorization import scaled_weight
from emloc_ray.core.precision import exact_products, has_fast_float64
from emloc_ray.core.two_sided import output_whitened
from emloc_ray.core.whitening import Whitening


@exact_products
def spectrum(weight: Tensor, whitening: Whitening, outputs: Whitening, *, name: str = "the layer") -> Tensor:
    """The eigenvalues of ``S_d^½ W G Wᵀ S_d^½``, with ``G`` and ``S`` damped as in :class:`Whitening`: ``(min(out, in),)``,
    descending, float64.

    Raises NumericsError where the weight holds a NaN or an Inf, ValueError where shapes do not fit.
    """
    whitening.check_reads(weight, name)
    inside, scale = scaled_weight(output_whitened(weight, outputs), name)
    values = torch.linalg.eigvalsh(_smaller_side(inside, whitening)[0])
    if _is_lost_in_rounding(values):
        values = torch.linalg.eigvalsh(_smaller_side(*_in_float64(inside, whitening))[0]).to(weight.device)
    gains: Tensor = values.to(torch.float64).flip(0).clamp_min(0.0) * (scale * scale * whitening.scale * outputs.scale)
    return gains


@exact_products
def plain_gains(weight: Tensor, whitening: Whitening, outputs: Whitening, *, name: str = "the layer") -> Tensor:
    """What each rank of the plain factors saves of ``tr(S_d Δ G Δᵀ)``: ``μ_i u_iᵀ S_d u_i``, ``(min(out, in),)``, float64.

    With ``μ_i`` and ``u_i`` of ``W G Wᵀ``, ``μ_i`` descending. A later rank may save more than one before it. Raises
    NumericsError where the weight holds a NaN or an Inf, ValueError where shapes do not fit.
    """
    whitening.check_reads(weight, name)
    inside, scale = scaled_weight(weight.detach().to(torch.float32), name)
    _, parts = energy_vectors(inside, whitening)
    saved = output_whitened(parts, outputs).to(torch.float64).square().sum(dim=0)
    return saved * (scale * scale * whitening.scale * outputs.scale)


def energy_vectors(weight: Tensor, whitening: Whitening) -> tuple[Tensor, Tensor]:
    """The eigenvalues ``μ_i`` of ``W G' Wᵀ``, descending, ``(min(out, in),)``, float64, and ``μ_i^½ u_i`` in columns. In
    float32, or in float64 where that would lose too many of them."""
    values, parts = _scaled_vectors(weight, whitening)
    if _is_lost_in_rounding(values):
        values, parts = _scaled_vectors(*_in_float64(weight, whitening))
    return values.to(weight.device, torch.float64).flip(0).clamp_min(0.0), parts.to(weight.device).flip(1)


def _in_float64(inside: Tensor, whitening: Whitening) -> tuple[Tensor, Whitening]:
    """The matrix and the whitening in float64, on the CPU where the device's is slow."""
    if not has_fast_float64(inside.device):
        inside, whitening = inside.cpu(), whitening.on_cpu()
    return inside.to(torch.float64), whitening


def _smaller_side(weight: Tensor, whitening: Whitening) -> tuple[Tensor, Tensor | None]:
    """``W G' Wᵀ``, or for ``out > in`` the matrix ``(W L)ᵀ W L`` of the same eigenvalues, and ``W L``; ``L Lᵀ = G'``."""
    if weight.shape[0] <= weight.shape[1]:
        return whitening.outer(weight), None
    whitened = whitening.whiten(weight)
    return whitened.T @ whitened, whitened


def _scaled_vectors(weight: Tensor, whitening: Whitening) -> tuple[Tensor, Tensor]:
    """The eigenvalues ``μ_i`` of ``W G' Wᵀ``, ascending, and ``μ_i^½ u_i`` in columns."""
    matrix, whitened = _smaller_side(weight, whitening)
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors * values.clamp_min(0.0).sqrt() if whitened is None else whitened @ vectors


def _is_lost_in_rounding(values: Tensor) -> bool:
    """Whether float32 is too narrow for eigenvalues, in ascending order.

    Its rounding error, about ``u λ₁`` in each, is then over 1 % of the one a quarter from the top: about the last rank that a
    linear keeps at ratio 0.5.
    """
    unit_roundoff = torch.finfo(torch.float32).eps / 2.0
    return bool(unit_roundoff * values[-1] > 0.01 * values[-1 - len(values) // 4])
