"""What every test on a GPU has to give back."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


def held_bytes() -> int:
    """What tensors hold on the GPU, without the workspace of cuBLAS."""
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


@pytest.fixture(autouse=True)
def gives_memory_back() -> Iterator[None]:
    """Each test ends with as much memory as it began with."""
    if not torch.cuda.is_available():
        yield
        return
    before = held_bytes()
    yield
    assert held_bytes() <= before
