"""Subspace iteration: where it gives up, and its orthonormal columns."""

from __future__ import annotations

import pytest
import torch
from test_factorization import normal

from emloc_ray.core.factorization import factorize
from emloc_ray.core.subspace_iteration import cholesky_qr, leading_by_products
from emloc_ray.core.whitening import Whitening


@pytest.mark.parametrize("rank", [20, 100])
def test_a_layer_of_low_rank_is_left_to_the_eigendecomposition(rank: int) -> None:
    low = (normal(150, 12, 1) @ normal(12, 180, 2)).float()
    result = factorize(low, Whitening.identity(180), rank, solver="products")
    assert result.solver == "exact"
    assert result.relative_error == pytest.approx(0.0, abs=1e-6)


def test_there_must_be_columns_to_spare() -> None:
    assert leading_by_products(normal(100, 100), 70) is None
    assert leading_by_products(normal(100, 100), 40) is not None


def test_columns_as_ill_conditioned_as_float32_holds_are_made_orthonormal() -> None:
    columns = (torch.linalg.qr(normal(200, 30)).Q * torch.logspace(0, -5, 30, dtype=torch.float64)).float()
    once, failed = cholesky_qr(columns @ torch.linalg.qr(normal(30, 30, 1)).Q.float())
    twice, failed_again = cholesky_qr(once)
    assert int(failed) == int(failed_again) == 0
    torch.testing.assert_close(twice.T @ twice, torch.eye(30), rtol=0, atol=2e-6)
