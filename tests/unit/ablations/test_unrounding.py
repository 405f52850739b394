"""Noise within half a step of a grid of 4 or 5 bits."""

from __future__ import annotations

import pytest
import torch
from ablations.unrounding import with_noise


def on_grid(rows: int, columns: int, bits: int = 4) -> torch.Tensor:
    """Weights rounded between the least and the largest of each 32."""
    blocks = torch.randn(rows, columns // 32, 32, generator=torch.Generator().manual_seed(1))
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return (((blocks - low) / step).round() * step + low).flatten(1)


@pytest.mark.parametrize("bits", [4, 5])
def test_rounding_again_gives_the_weights_back(bits: int) -> None:
    weight = on_grid(6, 96, bits)
    noisy = with_noise(weight, torch.Generator().manual_seed(0))
    assert noisy is not None
    blocks = weight.unflatten(1, (-1, 32))
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    moved = (noisy.unflatten(1, (-1, 32)) - blocks) / step
    assert moved.abs().max() <= 0.5001
    assert moved.std().item() == pytest.approx(12**-0.5, rel=0.1)
    again = (((noisy.unflatten(1, (-1, 32)) - low) / step).round() * step + low).flatten(1)
    assert (again - weight).abs().max() < 1e-5


def test_the_noise_is_the_seeds() -> None:
    first, again, other = (with_noise(on_grid(4, 32), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert first is not None
    assert again is not None
    assert other is not None
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_equal_weights_stay() -> None:
    weight = torch.full((2, 32), 0.25)
    noisy = with_noise(weight, torch.Generator())
    assert noisy is not None
    assert torch.equal(noisy, weight)


@pytest.mark.parametrize("weight", [torch.randn(4, 64), on_grid(4, 64, bits=8), torch.randn(64), torch.randn(4, 20)])
def test_what_lies_on_no_such_grid_is_left_alone(weight: torch.Tensor) -> None:
    assert with_noise(weight, torch.Generator()) is None
