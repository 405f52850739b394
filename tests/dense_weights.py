"""What a linear multiplies by, however it is stored: what tests hold it to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from emloc_ray.core.pivoting import PivotedFactors
from emloc_ray.modeling.emulator import FactorizedLinear
from emloc_ray.modeling.nf4 import module_weight


def stored_product(up: Tensor, down: Tensor, order: Tensor | None = None) -> Tensor:
    """``W_E (out, in)`` of factors as they are stored: plain, or with their ``order`` pivoted."""
    return up @ down if order is None else PivotedFactors(up, down, order).product()


def dense_weight(module: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """``W_E (out, in)`` of a linear or of its factors as stored, in 4 bits or not, computed in ``dtype``."""
    if isinstance(module, FactorizedLinear):
        up, down = (module_weight(part).to(dtype) for part in (module.up, module.down))
        return stored_product(up, down, getattr(module, "order", None))
    weight = module_weight(module).to(dtype)
    return weight if isinstance(module, nn.Linear) else weight.T
