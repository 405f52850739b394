"""Weights of small integers out of their bytes, by what is fast where these are.

On a CPU several columns are unpacked at once, as parts of a wider integer. On CUDA that would move some 30 bytes an element
through the card's memory, which takes longer than the product with 2,000 tokens; one kernel, which torch compiles, reads the
b bits and writes the weight.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from emloc_ray.core.compiled import compiled_or
from emloc_ray.core.integer_forms import PLANES

# Parts of a byte, by their width, become bytes of one integer: by how much its upper half moves in turn, and which bits stay.
_SPREADING = {
    4: (torch.int16, ((4, 0x0F0F),)),
    2: (torch.int32, ((12, 0x000F000F), (6, 0x03030303))),
    1: (torch.int64, ((28, 0x0000000F0000000F), (14, 0x0003000300030003), (7, 0x0101010101010101))),
}
_GRAPHS = 256  # as many as dynamo makes of one function in all
SCALE_STEPS = 8  # of an octave


def unpacked_weight(
    packed: Tensor, scales: Tensor, zeros: Tensor, exponent: Tensor, bits: int, in_features: int, group_size: int
) -> Tensor:
    """``s (q − z) (out, in)``, computed in float32 and rounded to the dtype of ``exponent``. The tensors are as
    :meth:`~emloc_ray.core.integers.IntegerWeight.tensors` has them."""
    arguments = packed, scales, zeros, exponent, bits, in_features, group_size
    if not packed.is_cuda:
        return by_words(*arguments)
    with torch.no_grad(), torch.autocast("cuda", enabled=False):  # dynamo compiles anew for each of these states
        return cuda_unpacking(packed.device)(*arguments)


def by_words(
    packed: Tensor, scales: Tensor, zeros: Tensor, exponent: Tensor, bits: int, in_features: int, group_size: int
) -> Tensor:
    """As :func:`unpacked_weight`, step by step."""
    scale, zero = scale_values(scales, exponent.float()), zero_values(zeros, bits)
    return grouped_weight(unpacked_codes(packed, bits, in_features), scale, zero, group_size).to(exponent.dtype)


def by_elements(
    packed: Tensor, scales: Tensor, zeros: Tensor, exponent: Tensor, bits: int, in_features: int, group_size: int
) -> Tensor:
    """As :func:`unpacked_weight`, each element by itself, which compiles to one kernel; run as it is it takes some ten times as
    long on a CPU."""
    codes, begin, shift = None, 0, 0
    for width in PLANES[bits]:
        length = math.ceil(in_features * width / 8)
        places = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
        part = (packed[:, begin : begin + length, None] >> places) & (2**width - 1)
        part = part.flatten(1)[:, :in_features]
        codes = part if codes is None else codes | (part << shift)
        begin, shift = begin + length, shift + width
    assert codes is not None
    scale, zero = (
        of_group[..., None].expand(-1, -1, group_size).flatten(1)[:, :in_features]
        for of_group in (scale_values(scales, exponent.float()), zero_values(zeros, bits))
    )
    weight: Tensor = ((codes.float() - zero) * scale).to(exponent.dtype)
    return weight


def unpacked_codes(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """The codes ``q (out, in)``, uint8, of ``packed (out, bytes)``, on any device."""
    codes, begin, shift = None, 0, 0
    for width in PLANES[bits]:
        length = math.ceil(in_features * width / 8)
        part = packed[:, begin : begin + length]
        part = part if width == 8 else _spread(part, width)[:, :in_features]
        codes = part if codes is None else codes | (part << shift)
        begin, shift = begin + length, shift + width
    assert codes is not None
    return codes


def scale_values(codes: Tensor, exponent: Tensor | int) -> Tensor:
    """``s`` in float32."""
    return torch.exp2(codes.float() / SCALE_STEPS + exponent)


def zero_values(codes: Tensor, bits: int) -> Tensor:
    """``z`` in float32."""
    return codes.float() / zero_steps(bits)


def zero_steps(bits: int) -> int:
    """How many codes of zero points there are from one integer to the next."""
    return 255 // ((1 << bits) - 1)


def grouped_weight(codes: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> Tensor:
    """``s (q − z) (out, in)`` in float32, for ``codes`` q ``(out, in)``, uint8."""
    groups, columns = scale.shape[1], codes.shape[1]
    lacking = groups * group_size - columns
    values = torch.nn.functional.pad(codes, (0, lacking)).view(len(codes), groups, group_size).float()
    return values.sub_(zero[..., None]).mul_(scale[..., None]).flatten(1)[:, :columns]


@functools.cache
def cuda_unpacking(device: torch.device) -> Callable[..., Tensor]:
    """:func:`by_elements`, compiled, for the first shapes; :func:`by_words` beyond, and where nothing here compiles it."""
    return compiled_or(by_words, functools.partial(_compiled, device), "unpacks weights of few bits")


def by_shapes(first: Callable[..., Tensor], others: Callable[..., Tensor], limit: int) -> Callable[..., Tensor]:
    """A function of tensors and numbers that is ``first`` for the first ``limit`` different shapes, dtypes and numbers, and
    ``others`` for what comes after them."""
    seen: set[tuple[Any, ...]] = set()

    def function(*arguments: Any) -> Tensor:
        shapes = tuple((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in arguments)
        if shapes not in seen:
            if len(seen) >= limit:
                return others(*arguments)
            seen.add(shapes)
        return first(*arguments)

    return function


def _compiled(device: torch.device) -> Callable[..., Tensor]:
    from torch._dynamo import config

    compiled: Callable[..., Tensor] = torch.compile(by_elements, dynamic=False)

    def unpack(*arguments: Any) -> Tensor:
        # A graph for each shape and width: with sizes that it learns as it runs, an element takes four divisions by them, some
        # ten times the instructions. Beyond the limit, which is 8 and in torch 2.13 each thread's own, torch would run the
        # elements uncompiled, in silence; ranks that differ by layer have more shapes than even the raised one.
        config.recompile_limit = max(config.recompile_limit, _GRAPHS)
        return compiled(*arguments)

    packed, grid = (torch.zeros(8, count, dtype=torch.uint8, device=device) for count in (32, 2))
    unpack(packed, grid, grid, torch.zeros((), device=device), 4, 64, 32)
    return by_shapes(unpack, by_words, _GRAPHS - 1)  # one was made above


def _spread(part: Tensor, width: int) -> Tensor:
    """Each byte's parts as bytes, the lowest first. A shift by each place takes two to eleven times as long on a CPU."""
    kind, moves = _SPREADING[width]
    spread = part.to(kind)
    for places, kept in moves:
        spread.bitwise_or_(spread << places).bitwise_and_(kept)
    return spread.view(torch.uint8)
