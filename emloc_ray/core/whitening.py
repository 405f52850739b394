"""The whitening of a layer's inputs: the damped Gram and a square root of it, shared by the linears that read them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from emloc_ray.core.gram import Gram
from emloc_ray.core.precision import exact_products, has_fast_float64
from emloc_ray.core.products import is_finite, wide_product
from emloc_ray.errors import NumericsError

# Blocks of this many columns: wide enough for full matrix-product speed, narrow enough to skip nearly half of a
# product with a symmetric or triangular matrix.
_BLOCK = 192
_GPU_BLOCK = 4096
_LEAST_ROUNDING = 1e-4  # that two halves of a symmetric matrix may differ by, as a share of the product of two norms


def _width(tensor: Tensor) -> int:
    return _BLOCK if tensor.device.type == "cpu" else _GPU_BLOCK


def _eps(matrix: Tensor) -> float:
    return torch.finfo(matrix.dtype).eps if matrix.is_floating_point() else 0.0


@exact_products
def _halves_difference(matrix: Tensor, mean: Tensor) -> Tensor:
    """About the largest ``(Σ_j (G_ij − G_ji)² / (G_ii G_jj) / in)^½`` of a row, float64; ``mean`` is that of ``G_ii``.
    By two products with one vector, which need no copy of the matrix."""
    info = torch.finfo(matrix.dtype)
    # Far below the mean a diagonal may be rounding, and no bound for its row.
    least = (mean * math.sqrt(info.eps)).to(matrix.dtype)
    shrink = torch.maximum(matrix.diagonal(), least).clamp_min(info.tiny).rsqrt()
    # As good as random, and made where the matrix lies.
    places = torch.arange(len(matrix), dtype=torch.float64, device=matrix.device)
    vector = (places.square() * math.sqrt(2.0)).cos().to(matrix.dtype) * shrink
    rows = (torch.mv(matrix, vector) - torch.mv(matrix.T, vector)) * shrink
    return rows.abs().amax().to(torch.float64) * math.sqrt(2.0 / len(matrix))


class Whitening:
    """The damped Gram ``s G'`` of a layer's inputs: ``G' = G / s + ε I``, ``ε = dampening_frac``, ``s = tr(G) / in``.

    Dividing by ``s``, the mean of the diagonal, keeps products of sums over many tokens inside float32's range. Copies
    in another dtype and the square root are made at first use and kept: linears that read the same tensor share one
    ``Whitening``, so that they share these too. A Gram of zeros says nothing about directions and
    whitens like the identity.

    Attributes:
        in_features: the order of the Gram.
        dampening_frac: ``ε``.
        scale: ``s``, or 1 where the Gram is zero.
        is_identity: ``G' = I``, and products with it are left out.
    """

    def __init__(self, gram: Tensor | Gram, dampening_frac: float = 1e-6, *, name: str = "the layer") -> None:
        """Takes a symmetric ``(in, in)`` matrix or a :class:`Gram`. Raises NumericsError, naming ``name``, where it holds a NaN
        or an Inf, ValueError where it is not square, its halves differ by more than rounding, as those of ``Gram.matrix`` do,
        or ``dampening_frac`` is negative."""
        matrix = (gram.symmetric() if isinstance(gram, Gram) else gram).detach()
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"A Gram is square, not of shape {tuple(matrix.shape)}.")
        if dampening_frac < 0:
            raise ValueError(f"dampening_frac must not be negative, but is {dampening_frac}.")
        if not is_finite(matrix):
            raise NumericsError(f"The Gram of {name} holds a NaN or an Inf.")
        rounding = max(_LEAST_ROUNDING, _eps(matrix))
        if matrix.dtype != torch.float64:
            matrix = matrix.to(torch.float32)
        mean = matrix.diagonal().mean(dtype=torch.float64)
        scale, difference = torch.stack([mean, _halves_difference(matrix, mean)]).tolist()  # the host waits once
        if difference > rounding:
            raise ValueError(
                f"The upper half of the Gram of {name} is not that of its lower one: give the Gram itself, or its symmetric()."
            )
        self.in_features = matrix.shape[0]
        self.dampening_frac = dampening_frac
        self.is_identity = scale <= 0.0
        self.scale = 1.0 if self.is_identity else scale
        self._gram = matrix
        self._matrices: dict[torch.dtype, Tensor] = {}
        self._roots: dict[torch.dtype, Tensor] = {}
        self._choleskys: dict[torch.dtype, Tensor | None] = {}
        self._on_cpu: Whitening | None = None
        self._by_energy: dict[float, tuple[Tensor, Tensor]] = {}

    @classmethod
    def identity(cls, in_features: int, device: torch.device | str = "cpu") -> Whitening:
        """``G = I``, in no memory until its :meth:`matrix` is asked for: what is left is the plain SVD of the weight."""
        made = cls(torch.zeros(1, 1, dtype=torch.float32, device=device), dampening_frac=0.0)
        made.in_features, made._gram = in_features, made._gram.expand(in_features, in_features)
        return made

    def check_reads(self, weight: Tensor, name: str) -> None:
        """Raises ValueError where a ``weight (out, in)`` is no matrix of floats or reads another number of features, naming the
        layer."""
        if weight.ndim != 2 or not weight.is_floating_point():
            raise ValueError(
                f"{name} has a weight of shape {tuple(weight.shape)} in {weight.dtype}: give a matrix (out, in) of floats."
            )
        if weight.shape[1] != self.in_features:
            raise ValueError(f"{name} reads {weight.shape[1]} features, but its Gram is of {self.in_features}.")

    def on_cpu(self) -> Whitening:
        """The same whitening on the CPU, made once."""
        if self._gram.device.type == "cpu":
            return self
        if self._on_cpu is None:
            self._on_cpu = Whitening(self._gram.cpu(), self.dampening_frac)
            self._on_cpu.scale = self.scale  # to the last bit, as energies are multiples of it
        return self._on_cpu

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """``G' (in, in)`` in ``dtype``, float32 or float64; do not write to it."""
        if dtype not in self._matrices:
            if self.is_identity:
                made = torch.eye(self.in_features, dtype=dtype, device=self._gram.device)
            else:
                # Divided in the wider of the two dtypes: a float64 sum may be past float32's range.
                made = (self._gram.to(torch.promote_types(dtype, self._gram.dtype)) / self.scale).to(dtype)
                made.diagonal().add_(self.dampening_frac)
            self._matrices[dtype] = made
        return self._matrices[dtype]

    def diagonal(self) -> Tensor:
        """The diagonal of ``G'``, ``(in,)``, in float32; do not write to it."""
        if self.is_identity:
            return torch.ones(self.in_features, dtype=torch.float32, device=self._gram.device)
        return self.matrix(torch.float32).diagonal()

    def root(self, dtype: torch.dtype) -> Tensor:
        """``L (in, in)``, lower triangular, ``L Lᵀ = G'``, in ``dtype``: Cholesky's factor, where :meth:`cholesky` has one.

        Rounding can leave a sum of float32 products with an eigenvalue below ``-ε``. Then ``G' = V Λ Vᵀ``, computed in
        float64, becomes ``V max(Λ, ε) Vᵀ``, and ``L`` comes from the QR of its root. As in :meth:`cholesky`, float64 is on the
        CPU where the device is slow in it.
        """
        if dtype not in self._roots:
            lower = self.cholesky(dtype)
            if lower is None:
                values, vectors = torch.linalg.eigh(self._decomposed(torch.float64))
                floor = max(self.dampening_frac, torch.finfo(torch.float64).eps)
                upper = torch.linalg.qr((vectors * values.clamp_min(floor).sqrt()).T, mode="r").R
                lower = upper.T.to(dtype).to(self._gram.device)
            self._roots[dtype] = lower
        return self._roots[dtype]

    def cholesky(self, dtype: torch.dtype) -> Tensor | None:
        """:meth:`root` where Cholesky finds one; else ``None``, and :meth:`root` is slow.

        In float64 where float32 fails; and where that fails too, of ``G'`` damped 10 and 100 times as much: of few tokens a sum
        in float32 has eigenvalues down to ``-n^½`` roundoffs of its mean, of an order n.
        """
        if dtype not in self._choleskys:
            lower, failed = torch.linalg.cholesky_ex(self._decomposed(dtype))
            if int(failed) != 0 and dtype != torch.float64:
                lower, failed = torch.linalg.cholesky_ex(self._decomposed(torch.float64))
            for times in (10, 100) if int(failed) != 0 and self.dampening_frac else ():
                more = self._decomposed(torch.float64).clone()
                more.diagonal().add_((times - 1) * self.dampening_frac)
                lower, failed = torch.linalg.cholesky_ex(more)
                if int(failed) == 0:
                    break
            self._choleskys[dtype] = None if int(failed) != 0 else lower.to(dtype).to(self._gram.device)
        return self._choleskys[dtype]

    def _decomposed(self, dtype: torch.dtype) -> Tensor:
        """``G'`` where it is decomposed: in float64 on the CPU where the device is slow in that."""
        on_cpu = dtype == torch.float64 and not has_fast_float64(self._gram.device)
        return (self.on_cpu() if on_cpu else self).matrix(dtype)

    def root_by_energy(self, dampening_frac: float) -> tuple[Tensor, Tensor]:
        """The inputs in ascending order of ``G_jj``, ``(in,)``, and the :meth:`root` of the Gram of the inputs in that order,
        damped so, in float32. These are kept, but not the Gram in that order: it is as large again, twice."""
        if dampening_frac not in self._by_energy:
            order = self._gram.diagonal().argsort(stable=True)
            root, failed = torch.linalg.cholesky_ex(self._damped_in_order(order, dampening_frac))
            if int(failed) != 0:  # in float64, of the sums as they are
                del root
                root = Whitening(self._gram[order[:, None], order], dampening_frac).root(torch.float32)
            self._by_energy[dampening_frac] = order, root
        return self._by_energy[dampening_frac]

    def _damped_in_order(self, order: Tensor, dampening_frac: float) -> Tensor:
        """The Gram of the inputs in that order, damped so, in float32: of float32 sums one copy, damped where it lies."""
        if self.is_identity:
            return torch.eye(self.in_features, dtype=torch.float32, device=self._gram.device)
        ordered = self._gram[order[:, None], order]
        scale = float(ordered.diagonal().mean(dtype=torch.float64))  # to the last bit that of a Whitening of it
        damped = ordered.div_(scale).to(torch.float32)
        damped.diagonal().add_(dampening_frac)
        return damped

    def times(self, columns: Tensor) -> Tensor:
        """``G' X (in, k)`` for a few float64 columns ``X (in, k)``, from the Gram as it was given."""
        if self.is_identity:
            return columns
        return wide_product(self._gram, columns) / self.scale + self.dampening_frac * columns

    def outer(self, weight: Tensor) -> Tensor:
        """``W G' Wᵀ (out, out)`` for ``weight (out, in)``, in the dtype of ``weight``.

        With ``G' = T + Tᵀ`` and ``T`` block triangular, it is ``P + Pᵀ`` for ``P = W T Wᵀ``: up to a third less work, and
        exactly symmetric.
        """
        if self.is_identity:
            product = weight @ weight.T
            return (product + product.T) / 2
        product = self._times_half(weight) @ weight.T
        return product + product.T

    def energy(self, weight: Tensor) -> float:
        """``tr(W G' Wᵀ)`` for ``weight (out, in)``: directly, without its eigenvalues."""
        if self.is_identity:
            return float(weight.square().sum(dtype=torch.float64))
        return 2.0 * float(self._times_half(weight).mul_(weight).sum(dtype=torch.float64))

    def _times_half(self, weight: Tensor) -> Tensor:
        """``W T (out, in)``, ``G' = T + Tᵀ``: ``T`` is zero above its diagonal blocks, and half of ``G'`` in them."""
        gram = self.matrix(weight.dtype)
        half = torch.empty_like(weight, memory_format=torch.contiguous_format)
        width = _width(weight)
        for start in range(0, self.in_features, width):
            end = min(start + width, self.in_features)
            block = torch.mm(weight[:, start:end], gram[start:end, start:end] / 2, out=half[:, start:end])
            if end < self.in_features:
                block.addmm_(weight[:, end:], gram[end:, start:end])
        return half

    def whiten(self, weight: Tensor) -> Tensor:
        """``W L (out, in)`` for ``weight (out, in)``, in the dtype of ``weight``; the upper triangle of ``L`` is skipped."""
        if self.is_identity:
            return weight
        root = self.root(weight.dtype)
        whitened = torch.empty_like(weight, memory_format=torch.contiguous_format)
        width = _width(weight)
        for start in range(0, self.in_features, width):
            columns = slice(start, start + width)
            torch.mm(weight[:, start:], root[start:, columns], out=whitened[:, columns])
        return whitened
