"""The adapter's correction for the difference between emulator and original (paper, section 3.3; DESIGN.md, section 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Method = Literal["none", "projection", "covariance"]

# Directions of A weaker than this fraction of the strongest one carry no update that float32 could tell from noise.
_DROP_BELOW = 1e-6


class CanonicalLora(NamedTuple):
    """``B A = b qᵀ`` in the adapter's own basis: ``b = B V S (out, k)``, ``q (in, k)`` orthonormal."""

    b: Tensor
    q: Tensor


class CorrectedLora(NamedTuple):
    """``lora_a = qᵀ (r, in)`` and ``lora_b = b − C (out, r)``, zero-padded to the adapter's r."""

    lora_a: Tensor
    lora_b: Tensor


@dataclass(frozen=True)
class Shortfall:
    """``‖(Δ − s C A_c) G^½‖_F`` of one module, before (C = 0) and after the correction."""

    before: float
    after: float


def canonical_form(lora_a: Tensor, lora_b: Tensor) -> CanonicalLora:
    """``Aᵀ = Q S Vᵀ``, ``B' = B V S``: the same update, with the directions that the adapter reads orthonormal.

    ``lora_a (r, in)``, ``lora_b (out, r)``; directions with ``S_j ≤ 1e-6 · S_1`` are dropped, so ``k ≤ r``. Computed in
    float64: it costs nothing beside a layer.
    """
    q, s, vh = torch.linalg.svd(lora_a.double().T, full_matrices=False)
    keep = s > _DROP_BELOW * s.max()
    b = lora_b.double() @ vh.T * s
    return CanonicalLora(b[:, keep], q[:, keep])


def read_difference(
    delta: Tensor, q: Tensor, scale: float, gram: Tensor | None = None, dampening_frac: float = 1e-4
) -> Tensor:
    """``C (out, k)``: what the adapter must give back on the directions ``q (in, k)`` that it reads.

    - without ``gram``: ``C = Δ Q / s``, the paper's projection;
    - with ``gram (in, in)``: ``C = Δ G Q (Qᵀ G Q)⁻¹ / s``, which minimises ``‖(Δ − s C Qᵀ) G^½‖_F``; ``Qᵀ G Q`` is damped
      by ``dampening_frac`` of its mean diagonal on both sides, so that ``G ∝ I`` gives the projection exactly.

    ``delta = W − W_E (out, in)``; ``scale`` is the adapter's s. The division by s is missing in the published code, which
    is right only at lora_alpha = r.
    """
    delta = delta.double()
    if gram is None:
        return delta @ q / scale
    gram = gram.double()
    inner = q.T @ gram @ q
    damping = dampening_frac * inner.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    # G + damping I on both sides: the least-squares problem of a slightly isotropic input.
    right = delta @ (gram @ q + damping * q)
    inner = inner + damping * torch.eye(inner.shape[0], dtype=inner.dtype, device=inner.device)
    return torch.linalg.solve(inner, right, left=False) / scale


def clamp_columns(correction: Tensor, b: Tensor, clamp: float | None) -> Tensor:
    """The paper's λ: column j of ``C`` is scaled by ``λ / ρ_j`` where ``ρ_j = mean|C_j| / mean|B'_j|`` exceeds λ.

    ``None`` leaves ``C`` as it is, except that an untrained direction (``B'_j = 0``) is always left alone.
    """
    size = b.abs().mean(dim=0)
    ratio = correction.abs().mean(dim=0) / size.clamp_min(torch.finfo(size.dtype).tiny)
    factor = torch.ones_like(ratio) if clamp is None else torch.where(ratio > clamp, clamp / ratio, 1.0)
    return correction * torch.where(size > 0, factor, 0.0)


def apply_correction(
    form: CanonicalLora, correction: Tensor, r: int, clamp: float | None, strength: float
) -> CorrectedLora:
    """``B_c = B' − strength · clamp(C)``, ``A_c = Qᵀ``, zero-padded to ``r`` so that the adapter's config still holds."""
    b = form.b - strength * clamp_columns(correction, form.b, clamp)
    pad = r - b.shape[1]
    lora_b = torch.nn.functional.pad(b, (0, pad))
    lora_a = torch.nn.functional.pad(form.q.T, (0, 0, 0, pad))
    return CorrectedLora(lora_a.float(), lora_b.float())


def shortfall(delta: Tensor, applied: Tensor, q: Tensor, scale: float, gram: Tensor | None) -> Shortfall:
    """``‖(Δ − s C Qᵀ) G^½‖_F`` before and after, for the C as ``applied`` (clamped, with its strength)."""
    delta = delta.double()
    rest = delta - scale * applied @ q.T
    return Shortfall(_weighted_norm(delta, gram), _weighted_norm(rest, gram))


def _weighted_norm(matrix: Tensor, gram: Tensor | None) -> float:
    if gram is None:
        return float(matrix.norm())
    return float(((matrix @ gram.double()) * matrix).sum().clamp_min(0).sqrt())
