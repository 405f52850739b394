"""Integers that are trained: always those nearest to the floats in their place, with the gradients of these."""

from __future__ import annotations

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
    for found, expected in zip(floats[1:], plain[1:], strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-5)
    assert floats.codes.grad is not None
    assert plain.codes.grad is not None
    # A step goes against the gradient: one that would leave the range is none.
    leaves = ((grid.codes == 0) & (plain.codes.grad > 0)) | ((grid.codes == 2**bits - 1) & (plain.codes.grad < 0))
    assert bool(leaves.any())
    assert not floats.codes.grad[leaves].any()
    torch.testing.assert_close(floats.codes.grad[~leaves], plain.codes.grad[~leaves])
