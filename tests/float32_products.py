"""How exact products of float32 tensors are asked to be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "mv", "addmv"}


class Float32Products(TorchDispatchMode):
    """While it lasts, notes for every product of float32 tensors what torch was set to."""

    def __init__(self) -> None:
        super().__init__()
        self.precisions: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        floats = any(isinstance(leaf, Tensor) and leaf.dtype == torch.float32 for leaf in tree_leaves(args))
        if floats and func.overloadpacket.__name__ in _PRODUCTS:
            self.precisions.append(torch.get_float32_matmul_precision())
        return func(*args, **(kwargs or {}))
