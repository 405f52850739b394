"""The pretend device, and what the host has waited for on it."""

from __future__ import annotations

import functools

import pytest
import torch
from pretend_device import METER, Meter, pretend_device

from emloc_ray.core import correction, gram, products, quantization, whitening
from emloc_ray.planning import memory
from emloc_ray.stages.correct import modules


@pytest.fixture
def device() -> torch.device:
    return pretend_device()


@pytest.fixture
def meter(device: torch.device) -> Meter:
    METER.restart()
    return METER


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done in parts of a fixed size is done in parts that are small beside tiny matrices too."""
    for module in (products, correction, modules, memory):
        monkeypatch.setattr(module, "ROWS", 64)
    for module, name, size in (
        (products, "_GPU_ROWS", 64),
        (whitening, "_GPU_BLOCK", 128),
        (quantization, "_ELEMENTS", 2**14),
        (quantization, "_COLUMNS", 16),
    ):
        monkeypatch.setattr(module, name, size)
    monkeypatch.setattr(gram, "gather_triangle", functools.partial(gram.gather_triangle, elements=2**13))
