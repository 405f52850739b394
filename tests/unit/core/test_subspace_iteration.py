"""Subspace iteration: within the bounds of the other solvers, on the CPU, and where it gives up."""

from __future__ import annotations

import math

import pytest
import torch
from test_factorization import error_of, normal, with_spectrum

from emloc_ray.core.factorization import factorize
from emloc_ray.core.subspace_iteration import cholesky_qr, leading_by_products
from emloc_ray.core.whitening import Whitening


@pytest.mark.parametrize("power", [0, 0.5, 1, 2, 4])
@pytest.mark.parametrize(("out_features", "in_features"), [(300, 340), (340, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_within_a_thousandth_of_the_optimum(
    power: float, out_features: int, in_features: int, dtype: torch.dtype
) -> None:
    eigenvalues = torch.arange(1, 301, dtype=torch.float64) ** -power
    weight, gram = with_spectrum(300, eigenvalues, out_features, in_features)
    for rank in (20, 150):
        result = factorize(weight.to(dtype), Whitening(gram.to(dtype), 0.0), rank, solver="products", seed=3)
        optimum = math.sqrt(float(eigenvalues[rank:].sum() / eigenvalues.sum()))
        reached = error_of(weight, result.factors, gram)
        assert (result.solver, result.dtype, len(result.eigenvalues)) == ("products", dtype, rank)
        assert optimum * (1 - 1e-4) <= reached <= optimum * (1 + 1e-3)
        assert result.relative_error == pytest.approx(reached, rel=6e-4)


def test_what_float32_cannot_hold_is_redone_in_float64() -> None:
    eigenvalues = torch.arange(1, 301, dtype=torch.float64) ** -6
    weight, gram = with_spectrum(300, eigenvalues, 300, 340)
    result = factorize(weight.float(), Whitening(gram.float(), 0.0), 75, solver="products")
    assert result.dtype == torch.float64
    optimum = math.sqrt(float(eigenvalues[75:].sum() / eigenvalues.sum()))
    assert error_of(weight, result.factors, gram) == pytest.approx(optimum, rel=1e-3)


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
