"""The product with a frozen weight that is stored in few bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class FrozenProduct(torch.autograd.Function):
    """``x Wᵀ`` of a frozen ``W (out, in)``, which ``dense(dtype)`` unpacks on the way forward and again on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dense: Callable[[torch.dtype], Tensor]) -> Tensor:
        """``(..., in)`` to ``(..., out)``, in the dtype of ``x``."""
        ctx.dense = dense  # never the weight itself, which would be kept
        return x @ dense(x.dtype).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """The gradient of ``x``; ``W`` has none."""
        return gradient @ ctx.dense(gradient.dtype), None
