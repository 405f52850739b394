"""Healing: a LoRA that was distilled into an emulator becomes part of its factors, which grow by its rank."""

from collections.abc import Mapping

import torch
from torch import Tensor

from emloc_ray.core.factorization import LowRankFactors


def ranks_before_healing(ranks: Mapping[str, int], r: int) -> dict[str, int]:
    """The ranks to factorize to, so that a LoRA of rank r brings each layer to its rank in ``ranks``: ``rank − r``.

    A layer with ``rank ≤ r`` gets its whole rank at once and is not healed. So factors hold as many parameters with healing
    as without.
    """
    return {name: rank - r if rank > r else rank for name, rank in ranks.items()}


def healed_layers(ranks: Mapping[str, int], r: int) -> tuple[str, ...]:
    """The layers that :func:`ranks_before_healing` leaves room in, in the order of ``ranks``."""
    return tuple(name for name, rank in ranks.items() if rank > r)


def added_factors(lora_a: Tensor, lora_b: Tensor, scale: float) -> LowRankFactors:
    """``s B A`` as factors like those of the emulator: ``up (out, r)`` with orthonormal columns, ``down (r, in)``.

    Of ``lora_a``, A ``(r, in)``, and ``lora_b``, B ``(out, r)`` with ``out ≥ r``: ``B = Q R``, ``up = Q``, ``down = s R A``, in
    float64. Columns of one size lose less in 4 bits, where 64 elements share a scale.
    """
    q, upper = torch.linalg.qr(lora_b.double())
    return LowRankFactors(q, scale * (upper @ lora_a.double()))
