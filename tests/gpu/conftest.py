"""What every test on a GPU has to give back."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from gpu_memory import held_bytes
from ray_names import lend_ray_s_names

from emloc_ray.stages.ray.spans import growing_segments

lend_ray_s_names()
os.environ.update(growing_segments(os.environ))  # as Ray's workers have it

_TABLES = 2**12  # bytes that libraries keep from their first call on: bitsandbytes' map of 8 bits has 1,024


@pytest.fixture(autouse=True)
def gives_memory_back() -> Iterator[None]:
    """Each test ends with as much memory as it began with."""
    before = held_bytes()
    yield
    assert held_bytes() <= before + _TABLES
