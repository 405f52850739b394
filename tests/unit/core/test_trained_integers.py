"""Integers that are trained: always those nearest to the floats in their place, with the gradients of these."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from emloc_ray.core import trained_integers
from emloc_ray.core.integer_forms import BITS
from emloc_ray.core.integers import IntegerWeight
from emloc_ray.core.quantization import quantize
from emloc_ray.core.trained_integers import Unrounded, rounded, rounded_weight, unrounded
from emloc_ray.core.unpacking import SCALE_STEPS, zero_steps
from emloc_ray.core.whitening import Whitening


def made(bits: int, rows: int = 6, columns: int = 44, seed: int = 0) -> IntegerWeight:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return quantize(weight, Whitening.identity(columns), bits, 16)


def trained(grid: IntegerWeight) -> Unrounded:
    return Unrounded(*(part.requires_grad_() for part in unrounded(grid)))


@given(st.sampled_from(BITS), st.integers(1, 9), st.integers(1, 70), st.integers(0, 3))
def test_what_nothing_moved_is_what_it_was(bits: int, rows: int, columns: int, seed: int) -> None:
    grid = made(bits, rows, columns, seed)
    again = rounded(unrounded(grid), grid)
    for part in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(again, part), getattr(grid, part))
    assert torch.equal(rounded_weight(unrounded(grid), grid), grid.dense())


@pytest.mark.parametrize("bits", BITS)
def test_the_weight_is_of_the_nearest_integers_in_range(bits: int) -> None:
    grid = made(bits)
    draws = torch.Generator().manual_seed(1)
    floats = Unrounded(*(part + torch.randn(part.shape, generator=draws) for part in unrounded(grid)))
    found = rounded(floats, grid)
    assert torch.equal(rounded_weight(floats, grid), found.dense())
    assert not torch.equal(found.codes, grid.codes)
    assert int(found.codes.max()) <= 2**bits - 1
    inside = (floats.codes >= 0) & (floats.codes <= 2**bits - 1)
    assert float((found.codes - floats.codes)[inside].abs().max()) <= 0.5


@pytest.mark.parametrize("elements", [1, 100, 2**20])
@pytest.mark.parametrize("bits", BITS)
def test_its_gradients_are_those_of_the_formula_without_rounding(
    bits: int, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rows at a time."""
    monkeypatch.setattr(trained_integers, "ELEMENTS", elements)
    grid = made(bits)
    floats, upstream = trained(grid), torch.randn(6, 44, generator=torch.Generator().manual_seed(2))
    (rounded_weight(floats, grid) * upstream).sum().backward()
    plain = trained(grid)

    def wide(part: Tensor) -> Tensor:
        return part.repeat_interleave(grid.group_size, dim=1)[:, :44]

    scale = wide(plain.log_scales.exp()) * 2.0**grid.exponent
    (scale * (plain.codes - wide(plain.zeros)) * upstream).sum().backward()
    top = 2**bits - 1
    stored = ((grid.codes, top), (grid.scales, 255), (grid.zeros, top * zero_steps(bits)))
    for found, expected, (integers, last) in zip(floats, plain, stored, strict=True):
        assert found.grad is not None
        assert expected.grad is not None
        # A step goes against the gradient: one that would leave the range is none.
        leaves = ((integers == 0) & (expected.grad > 0)) | ((integers == last) & (expected.grad < 0))
        assert not found.grad[leaves].any()
        torch.testing.assert_close(found.grad[~leaves], expected.grad[~leaves], rtol=1e-4, atol=1e-5)
    assert bool(((grid.codes == 0) & (plain.codes.grad > 0)).any())


@pytest.mark.parametrize("part", ["codes", "log_scales", "zeros"])
@pytest.mark.parametrize("upwards", [False, True])
def test_what_is_at_an_end_of_its_range_is_not_led_beyond(part: str, upwards: bool) -> None:
    grid = made(3)
    top = {"codes": 7.0, "log_scales": 255 / SCALE_STEPS * math.log(2), "zeros": 7.0}[part]
    floats = unrounded(grid)
    end = torch.full_like(getattr(floats, part), top if upwards else 0.0)
    floats = Unrounded(*(value.requires_grad_() for value in floats._replace(**{part: end})))
    upstream = torch.randn(6, 44, generator=torch.Generator().manual_seed(3))
    (rounded_weight(floats, grid) * upstream).sum().backward()
    gradient = getattr(floats, part).grad
    step = -gradient
    assert bool((step <= 0).all() if upwards else (step >= 0).all())
    assert bool(step.any())  # back into it
