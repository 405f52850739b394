"""The adapter's correction for the difference between emulator and original (paper, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from emloc_ray.core.precision import exact_products
from emloc_ray.core.products import ROWS, product_by_rows
from emloc_ray.core.stored_weight import StoredWeight

Method = Literal["none", "projection", "covariance", "adapted"]

# Directions of A weaker than this fraction of the strongest one carry no update that float32 could tell from noise.
_DROP_BELOW = 1e-6

# Added to the mean diagonal of Qᵀ G_A Q by ``adapted``: 0.02 to 0.5 gained about alike (see CHANGELOG).
_ADAPTED_RIDGE = 0.1

ADAPTED_ROWS = 64
"""Rows of the calibration that the emulator with its adapter reads for ``adapted``, at most: 12 gained hardly less."""


@dataclass(frozen=True)
class Candidate:
    """One way to correct: a method, the paper's clamp λ (None: unclamped, as ``adapted`` always is) and a strength."""

    method: Method
    clamp: float | None = 3.0
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.method == "adapted":
            object.__setattr__(self, "clamp", None)


class CanonicalLora(NamedTuple):
    """``B A = b qᵀ`` in the adapter's own basis: ``b = B V S (out, k)``, ``q (in, k)`` orthonormal."""

    b: Tensor
    q: Tensor


class CorrectedLora(NamedTuple):
    """``lora_a = qᵀ (r, in)`` and ``lora_b = b − C (out, r)``, zero-padded to the adapter's r."""

    lora_a: Tensor
    lora_b: Tensor


@dataclass(frozen=True)
class Difference:
    """What the directions ``q (in, k)`` see of ``Δ = W − W_E (out, in)`` and of the Gram; all float64, all thin.

    ``delta_q = Δ Q (out, k)``; with a Gram also ``delta_gq = Δ G Q (out, k)`` and ``inner = Qᵀ G Q (k, k)``, else
    ``None``; ``energy = tr(Δ G' Δᵀ)`` with ``G' = G + damping · I``, the Gram under which emulators are made, or ``G' = I``
    where there is none. ``delta_aq = Δ G_A Q (out, k)`` and ``adapted_inner = Qᵀ G_A Q (k, k)`` are of the Gram of what the
    linear reads in the emulator with the adapter, where that was gathered.
    """

    delta_q: Tensor
    delta_gq: Tensor | None
    inner: Tensor | None
    energy: float
    damping: float = 0.0
    delta_aq: Tensor | None = None
    adapted_inner: Tensor | None = None

    def first(self, k: int, energy: float) -> Difference:
        """Of the first k directions, on the CPU, with this energy."""
        gram_parts = (
            (None, None) if self.delta_gq is None or self.inner is None else (self.delta_gq[:, :k], self.inner[:k, :k])
        )
        delta_gq, inner = (None if part is None else part.cpu() for part in gram_parts)
        return Difference(self.delta_q[:, :k].cpu(), delta_gq, inner, energy, self.damping)


def canonical_form(lora_a: Tensor, lora_b: Tensor) -> CanonicalLora:
    """``Aᵀ = Q S Vᵀ``, ``B' = B V S``: the same update, with the directions that the adapter reads orthonormal.

    ``lora_a (r, in)``, ``lora_b (out, r)``; directions with ``S_j ≤ 1e-6 · S_1`` are dropped, so ``k ≤ r``. Computed in
    float64: it costs nothing beside a layer.
    """
    q, s, vh = torch.linalg.svd(lora_a.double().T, full_matrices=False)
    keep = s > _DROP_BELOW * s.max()
    b = lora_b.double() @ vh.T * s
    return CanonicalLora(b[:, keep], q[:, keep])


def difference(
    weight: Tensor,
    stored: StoredWeight,
    q: Tensor,
    gram_q: Tensor | None = None,
    *,
    energy: float = 0.0,
    damping: float = 0.0,
) -> Difference:
    """``Δ Q = W Q − W_E Q``, and ``Δ G Q = W (G Q) − W_E (G Q)`` of ``gram_q`` = ``G Q (in, k)``, in float64.

    ``Δ`` is never made: ``4 k (out · in + r (out + in))`` operations with factors of rank r, where ``Δ G`` takes
    ``2 out · in²``. ``weight (out, in)`` and what is stored are read by row chunks, in any floating dtype.
    """
    right = q if gram_q is None else torch.cat([q, gram_q], dim=1)
    seen = product_by_rows(weight, right) - stored.times(right)
    if gram_q is None:
        return Difference(seen, None, None, energy)
    k = q.shape[1]
    return Difference(seen[:, :k], seen[:, k:], q.T @ gram_q, energy, damping)


@exact_products
def residual_energy(weight: Tensor, stored: StoredWeight, gram: Tensor | None = None, damping: float = 0.0) -> float:
    """``tr(Δ (G + damping · I) Δᵀ)`` of ``Δ = W − W_E (out, in)``, directly, in float32 by row chunks; ``‖Δ‖²`` without
    ``gram (in, in)``.

    The one product of ``2 out · in²``: for what the factorization did not measure.
    """
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for begin in range(0, len(weight), ROWS):
        delta = weight[begin : begin + ROWS].float() - stored.rows(begin, begin + ROWS)
        weighed = delta if gram is None else torch.addmm(delta, delta, gram, beta=damping)
        total += (weighed * delta).sum(dtype=torch.float64)
    return float(total)


def energy_with(energy: float, up: Tensor, delta_g: Tensor, inner: Tensor) -> float:
    """``tr(Δ' G Δ'ᵀ)`` of ``Δ' = Δ − up down``, from ``energy = tr(Δ G Δᵀ)``: what healing made of a layer's residual by adding
    ``up (out, k)`` and ``down (k, in)``.

    ``delta_g`` is ``Δ' G downᵀ (out, k)``, with what is stored now; ``inner`` is ``down G downᵀ (k, k)``.
    """
    return energy - float((up * (2 * delta_g + up @ inner)).sum())


def correction(seen: Difference, method: Method, scale: float, dampening_frac: float = 1e-4) -> Tensor:
    """``C (out, k)``: what the adapter must give back on the directions that it reads.

    - ``none``: 0;
    - ``projection``: ``C = Δ Q / s``, the paper's;
    - ``covariance``: ``C = Δ G Q (Qᵀ G Q)⁻¹ / s``, which minimises ``‖(Δ − s C Qᵀ) G^½‖_F``. G is damped by
      ``dampening_frac`` of the mean diagonal of ``Qᵀ G Q``, on both sides, so that ``G ∝ I`` gives the projection;
    - ``adapted`` (ours): ``C = Δ G_A Q (Qᵀ G_A Q + ρ m I)⁻¹ / s``, with ``G_A = Σ x xᵀ`` over what the linear reads in the
      *emulator with its adapter*, m the mean diagonal of ``Qᵀ G_A Q`` and ρ = 0.1. It minimises ``Σ ‖Δ x − s C Qᵀ x‖²`` and
      the ridge: on these inputs the original with the adapter gives what the emulator with it gave, layer by layer.

    ``scale`` is the adapter's s. Dividing by it is missing in the published code, which is right only at
    lora_alpha = r. Raises ValueError for ``covariance`` and ``adapted`` without their Gram.
    """
    if method == "none":
        return torch.zeros_like(seen.delta_q)
    if method == "projection":
        return seen.delta_q / scale
    if method == "adapted":
        if seen.delta_aq is None or seen.adapted_inner is None:
            raise ValueError("adapted needs the Gram of the emulator with its adapter")
        inner, _ = _damped(seen.adapted_inner, _ADAPTED_RIDGE)
        return _over(seen.delta_aq, inner) / scale
    if seen.delta_gq is None or seen.inner is None:
        raise ValueError("covariance needs a Gram")
    inner, damping = _damped(seen.inner, dampening_frac)
    return _over(seen.delta_gq + damping * seen.delta_q, inner) / scale


def _over(left: Tensor, inner: Tensor) -> Tensor:
    """``left (out, k) inner⁻¹``."""
    solved: Tensor = torch.linalg.solve(inner, left, left=False)
    return solved


def _damped(inner: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """``inner + d I`` and ``d``: ``fraction`` of the mean diagonal, or 1 where ``inner`` is zero and the identity is as good as
    any."""
    size = inner.diagonal().mean()
    damping = torch.where(size > 0, fraction * size, 1.0)
    return inner + damping * torch.eye(len(inner), dtype=inner.dtype, device=inner.device), damping


def clamp_columns(correction: Tensor, b: Tensor, clamp: float | None) -> Tensor:
    """The paper's λ: column j of ``C`` is scaled by ``λ / ρ_j`` where ``ρ_j = mean|C_j| / mean|B'_j|`` exceeds λ. ``None``
    leaves ``C`` as it is, except that an untrained direction (``B'_j = 0``) is always left alone."""
    size = b.abs().mean(dim=0)
    ratio = correction.abs().mean(dim=0) / size.clamp_min(torch.finfo(size.dtype).tiny)
    factor = torch.ones_like(ratio) if clamp is None else torch.where(ratio > clamp, clamp / ratio, 1.0)
    return correction * torch.where(size > 0, factor, 0.0)


def apply_correction(form: CanonicalLora, applied: Tensor, r: int) -> CorrectedLora:
    """``B_c = B' − C``, ``A_c = Qᵀ``, zero-padded to ``r`` so that the adapter's config still holds. ``applied (out, k)`` is C
    as clamped and multiplied by its strength."""
    pad = r - form.b.shape[1]
    lora_b = torch.nn.functional.pad(form.b - applied, (0, pad))
    lora_a = torch.nn.functional.pad(form.q.T, (0, 0, 0, pad))
    return CorrectedLora(lora_a.float(), lora_b.float())


def shortfall(seen: Difference, applied: Tensor, scale: float) -> float:
    """``‖(Δ − s C Qᵀ) G'^½‖_F`` for C as ``applied (out, k)``: what the correction leaves (all of Δ where C = 0).

    Expanded as ``tr(Δ G' Δᵀ) − 2 s tr(C Qᵀ G' Δᵀ) + s² tr(C Qᵀ G' Q Cᵀ)``, so that it costs next to nothing; of a G of
    zeros it is 0.
    """
    cross, square = seen.delta_q, applied
    if seen.delta_gq is not None and seen.inner is not None:
        cross = seen.delta_gq + seen.damping * seen.delta_q
        square = applied @ seen.inner + seen.damping * applied
    total = seen.energy - 2 * scale * float((applied * cross).sum()) + scale**2 * float((square * applied).sum())
    return float(max(total, 0.0) ** 0.5)
