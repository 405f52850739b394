"""Where ``tests/gpu`` computes: on CUDA, or where ``GPU_TESTS_DEVICE`` says, so that its tests can run without a GPU too."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = os.environ.get("GPU_TESTS_DEVICE", "cuda")
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU here"),
]
ASKS_CUDA = pytest.mark.skipif(DEVICE != "cuda", reason="asks CUDA itself")
