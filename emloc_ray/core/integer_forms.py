"""How linears are stored in integers, and the bytes that it takes; what they stand for is in :mod:`emloc_ray.core.integers`."""

import math
from dataclasses import dataclass, field

BITS = (2, 3, 4, 8)
GROUP_SIZE = 64
# Bits of the planes that codes are split into, so that each fills bytes.
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


@dataclass(frozen=True)
class IntegerForms:
    """Which linears of an emulator are stored in integers: ``bits`` of each, of its factors where it has some; and the ranks of
    factors in :func:`factor_bits` beside the integers of a whole weight."""

    bits: dict[str, int] = field(default_factory=dict)
    residual_ranks: dict[str, int] = field(default_factory=dict)
    group_size: int = GROUP_SIZE


def factor_bits(bits: int) -> int:
    """Bits of the factors that lie beside a weight of ``bits`` bits."""
    return max(bits, 4)


def num_groups(in_features: int, group_size: int) -> int:
    """Groups of a row at a ``group_size``, a multiple of 8: as many as hold it, then made of one size."""
    return math.ceil(in_features / group_size)


def group_size_of(in_features: int, groups: int) -> int:
    """The size of the groups that a row is cut into: the smallest multiple of 8 that makes so many, the last one shorter."""
    sizes = range(8, in_features + 8, 8)
    return next(size for size in sizes if math.ceil(in_features / size) == groups)


def packed_width(in_features: int, bits: int) -> int:
    """Bytes of a row's codes."""
    return sum(math.ceil(in_features * plane / 8) for plane in PLANES[bits])


def integer_bytes(out_features: int, in_features: int, bits: int, group_size: int, itemsize: int = 4) -> int:
    """Bytes of a weight of integers, scales and zero points included."""
    return out_features * (packed_width(in_features, bits) + 2 * num_groups(in_features, group_size)) + itemsize
