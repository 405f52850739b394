"""The whitening of a layer's inputs: the damped Gram and a square root of it, shared by the linears that read them."""

from __future__ import annotations

import torch
from torch import Tensor

from emloc_ray.core.gram import Gram
from emloc_ray.errors import NumericsError


class Whitening:
    """``G' = G / s + ε I``, ``s = tr(G) / in`` the mean of G's diagonal and ``ε = dampening_frac``.

    So ``s G'`` is the damped Gram.
    Dividing by ``s`` keeps products of sums over many tokens inside float32's range. Copies in another dtype and the
    square root are made at first use and kept: linears that read the same tensor share one ``Whitening``, so that they
    share these too (DESIGN.md, section 1). A Gram of zeros says nothing about directions and whitens like the identity.

    Attributes:
        scale: ``s``, or 1 where it is not positive.
    """

    def __init__(self, gram: Tensor | Gram, dampening_frac: float = 1e-6) -> None:
        """Takes a symmetric ``(in, in)`` matrix or a :class:`Gram`.

        Raises:
            NumericsError: the Gram holds a NaN or an Inf.
            ValueError: the matrix is not square, or ``dampening_frac`` is negative.
        """
        matrix = gram.symmetric() if isinstance(gram, Gram) else gram
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"A Gram is square, not of shape {tuple(matrix.shape)}.")
        if dampening_frac < 0:
            raise ValueError(f"dampening_frac must not be negative, but is {dampening_frac}.")
        if not bool(torch.isfinite(matrix).all()):
            raise NumericsError("The Gram holds a NaN or an Inf.")
        if matrix.dtype != torch.float64:
            matrix = matrix.to(torch.float32)
        scale = float(matrix.diagonal().mean(dtype=torch.float64))
        self.in_features = matrix.shape[0]
        self.dampening_frac = dampening_frac
        self.is_identity = scale <= 0.0
        self.scale = 1.0 if self.is_identity else scale
        self._gram = matrix
        self._matrices: dict[torch.dtype, Tensor] = {}
        self._roots: dict[torch.dtype, Tensor] = {}

    @classmethod
    def identity(cls, in_features: int, device: torch.device | str = "cpu") -> Whitening:
        """``G = I``: what is left is the plain SVD of the weight."""
        return cls(torch.zeros(in_features, in_features, device=device), dampening_frac=0.0)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """``G' (in, in)`` in ``dtype``; do not write to it."""
        if dtype not in self._matrices:
            if self.is_identity:
                made = torch.eye(self.in_features, dtype=dtype, device=self._gram.device)
            else:
                made = self._gram.to(dtype) / self.scale
                made.diagonal().add_(self.dampening_frac)
            self._matrices[dtype] = made
        return self._matrices[dtype]

    def root(self, dtype: torch.dtype) -> Tensor:
        """``L (in, in)`` with ``L Lᵀ = G'`` in ``dtype``: Cholesky's lower triangle, where there is one.

        Rounding can leave a sum of float32 products with an eigenvalue below ``-ε``. Then ``L = V max(Λ, ε)^½`` from
        ``G' = V Λ Vᵀ``, computed in float64.
        """
        if dtype not in self._roots:
            if self.is_identity:
                self._roots[dtype] = self.matrix(dtype)
                return self._roots[dtype]
            lower, failed = torch.linalg.cholesky_ex(self.matrix(dtype))
            if int(failed) != 0:
                values, vectors = torch.linalg.eigh(self.matrix(torch.float64))
                floor = max(self.dampening_frac, torch.finfo(torch.float64).eps)
                lower = (vectors * values.clamp_min(floor).sqrt()).to(dtype)
            self._roots[dtype] = lower
        return self._roots[dtype]
