"""The pretend device, and what the host has waited for on it."""

from __future__ import annotations

import pytest
import torch
from pretend_device import METER, Meter, pretend_device


@pytest.fixture
def device() -> torch.device:
    return pretend_device()


@pytest.fixture
def meter(device: torch.device) -> Meter:
    METER.restart()
    return METER
