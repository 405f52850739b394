"""Weights of small integers out of their bytes, by what is fast where these are.

On a CPU several columns are unpacked at once, as parts of a wider integer. On CUDA that would move some 30 bytes an element
through the card's memory, which takes longer than the product with 2,000 tokens; one kernel, which torch compiles, reads the
b bits and writes the weight.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from emloc_ray.core.integer_forms import PLANES

# Parts of a byte, by their width, become bytes of one integer: by how much its upper half moves in turn, and which bits stay.
_SPREADING = {
    4: (torch.int16, ((4, 0x0F0F),)),
    2: (torch.int32, ((12, 0x000F000F), (6, 0x03030303))),
    1: (torch.int64, ((28, 0x0000000F0000000F), (14, 0x0003000300030003), (7, 0x0101010101010101))),
}
_GRAPHS = 64


def unpacked_weight(
    packed: Tensor, scale: Tensor, zero: Tensor, bits: int, in_features: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """``s (q − z) (out, in)``, computed in float32 and rounded to ``dtype``: the same bits on every device. ``packed`` are the
    bytes of the codes q, as :meth:`~emloc_ray.core.integers.IntegerWeight.tensors` has them; ``scale`` and ``zero``
    ``(out, groups)`` are s and z in float32."""
    arguments = packed, scale, zero, bits, in_features, group_size, dtype
    if not packed.is_cuda:
        return by_words(*arguments)
    with torch.no_grad(), torch.autocast("cuda", enabled=False):  # dynamo compiles anew for each of these states
        return in_one_kernel(packed.device)(*arguments)


def by_words(
    packed: Tensor, scale: Tensor, zero: Tensor, bits: int, in_features: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """As :func:`unpacked_weight`, step by step."""
    return grouped_weight(_codes(packed, bits, in_features), scale, zero, group_size).to(dtype)


def by_elements(
    packed: Tensor, scale: Tensor, zero: Tensor, bits: int, in_features: int, group_size: int, dtype: torch.dtype
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
        of_group[..., None].expand(-1, -1, group_size).flatten(1)[:, :in_features] for of_group in (scale, zero)
    )
    weight: Tensor = ((codes.float() - zero) * scale).to(dtype)
    return weight


def grouped_weight(codes: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> Tensor:
    """``s (q − z) (out, in)`` in float32, for ``codes`` q ``(out, in)``, uint8."""
    groups, columns = scale.shape[1], codes.shape[1]
    lacking = groups * group_size - columns
    values = torch.nn.functional.pad(codes, (0, lacking)).view(len(codes), groups, group_size).float()
    return values.sub_(zero[..., None]).mul_(scale[..., None]).flatten(1)[:, :columns]


@functools.cache
def in_one_kernel(device: torch.device) -> Callable[..., Tensor]:
    """:func:`by_elements`, compiled; :func:`by_words` where nothing here compiles it: Triton needs a C compiler."""
    from torch._dynamo import config

    # Few shapes and dtypes of weights; beyond the limit, which is 8, torch would run the elements uncompiled, in silence.
    config.recompile_limit = max(config.recompile_limit, _GRAPHS)
    compiled: Callable[..., Tensor] = torch.compile(by_elements, dynamic=True)
    bytes_of, values = torch.zeros(8, 32, dtype=torch.uint8, device=device), torch.ones(8, 2, device=device)
    try:
        compiled(bytes_of, values, values, 4, 64, 32, torch.bfloat16)
    except (RuntimeError, ImportError) as error:
        warnings.warn(
            f"torch cannot compile what unpacks weights of few bits ({type(error).__name__}), so that steps may take three times"
            " as long: install a C compiler, such as gcc, beside torch's own triton.",
            stacklevel=2,
        )
        return by_words
    return compiled


def _codes(packed: Tensor, bits: int, in_features: int) -> Tensor:
    codes, begin, shift = None, 0, 0
    for width in PLANES[bits]:
        length = math.ceil(in_features * width / 8)
        part = packed[:, begin : begin + length]
        part = part if width == 8 else _spread(part, width)[:, :in_features]
        codes = part if codes is None else codes | (part << shift)
        begin, shift = begin + length, shift + width
    assert codes is not None
    return codes


def _spread(part: Tensor, width: int) -> Tensor:
    """Each byte's parts as bytes, the lowest first. A shift by each place takes two to eleven times as long on a CPU."""
    kind, moves = _SPREADING[width]
    spread = part.to(kind)
    for places, kept in moves:
        spread.bitwise_or_(spread << places).bitwise_and_(kept)
    return spread.view(torch.uint8)
