"""Pivoted factors: the same product in fewer numbers, none of which is large, whatever the factors are."""

from __future__ import annotations

import pytest
import torch
from dense_weights import stored_product
from hypothesis import given, settings
from hypothesis import strategies as st

from emloc_ray.core.factorization import LowRankFactors
from emloc_ray.core.pivoting import LARGEST, pivot
from emloc_ray.core.ranks import factor_parameters


def factors(out_features: int, in_features: int, rank: int, seed: int, spread: float = 0.0) -> LowRankFactors:
    """Random ones; ``spread``: by how many powers of ten their rows and columns differ in size."""
    generator = torch.Generator().manual_seed(seed)

    def made(rows: int, columns: int) -> torch.Tensor:
        sizes = (10 ** (spread * torch.rand(n, 1, generator=generator, dtype=torch.float64)) for n in (rows, columns))
        left, right = sizes
        return left * torch.randn(rows, columns, generator=generator, dtype=torch.float64) * right.T

    return LowRankFactors(made(out_features, rank), made(rank, in_features))


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(2, 40), st.floats(0, 1), st.integers(0, 9), st.sampled_from([0.0, 4.0]))
def test_the_product_is_the_same_in_r_squared_fewer_numbers(
    out_features: int, in_features: int, share: float, seed: int, spread: float
) -> None:
    rank = 1 + int(share * (min(out_features, in_features) - 2))
    plain = factors(out_features, in_features, rank, seed, spread)
    found = pivot(plain)
    expected = plain.up @ plain.down
    torch.testing.assert_close(found.product(), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    assert torch.equal(stored_product(*found), found.product())
    torch.testing.assert_close(stored_product(*found.plain()), found.product())
    assert sorted(found.order.tolist()) == list(range(out_features))
    assert found.up.numel() + found.down.numel() == factor_parameters(out_features, in_features, rank, "pivoted")
    assert float(found.up.abs().max()) <= LARGEST
    # The rows that are kept are the product's own.
    at = [found.order.tolist().index(place) for place in range(rank)]
    torch.testing.assert_close(found.down, expected[at])


def wilkinson(size: int) -> torch.Tensor:
    """The matrix whose elimination with row pivoting doubles its last column at every step."""
    made = torch.eye(size, dtype=torch.float64) - torch.tril(torch.ones(size, size, dtype=torch.float64), -1)
    made[:, -1] = 1
    return made


def test_ugly_factors_leave_no_large_numbers() -> None:
    down = factors(1, 60, 40, 0).down
    more = factors(20, 1, 40, 1).up
    thin = factors(60, 40, 5, 2)
    for up in (
        torch.cat([wilkinson(40), more]),
        torch.cat([torch.tril(torch.ones(40, 40, dtype=torch.float64)), more]) * 1e-30,
        thin.up @ thin.down,  # of rank 5
        torch.cat([more, more, more]),
        torch.zeros(60, 40, dtype=torch.float64),
    ):
        found = pivot(LowRankFactors(up, down))
        expected = up @ down
        torch.testing.assert_close(found.product(), expected, rtol=1e-8, atol=1e-9 * float(expected.abs().max()))
        assert float(found.up.abs().max()) <= LARGEST


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_costs_about_what_it_costs_plain_factors(dtype: torch.dtype) -> None:
    wide = factors(96, 64, 24, 3)
    plain = LowRankFactors(torch.linalg.qr(wide.up).Q, wide.down)
    expected = plain.up @ plain.down
    found = pivot(plain)
    errors = [
        float((stored_product(*(part.to(dtype).double() for part in parts), *order) - expected).norm())
        for parts, order in (((found.up, found.down), (found.order,)), (plain, ()))
    ]
    assert errors[0] < 2 * errors[1]
    stored = pivot(LowRankFactors(*(part.to(dtype) for part in plain)))
    assert stored.up.dtype == stored.down.dtype == dtype


def test_what_cannot_be_pivoted_ends() -> None:
    with pytest.raises(ValueError, match="Factors of rank 4 with 4 rows have none to make of the others"):
        pivot(factors(4, 9, 4, 0))
    broken = factors(9, 9, 4, 0)
    broken.up[2, 2] = torch.nan
    assert not bool(torch.isfinite(pivot(broken).product()).all())
