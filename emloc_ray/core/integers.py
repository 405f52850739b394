"""Weights as small integers: ``W ≈ s (q − z)``, with a scale and a zero point for each group of a row's columns.

``q`` has b bits. ``s = 2^(e + c / 8)``, with c in 8 bits and one integer ``e`` a weight: 32 octaves in steps of 9 %, so
that a scale chosen among these loses nothing that matters. ``z = c' / ⌊255 / (2^b − 1)⌋`` with c' in 8 bits: a zero
point between two integers too, as 2 bits need it. In groups of 64 this takes b + 0.25 bits an element.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from emloc_ray.core.integer_forms import BITS, PLANES, group_size_of
from emloc_ray.core.unpacking import (
    SCALE_STEPS,
    grouped_weight,
    scale_values,
    unpacked_codes,
    unpacked_weight,
    zero_values,
)

_OCTAVES = 256 // SCALE_STEPS


@dataclass(frozen=True)
class IntegerWeight:
    """A weight ``(out, in)`` as integers; groups are of consecutive columns, the last one may be shorter.

    Attributes:
        codes: ``q (out, in)``, uint8.
        scales, zeros: ``c`` and ``c'``, ``(out, groups)``, uint8.
        exponent: ``e``.
        bits: b.
        group_size: columns that share a scale.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    exponent: int
    bits: int
    group_size: int

    def with_codes(self, codes: Tensor) -> IntegerWeight:
        """Other codes at the same scales and zero points."""
        return replace(self, codes=codes)

    def dense(self) -> Tensor:
        """``s (q − z) (out, in)`` in float32."""
        scale, zero = scale_values(self.scales, self.exponent), zero_values(self.zeros, self.bits)
        return grouped_weight(self.codes, scale, zero, self.group_size)

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What a checkpoint stores; ``exponent`` is of the ``dtype`` that the weight computes in, which holds it exactly."""
        return {
            f"int{self.bits}": _packed(self.codes, self.bits),
            "scales": self.scales,
            "zeros": self.zeros,
            "exponent": torch.tensor(float(self.exponent), dtype=dtype, device="cpu"),
        }


def stored_bits(keys: Container[str]) -> int | None:
    """The bits of a module's weight by the names of its tensors; None where none is of integers."""
    return next((bits for bits in BITS if f"int{bits}" in keys), None)


def integer_weight(tensors: Mapping[str, Tensor], in_features: int) -> IntegerWeight:
    """The weight ``(out, in)`` that ``tensors``, as :meth:`IntegerWeight.tensors` has them, stand for."""
    bits = stored_bits(tensors)
    assert bits is not None
    scales, exponent = tensors["scales"], int(tensors["exponent"])
    codes, size = unpacked_codes(tensors[f"int{bits}"], bits, in_features), group_size_of(in_features, scales.shape[1])
    return IntegerWeight(codes, scales, tensors["zeros"], exponent, bits, size)


def dense_weight(tensors: Mapping[str, Tensor], in_features: int) -> Tensor:
    """The weight ``(out, in)`` that ``tensors``, as :meth:`IntegerWeight.tensors` has them, stand for, in the dtype
    that it was stored for; computed in float32."""
    bits = stored_bits(tensors)
    assert bits is not None
    grid = tensors["scales"], tensors["zeros"], tensors["exponent"]
    size = group_size_of(in_features, grid[0].shape[1])
    return unpacked_weight(tensors[f"int{bits}"], *grid, bits, in_features, size)


def exponent_for(largest_scale: float) -> int:
    """``e`` such that scales up to twice the largest have a code, and those down to some 2⁻³⁰ of it."""
    return math.floor(math.log2(largest_scale)) + 2 - _OCTAVES if largest_scale > 0 else 0


def _packed(codes: Tensor, bits: int) -> Tensor:
    """``(out, bytes)``: planes one after the other, in each the first of the columns that share a byte lowest."""
    planes, shift = [], 0
    for width in PLANES[bits]:
        each = 8 // width
        part = (codes >> shift) & (2**width - 1)
        part = torch.nn.functional.pad(part, (0, -part.shape[1] % each)).view(len(codes), -1, each)
        places = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)
        planes.append((part << places).sum(dim=2, dtype=torch.uint8))
        shift += width
    return torch.cat(planes, dim=1).contiguous()
