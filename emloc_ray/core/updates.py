"""What adapters add to a weight: ``ΔW (out, in)`` by rows, exactly, and by its dominant subspace.

Three forms cover PEFT's additive methods, each read as PEFT computes it
(https://huggingface.co/docs/peft/package_reference/lora, …/loha, …/lokr, …/vera):

- LoRA, rsLoRA, VeRA: ``s B A``;
- LoHa: ``s (W1a W1b) ∘ (W2a W2b)``, which is ``s B A`` too, with the columns of ``W1a`` times those of ``W2a`` as ``B`` and
  the rows of ``W1b`` times those of ``W2b`` as ``A``: of rank at most r²;
- LoKr: ``s W1 ⊗ W2``, whose singular values are all products of those of ``W1`` and ``W2``.

So no dense ``ΔW`` is ever decomposed, except for a LoHa whose r² exceeds the weight's smaller side.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from emloc_ray.core.products import paired_columns

# Directions weaker than this fraction of the strongest one carry no update that float32 could tell from noise.
_DROP_BELOW = 1e-6


class Subspace(NamedTuple):
    """``ΔW ≈ B A``: ``lora_a (k, in)`` with orthonormal rows, ``lora_b (out, k)``, ``error = ‖ΔW − B A‖_F / ‖ΔW‖_F``."""

    lora_a: Tensor
    lora_b: Tensor
    error: float


@dataclass(frozen=True)
class LowRankUpdate:
    """``ΔW = s B A``: ``lora_a (r, in)``, ``lora_b (out, r)``."""

    lora_a: Tensor
    lora_b: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.lora_b.shape[0], self.lora_a.shape[1]

    def rows(self, first: int, last: int, transposed: bool = False) -> Tensor:
        """Rows ``[first, last)`` of ``ΔW``, or of ``ΔWᵀ``, in float32."""
        if transposed:
            product = (self.lora_b.float() @ self.lora_a.float()[:, first:last]).T
        else:
            product = self.lora_b.float()[first:last] @ self.lora_a.float()
        return product.mul_(self.scale)

    def dominant(self, tolerance: float) -> Subspace:
        """The fewest singular directions whose rest is at most ``tolerance · ‖ΔW‖_F``, in float64; at least one."""
        return _dominant_of_product(self.scale * self.lora_b.double(), self.lora_a.double(), tolerance)


@dataclass(frozen=True)
class HadamardUpdate:
    """LoHa: ``ΔW = s (W1a W1b) ∘ (W2a W2b)``; ``w1_a, w2_a (out, r)``, ``w1_b, w2_b (r, in)``."""

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.w1_a.shape[0], self.w1_b.shape[1]

    def rows(self, first: int, last: int, transposed: bool = False) -> Tensor:
        """Rows ``[first, last)`` of ``ΔW``, or of ``ΔWᵀ``, in float32."""
        parts = []
        for a, b in ((self.w1_a, self.w1_b), (self.w2_a, self.w2_b)):
            left, right = (b.float().T, a.float().T) if transposed else (a.float(), b.float())
            parts.append(left[first:last] @ right)
        return parts[0].mul_(parts[1]).mul_(self.scale)

    def dominant(self, tolerance: float) -> Subspace:
        """The fewest singular directions whose rest is at most ``tolerance · ‖ΔW‖_F``, in float64; at least one."""
        w1_a, w1_b, w2_a, w2_b = (factor.double() for factor in (self.w1_a, self.w1_b, self.w2_a, self.w2_b))
        if w1_a.shape[1] * w2_a.shape[1] < min(self.shape):
            return _dominant_of_product(
                self.scale * paired_columns(w1_a, w2_a), paired_columns(w1_b.T, w2_b.T).T, tolerance
            )
        u, s, vh = torch.linalg.svd(self.scale * (w1_a @ w1_b) * (w2_a @ w2_b), full_matrices=False)
        return _cut(u, s, vh, tolerance)


@dataclass(frozen=True)
class KroneckerUpdate:
    """LoKr: ``ΔW = s W1 ⊗ W2``; ``w1 (a, c)``, ``w2 (b, d)``, ``out = a b``, ``in = c d``."""

    w1: Tensor
    w2: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.w1.shape[0] * self.w2.shape[0], self.w1.shape[1] * self.w2.shape[1]

    def rows(self, first: int, last: int, transposed: bool = False) -> Tensor:
        """Rows ``[first, last)`` of ``ΔW``, or of ``ΔWᵀ``, in float32."""
        w1, w2 = (self.w1.float().T, self.w2.float().T) if transposed else (self.w1.float(), self.w2.float())
        row = torch.arange(first, last, device=w1.device)
        left, right = w1[row // w2.shape[0]], w2[row % w2.shape[0]]
        return (left.unsqueeze(2) * right.unsqueeze(1)).reshape(last - first, -1).mul_(self.scale)

    def dominant(self, tolerance: float) -> Subspace:
        """The fewest singular directions whose rest is at most ``tolerance · ‖ΔW‖_F``, in float64; at least one."""
        u1, s1, vh1 = torch.linalg.svd(self.scale * self.w1.double(), full_matrices=False)
        u2, s2, vh2 = torch.linalg.svd(self.w2.double(), full_matrices=False)
        s, order = (s1.unsqueeze(1) * s2).flatten().sort(descending=True)
        k = _rank_within(s, tolerance)
        one, two = order[:k] // len(s2), order[:k] % len(s2)
        u = (u1[:, one].unsqueeze(1) * u2[:, two]).reshape(-1, k)
        vh = (vh1[one].unsqueeze(2) * vh2[two].unsqueeze(1)).reshape(k, -1)
        return Subspace(vh, u * s[:k], _share(s, k))


Update = LowRankUpdate | HadamardUpdate | KroneckerUpdate


def _dominant_of_product(left: Tensor, right: Tensor, tolerance: float) -> Subspace:
    """The dominant subspace of ``left (out, n) @ right (n, in)``, both float64."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return _cut(q_left @ u, s, vh @ q_right.T, tolerance)


def _cut(u: Tensor, s: Tensor, vh: Tensor, tolerance: float) -> Subspace:
    k = _rank_within(s, tolerance)
    return Subspace(vh[:k], u[:, :k] * s[:k], _share(s, k))


def _rank_within(s: Tensor, tolerance: float) -> int:
    """The least k of at least 1 with ``‖s_k…‖ ≤ tolerance · ‖s‖``; what is rounding beside the largest never counts."""
    s = torch.where(s > _DROP_BELOW * s[0], s, 0.0)
    rest = s.square().flip(0).cumsum(0).flip(0).sqrt()  # of s_k and all below it
    return max(1, int((rest > tolerance * rest[0]).sum()))


def _share(s: Tensor, k: int) -> float:
    whole = float(s.norm())
    return float(s[k:].norm()) / whole if whole else 0.0
