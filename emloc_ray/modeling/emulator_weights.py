"""The weights of an emulator's linears, read from what it stores: floats, NF4 or integers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from emloc_ray.core.integer_forms import BITS
from emloc_ray.core.integers import dense_weight, stored_bits
from emloc_ray.core.pivoting import PivotedFactors
from emloc_ray.core.stored_weight import StoredWeight
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.modeling.nf4 import STATE_KEYS, dequantize_nf4, is_nf4


def linear_weight(
    parts: Mapping[str, Mapping[str, Tensor]],
    in_features: int,
    order: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> StoredWeight:
    """The weight of an emulator's linear on a ``device``, of all that is stored of it, by what follows its name.

    ``parts`` are those of a dense weight (``""``), of factors (``.up`` and ``.down``, with the ``order`` of pivoted rows), and of
    integers beside factors (``.base``); each in its floating dtype, in NF4 or in integers.
    """

    def dense(part: str, columns: int) -> Tensor:
        tensors = {key: tensor.to(device) for key, tensor in parts[part].items()}  # in few bits, and unpacked there
        if stored_bits(tensors) is not None:
            return dense_weight(tensors, columns)
        return dequantize_nf4(tensors) if is_nf4(tensors) else tensors["weight"]

    if ".down" not in parts:
        return StoredWeight(dense("", in_features))
    down = dense(".down", in_features)
    up = dense(".up", len(down))
    if order is not None:
        up = PivotedFactors(up, down, order.to(device)).plain().up
    return StoredWeight(up, down, dense(".base", in_features) if ".base" in parts else None)


class StoredParts(NamedTuple):
    """All that an emulator stores of a linear, as read: see :func:`linear_weight`."""

    parts: Mapping[str, Mapping[str, Tensor]]
    order: Tensor | None

    def weight(self, in_features: int, device: torch.device | str = "cpu") -> StoredWeight:
        """The weight, on a ``device``."""
        return linear_weight(self.parts, in_features, self.order, device)


def emulator_weight(
    emulator: Checkpoint, name: str, in_features: int, device: torch.device | str = "cpu"
) -> StoredWeight | None:
    """A linear's weight as an emulator stores it, on a ``device``; None where it keeps the original's."""
    stored = stored_parts(emulator, name)
    return None if stored is None else stored.weight(in_features, device)


def stored_parts(emulator: Checkpoint, name: str) -> StoredParts | None:
    """What an emulator stores of a linear; None where it keeps the original's."""
    keys = ("weight", *STATE_KEYS, *(f"int{bits}" for bits in BITS), "scales", "zeros", "exponent")
    parts = {
        part: {key: emulator.read(f"{name}{part}.{key}") for key in keys if f"{name}{part}.{key}" in emulator}
        for part in ("", ".up", ".down", ".base")
    }
    stored = {part: tensors for part, tensors in parts.items() if tensors}
    if stored.keys() <= {""} and stored.get("", {}).keys() <= {"weight"}:  # a dense expert has a name of its own
        return None
    return StoredParts(stored, emulator.read(f"{name}.order") if f"{name}.order" in emulator else None)


def num_elements(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Parameters that a tensor of a checkpoint stands for: two a byte in 4 bits, none where it holds scales, or the places
    of pivoted rows."""
    _, _, key = name.rpartition(".")
    if ".weight." in name or (key == "order" and dtype == torch.int32) or key in ("scales", "zeros", "exponent"):
        return 0
    if stored_bits((key,)) is not None:
        return math.prod(shape) * 8 // int(key.removeprefix("int"))
    return math.prod(shape) * (2 if dtype == torch.uint8 else 1)
