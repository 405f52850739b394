"""Healing: a LoRA that was distilled into an emulator becomes part of its factors, which grow by its rank."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from emloc_ray.core.factorization import LowRankFactors


def ranks_before_healing(ranks: Mapping[str, int], r: int) -> dict[str, int]:
    """To what ranks layers are factorized so that a LoRA of rank r brings each to the rank of ``ranks``.

    ``rank − r``; where that is not above zero the layer has its whole rank from the start, and is not healed. The factors
    then hold as many parameters with and without healing.
    """
    return {name: rank - r if rank > r else rank for name, rank in ranks.items()}


def healed_layers(ranks: Mapping[str, int], r: int) -> tuple[str, ...]:
    """The layers that :func:`ranks_before_healing` leaves room in, in the order of ``ranks``."""
    return tuple(name for name, rank in ranks.items() if rank > r)


def added_factors(lora_a: Tensor, lora_b: Tensor, scale: float) -> LowRankFactors:
    """``s B A`` as factors like those of the emulator: ``up (out, r)`` with orthonormal columns, ``down (r, in)``.

    ``B = Q R`` and ``up = Q``, ``down = s R A``, in float64: so that columns which share a block of 64 in 4 bits are of one
    size, as they would not be with B's own.

    Args:
        lora_a: A ``(r, in)``.
        lora_b: B ``(out, r)``, ``out ≥ r``.
        scale: s.
    """
    q, upper = torch.linalg.qr(lora_b.double())
    return LowRankFactors(q, scale * (upper @ lora_a.double()))
