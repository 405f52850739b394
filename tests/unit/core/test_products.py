"""Shared products and norms, against plain formulations in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from emloc_ray.core.products import energy, is_finite, wide_product


def tokens_of(count: int, features: int, seed: int = 0) -> Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_wide_product_and_an_energy_are_those_of_float64() -> None:
    left, right = tokens_of(700, 5).float(), tokens_of(700, 3, 1).float()
    product = wide_product(left, right)
    assert product.dtype == torch.float64
    torch.testing.assert_close(product, left.double().T @ right.double(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(wide_product(left.T.contiguous().T, right), product, rtol=1e-13, atol=1e-13)
    assert energy(left) == pytest.approx(float(left.double().square().sum()), rel=1e-7)


@pytest.mark.parametrize("transposed", [False, True])
def test_an_energy_counts_what_is_beside_a_massive_column(transposed: bool) -> None:
    matrix = tokens_of(2500, 60).float()
    matrix[:, 7] *= 3000
    exact = float(matrix.double().square().sum())
    made = energy(matrix.T if transposed else matrix)
    assert made == pytest.approx(exact, rel=1e-13)


def test_large_finite_elements_are_finite() -> None:
    assert is_finite(torch.full((3, 3), 1e38))
    assert not is_finite(torch.tensor([1e38, float("nan")]))
