"""What tensors hold on a GPU."""

from __future__ import annotations

import gc

import torch


def held_bytes() -> int:
    """Without the workspace of cuBLAS; none where there is no GPU."""
    if not torch.cuda.is_available():
        return 0
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()
