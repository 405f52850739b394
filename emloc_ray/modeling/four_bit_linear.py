"""Linears in 4 bits that compute with the very weight that their checkpoint stands for; importing this needs bitsandbytes."""

import bitsandbytes
import torch
from torch import Tensor, nn

from emloc_ray.modeling.integer_linear import FrozenLinear
from emloc_ray.modeling.nf4 import module_weight


class ExactLinear4bit(FrozenLinear, bitsandbytes.nn.Linear4bit):
    """A linear with the weight that :func:`~emloc_ray.modeling.nf4.nf4_weight` gives, whatever the device.

    On CPUs bitsandbytes' own product repacks weights into bfloat16 at the first evaluation, or fails for shapes that it
    cannot repack, and unpacks some wrongly; correction relies on ``W`` being the same everywhere.
    """

    def dense(self, dtype: torch.dtype) -> Tensor:
        """``W (out, in)``: as it is stored, then rounded to this dtype."""
        return module_weight(self).to(dtype)


def compute_exactly(model: nn.Module) -> None:
    """Makes every linear in 4 bits an :class:`ExactLinear4bit`, in place."""
    for module in model.modules():
        if type(module) is bitsandbytes.nn.Linear4bit:
            module.__class__ = ExactLinear4bit
