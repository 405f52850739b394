"""The adapter's correction for the difference between emulator and original (paper, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from emloc_ray.core.products import ROWS, product_by_rows

Method = Literal["none", "projection", "covariance"]

# Directions of A weaker than this fraction of the strongest one carry no update that float32 could tell from noise.
_DROP_BELOW = 1e-6


@dataclass(frozen=True)
class Candidate:
    """One way to correct: a method, the paper's clamp λ (None: unclamped) and a strength."""

    method: Method
    clamp: float | None = 3.0
    strength: float = 1.0


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
    ``None``; ``energy = tr(Δ G Δᵀ)``, with ``G = I`` where there is no Gram.
    """

    delta_q: Tensor
    delta_gq: Tensor | None
    inner: Tensor | None
    energy: float


def canonical_form(lora_a: Tensor, lora_b: Tensor) -> CanonicalLora:
    """``Aᵀ = Q S Vᵀ``, ``B' = B V S``: the same update, with the directions that the adapter reads orthonormal.

    ``lora_a (r, in)``, ``lora_b (out, r)``; directions with ``S_j ≤ 1e-6 · S_1`` are dropped, so ``k ≤ r``. Computed in
    float64: it costs nothing beside a layer.
    """
    q, s, vh = torch.linalg.svd(lora_a.double().T, full_matrices=False)
    keep = s > _DROP_BELOW * s.max()
    b = lora_b.double() @ vh.T * s
    return CanonicalLora(b[:, keep], q[:, keep])


def difference(delta: Tensor, q: Tensor, gram: Tensor | None = None) -> Difference:
    """Reads ``delta (out, in)`` and ``gram (in, in)`` by row chunks, in float64 for what is corrected, in float32 for the
    energy, so that no copy of either is made."""
    right = q if gram is None else torch.cat([q, product_by_rows(gram, q)], dim=1)
    read = product_by_rows(delta, right)
    k = q.shape[1]
    energy = 0.0
    for rows in torch.split(delta, ROWS):
        weighted = rows.float() if gram is None else rows.float() @ gram.float()
        energy += float((weighted * rows.float()).sum(dtype=torch.float64))
    if gram is None:
        return Difference(read, None, None, energy)
    return Difference(read[:, :k], read[:, k:], q.T @ right[:, k:], energy)


def correction(seen: Difference, method: Method, scale: float, dampening_frac: float = 1e-4) -> Tensor:
    """``C (out, k)``: what the adapter must give back on the directions that it reads.

    - ``none``: 0;
    - ``projection``: ``C = Δ Q / s``, the paper's;
    - ``covariance``: ``C = Δ G Q (Qᵀ G Q)⁻¹ / s``, which minimises ``‖(Δ − s C Qᵀ) G^½‖_F``. G is damped by
      ``dampening_frac`` of the mean diagonal of ``Qᵀ G Q``, on both sides, so that ``G ∝ I`` gives the projection.

    ``scale`` is the adapter's s. Dividing by it is missing in the published code, which is right only at
    lora_alpha = r. Raises ValueError for ``covariance`` without a Gram.
    """
    if method == "none":
        return torch.zeros_like(seen.delta_q)
    if method == "projection":
        return seen.delta_q / scale
    if seen.delta_gq is None or seen.inner is None:
        raise ValueError("covariance needs a Gram")
    size = seen.inner.diagonal().mean()
    damping = torch.where(size > 0, dampening_frac * size, 1.0)  # a Gram of zeros says as little as the identity
    inner = seen.inner + damping * torch.eye(len(seen.inner), dtype=torch.float64, device=seen.inner.device)
    solved: Tensor = torch.linalg.solve(inner, seen.delta_gq + damping * seen.delta_q, left=False)
    return solved / scale


def clamp_columns(correction: Tensor, b: Tensor, clamp: float | None) -> Tensor:
    """The paper's λ: column j of ``C`` is scaled by ``λ / ρ_j`` where ``ρ_j = mean|C_j| / mean|B'_j|`` exceeds λ.

    ``None`` leaves ``C`` as it is, except that an untrained direction (``B'_j = 0``) is always left alone.
    """
    size = b.abs().mean(dim=0)
    ratio = correction.abs().mean(dim=0) / size.clamp_min(torch.finfo(size.dtype).tiny)
    factor = torch.ones_like(ratio) if clamp is None else torch.where(ratio > clamp, clamp / ratio, 1.0)
    return correction * torch.where(size > 0, factor, 0.0)


def apply_correction(form: CanonicalLora, applied: Tensor, r: int) -> CorrectedLora:
    """``B_c = B' − C``, ``A_c = Qᵀ``, zero-padded to ``r`` so that the adapter's config still holds.

    ``applied (out, k)`` is C as clamped and multiplied by its strength.
    """
    pad = r - form.b.shape[1]
    lora_b = torch.nn.functional.pad(form.b - applied, (0, pad))
    lora_a = torch.nn.functional.pad(form.q.T, (0, 0, 0, pad))
    return CorrectedLora(lora_a.float(), lora_b.float())


def shortfall(seen: Difference, applied: Tensor, scale: float) -> float:
    """``‖(Δ − s C Qᵀ) G^½‖_F`` for C as ``applied (out, k)``: what the correction leaves (all of Δ where C = 0).

    Expanded as ``tr(Δ G Δᵀ) − 2 s tr(C Qᵀ G Δᵀ) + s² tr(C Qᵀ G Q Cᵀ)``, so that it costs next to nothing.
    """
    cross = seen.delta_q if seen.delta_gq is None else seen.delta_gq
    square = applied if seen.inner is None else applied @ seen.inner
    total = seen.energy - 2 * scale * float((applied * cross).sum()) + scale**2 * float((square * applied).sum())
    return float(max(total, 0.0) ** 0.5)
