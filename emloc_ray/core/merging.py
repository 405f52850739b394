"""``W + s B A`` by rows, in float32, cast back to the weight's own dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_rows(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, begin: int = 0, transposed: bool = False
) -> Tensor:
    """Rows ``[begin, begin + n)`` of ``W + s B A``, in ``weight``'s dtype.

    ``weight`` holds the stored rows: ``(n, in)`` of ``W (out, in)``, or with ``transposed`` ``(n, out)`` of ``Wᵀ``
    (``Conv1D``). ``lora_a (r, in)``, ``lora_b (out, r)``. Rounded once, from float32.
    """
    rows = slice(begin, begin + weight.shape[0])
    if transposed:
        update = lora_a.float()[:, rows].T @ lora_b.float().T
    else:
        update = lora_b.float()[rows] @ lora_a.float()
    return (weight.to(torch.float32) + scale * update).to(weight.dtype)
