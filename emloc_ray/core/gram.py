"""Gram matrices ``G = XᵀX``: a plain sum over tokens, kept with the number of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from emloc_ray.core.precision import exact_float32, without_autocast

# Blocks of so many rows: wide enough for full matrix-product speed, narrow enough to skip nearly half of the symmetric
# product. Measured at 768 to 3,072 tokens: 0.63 of the full product's time for 576 features, 0.60 for 1,536.
BLOCK, _SMALL_BLOCK, _SMALL = 192, 96, 1024
_GPU_BLOCK = 2048  # what a GPU needs to be busy with one


@dataclass
class TokenSum:
    """``matrix``, a sum over ``num_tokens`` tokens."""

    matrix: Tensor
    num_tokens: int = 0

    def update(self, activations: Tensor) -> None:
        """Adds the tokens of ``activations (..., in)``, in place; leave padding out. Raises ValueError where these have another
        number of features: blocks of them may fit."""
        if activations.shape[-1:] != self.matrix.shape[:1]:
            raise ValueError(
                f"activations of the shape {tuple(activations.shape)} do not end in the {self.matrix.shape[0]} features of this"
                " sum."
            )
        tokens = activations.detach().reshape(-1, activations.shape[-1])
        with exact_float32(), without_autocast(tokens.device):
            self._add(tokens)
        self.num_tokens += tokens.shape[0]

    def _add(self, tokens: Tensor) -> None:
        raise NotImplementedError


class Gram(TokenSum):
    """``matrix = Σ x xᵀ`` over ``num_tokens`` tokens, shape ``(in, in)``, float32 or wider.

    A monoid: :meth:`zero` is the identity, and sums add up (:func:`emloc_ray.io.formats.grams.add_slot`). How tokens are
    grouped changes the rounding alone. Only the lower block triangle is kept current: :meth:`symmetric` gives all.
    """

    @classmethod
    def zero(cls, in_features: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Gram:
        """The sum over no tokens, ``(in_features, in_features)`` of zeros."""
        return cls(torch.zeros(in_features, in_features, dtype=dtype, device=device))

    def _add(self, tokens: Tensor) -> None:
        narrow = tokens.is_cuda and tokens.dtype == torch.bfloat16 and self.matrix.dtype == torch.float32
        tokens = tokens if narrow else tokens.to(self.matrix.dtype)
        width = _width(tokens)
        for start in range(0, tokens.shape[1], width):
            rows = slice(start, start + width)
            block, left, right = self.matrix[rows, : rows.stop], tokens[:, rows].T, tokens[:, : rows.stop]
            if narrow:  # exact products of bfloat16, summed in float32
                block.add_(torch.mm(left, right, out_dtype=torch.float32))
            else:
                block.addmm_(left, right)

    def symmetric(self) -> Tensor:
        """The full symmetric matrix ``(in, in)``, from the lower triangle."""
        lower = torch.tril(self.matrix)
        return lower + torch.tril(lower, -1).T


class GramColumns(TokenSum):
    """``matrix = G Q = Σ x (xᵀ Q)``, shape ``(in, k)``, float32, of ``q (in, k)``: what a few directions see of a Gram, at
    ``4 k in`` operations a token, where the Gram itself takes ``in²``."""

    def __init__(self, q: Tensor, device: torch.device | str = "cpu") -> None:
        """The sum over no tokens."""
        self.q = q.to(device, torch.float32)
        super().__init__(torch.zeros_like(self.q))

    def _add(self, tokens: Tensor) -> None:
        tokens = tokens.float()
        self.matrix.addmm_(tokens.T, tokens @ self.q)


def _width(tokens: Tensor) -> int:
    if tokens.device.type != "cpu":
        return _GPU_BLOCK
    return _SMALL_BLOCK if tokens.shape[1] < _SMALL else BLOCK


def not_finite(grams: Mapping[str, TokenSum]) -> str | None:
    """The first of the sums that holds a NaN or an Inf, by one transfer from the device for all of them."""
    if not grams:
        return None
    # Of a Gram the diagonal: no product of two elements is past the dtype's range where both squares are within it.
    parts = (gram.matrix.diagonal() if isinstance(gram, Gram) else gram.matrix for gram in grams.values())
    finite = torch.stack([torch.isfinite(part).all() for part in parts]).tolist()
    return next((name for name, is_finite in zip(grams, finite, strict=True) if not is_finite), None)


def packed_triangle(matrix: Tensor, chunk_bytes: int = 2**24) -> Iterator[Tensor]:
    """The lower triangle of a symmetric ``(n, n)`` matrix, row by row, in parts on the host that together are
    ``(n (n + 1) / 2,)``: half the bytes. A part is made of at most about ``chunk_bytes``."""
    n = matrix.shape[0]
    step = max(1, chunk_bytes // max(1, n * matrix.itemsize))
    for begin in range(0, n, step):
        rows = matrix[begin : begin + step].cpu()
        yield torch.cat([row[: begin + offset + 1] for offset, row in enumerate(rows)])


def unpack_triangle(packed: Tensor) -> Tensor:
    """The symmetric ``(n, n)`` matrix of :func:`packed_triangle`'s ``(n (n + 1) / 2,)``, on its device."""
    if packed.device.type != "cpu":  # where the host would launch a copy for each row
        return gather_triangle(packed)
    n = _order(packed)
    matrix = packed.new_empty(n, n)
    for row in range(n):
        matrix[row, : row + 1] = packed[_triangle(row) : _triangle(row + 1)]
    for start in range(0, n, BLOCK):
        block = slice(start, start + BLOCK)
        matrix[block, block] = torch.tril(matrix[block, block]) + torch.tril(matrix[block, block], -1).T
        matrix[:start, block] = matrix[block, :start].T
    return matrix


def gather_triangle(packed: Tensor, elements: int = 2**22) -> Tensor:
    """The same, each element looked up: by a few launches for so many ``elements``, which take 32 bytes each meanwhile."""
    n = _order(packed)
    matrix, columns = packed.new_empty(n, n), torch.arange(n, device=packed.device)
    for rows in torch.split(columns, max(1, elements // max(1, n))):
        high, low = torch.maximum(rows[:, None], columns), torch.minimum(rows[:, None], columns)
        matrix.index_copy_(0, rows, packed.take(high * (high + 1) // 2 + low))
    return matrix


def _order(packed: Tensor) -> int:
    return (math.isqrt(8 * packed.numel() + 1) - 1) // 2


def _triangle(rows: int) -> int:
    return rows * (rows + 1) // 2
