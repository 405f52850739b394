"""Linears whose weights are integers of 2, 3, 4 or 8 bits, in plain torch on any device.

No library that was looked at stores integers given to it at b + 0.25 bits an element for CPUs and CUDA alike: CHANGELOG.md,
under "Tried and dropped", says what each has. Training asks for little: the weight is unpacked, and a product of the device's
own library follows, as QLoRA does it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from emloc_ray.core.integer_forms import GROUP_SIZE, num_groups, packed_width
from emloc_ray.core.integers import dense_weight


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


class FrozenLinear:
    """``y = x Wᵀ + b`` of a module that unpacks ``W (out, in)`` for each product."""

    bias: Any

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``, in the dtype of ``x``."""
        y: Tensor = FrozenProduct.apply(x, self.dense)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """``W (out, in)``: as it is stored, then rounded to this dtype."""
        raise NotImplementedError


class IntegerLinear(FrozenLinear, nn.Module):
    """A linear whose weight is as :class:`emloc_ray.core.integers.IntegerWeight` stores it; nothing to train. Not a subclass of
    ``nn.Linear``, so that nothing takes its weight for a dense one and merges into it."""

    def __init__(
        self, in_features: int, out_features: int, bits: int, group_size: int = GROUP_SIZE, bias: bool = False
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        groups = num_groups(in_features, group_size)
        shapes = {f"int{bits}": packed_width(in_features, bits), "scales": groups, "zeros": groups}
        for name, columns in shapes.items():
            self.register_buffer(name, torch.zeros(out_features, columns, dtype=torch.uint8))
        self.register_buffer("exponent", torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """As stored, rounded to the layer's dtype and then to this one."""
        return dense_weight(dict(self.named_buffers(recurse=False)), self.in_features).to(dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that the layer computes in."""
        return self.get_buffer("exponent").dtype

    @property
    def weight(self) -> Tensor:
        """An empty tensor, of the dtype and device that the layer computes in: models ask their linears for these (T5)."""
        return self.get_buffer("exponent").new_empty(0)

    def extra_repr(self) -> str:
        """Shapes, as ``nn.Linear`` shows them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"
