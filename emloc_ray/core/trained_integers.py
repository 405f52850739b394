"""Integers that steps along a gradient change: a float is trained in the place of each code, scale and zero point.

The weight is always that of the rounded ones, ``W = s (q − z)`` of :mod:`emloc_ray.core.integers`. Its gradient goes through the
rounding as if there was none: the straight-through estimator (https://arxiv.org/abs/1308.3432). EfficientQAT
(https://arxiv.org/abs/2407.11062) trains a block's scales and weights in this way, SignRound
(https://arxiv.org/abs/2309.05516) its roundings.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from emloc_ray.core.integers import IntegerWeight
from emloc_ray.core.unpacking import SCALE_STEPS, scale_values, zero_steps

ELEMENTS = 2**22  # of a weight that are made, or whose gradients are, at a time
_STEP = math.log(2.0) / SCALE_STEPS  # from one scale to the next, in its logarithm


class Unrounded(NamedTuple):
    """What is trained, float32: ``codes (out, in)``; ``log_scales``, of ``s / 2^e``, and ``zeros``, ``(out, groups)``."""

    codes: Tensor
    log_scales: Tensor
    zeros: Tensor


def unrounded(weight: IntegerWeight) -> Unrounded:
    """A weight's integers as floats, before any step."""
    zeros = weight.zeros.float() / zero_steps(weight.bits)
    return Unrounded(weight.codes.float(), weight.scales.float() * _STEP, zeros)


def rounded(floats: Unrounded, grid: IntegerWeight) -> IntegerWeight:
    """The integers nearest to what was trained, of the exponent, bits and groups of ``grid``."""
    top, steps = 2**grid.bits - 1, zero_steps(grid.bits)
    return IntegerWeight(
        floats.codes.round().clamp(0, top).to(torch.uint8),
        (floats.log_scales / _STEP).round().clamp(0, 255).to(torch.uint8),
        (floats.zeros * steps).round().clamp(0, top * steps).to(torch.uint8),
        grid.exponent,
        grid.bits,
        grid.group_size,
    )


def rounded_weight(floats: Unrounded, grid: IntegerWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """``W (out, in)`` of :func:`rounded`, computed in float32 and rounded to ``dtype``, with gradients for what is trained."""
    weight: Tensor = _Rounded.apply(*floats, grid, dtype)
    return weight


class _Rounded(torch.autograd.Function):
    """``dL/dq = s dL/dW``, ``dL/d ln s = Σ_group W dL/dW`` and ``dL/dz = −s Σ_group dL/dW``; none that would lead what is stored
    beyond its range. Some rows at a time, so that little is held beside what comes and goes."""

    @staticmethod
    def forward(
        ctx: Any, codes: Tensor, log_scales: Tensor, zeros: Tensor, grid: IntegerWeight, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(codes, log_scales, zeros)
        ctx.grid, weight = grid, torch.empty_like(codes, dtype=dtype)
        for *part, made in _parts(codes, log_scales, zeros, weight):
            made.copy_(rounded(Unrounded(*part), grid).dense())
        return weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        floats = ctx.saved_tensors
        gradients = [torch.empty_like(part) for part in floats]
        for *part, rows, codes, log_scales, zeros in _parts(*floats, gradient, *gradients):
            for place, made in zip(
                (codes, log_scales, zeros), _gradients(Unrounded(*part), rows, ctx.grid), strict=True
            ):
                place.copy_(made)
        return *gradients, None, None


def _gradients(floats: Unrounded, gradient: Tensor, grid: IntegerWeight) -> Unrounded:
    """What is trained of some rows, for the ``gradient (rows, in)`` of their weight: the formulas of :class:`_Rounded`."""
    weight = rounded(floats, grid)
    groups, size = weight.scales.shape[1], grid.group_size

    def grouped(values: Tensor) -> Tensor:
        return pad(values, (0, groups * size - values.shape[1])).view(len(values), groups, size)

    scales, by_group = scale_values(weight.scales, grid.exponent), grouped(gradient.float())
    log_scales = (by_group * grouped(weight.dense())).sum(dim=-1)
    zeros = -scales * by_group.sum(dim=-1)
    codes = (by_group * scales[..., None]).flatten(1)[:, : gradient.shape[1]]
    top = 2**grid.bits - 1
    return Unrounded(
        _within(floats.codes, codes, top),
        _within(floats.log_scales, log_scales, 255 * _STEP),
        _within(floats.zeros, zeros, top),
    )


def _within(values: Tensor, gradients: Tensor, top: float) -> Tensor:
    """The gradients, zero where a step against them leads a value out of ``[0, top]``."""
    beyond = ((values <= 0) & (gradients > 0)) | ((values >= top) & (gradients < 0))
    return gradients.masked_fill(beyond, 0.0)


def _parts(codes: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of all tensors, some at a time."""
    rows = max(1, ELEMENTS // codes.shape[1])
    return zip(*(tensor.split(rows) for tensor in (codes, *others)), strict=True)
