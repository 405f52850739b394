"""The leading vectors of known spectra, what their estimates promise, and the guards that refuse them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emloc_ray.core import krylov
from emloc_ray.core.krylov import complement_gain, leading_vectors, loss_bound, orthonormal

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_singular_values(values: Tensor, rows: int, columns: int, seed: int = 0) -> Tensor:
    left, right = (torch.linalg.qr(normal(n, len(values), seed + i)).Q for i, n in enumerate((rows, columns)))
    return (left * values) @ right.T


def loss_of(matrix: Tensor, vectors: Tensor, squares: Tensor) -> float:
    """The energy outside ``vectors`` above that outside the best of their number, as a share of the latter."""
    q = torch.linalg.qr(vectors.double()).Q
    rest = matrix - q @ (q.T @ matrix)
    best = float(squares[vectors.shape[1] :].sum())
    return float(rest.square().sum()) / best - 1.0


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31 - 1), st.floats(0.0, 3.0), st.integers(1, 40), st.sampled_from([(160, 160), (170, 150)]))
def test_any_power_law_loses_less_than_two_thousandths(
    seed: int, power: float, rank: int, shape: tuple[int, int]
) -> None:
    values = torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -power
    matrix = with_singular_values(values, *shape, seed=seed % 1000)
    for dtype in (torch.float32, torch.float64):
        top = leading_vectors(matrix.to(dtype), rank, seed)
        if top is None:  # the space would be nearly everything
            continue
        assert loss_of(matrix, top.vectors, values.square()) < 2e-3
        assert float(top.values.sum()) <= float(values[:rank].square().sum()) * (1 + 1e-6)
        assert torch.equal(top.values, top.values.sort(descending=True).values)
        identity = torch.eye(rank, dtype=torch.float64)
        assert float((top.vectors.double().T @ top.vectors.double() - identity).abs().max()) < 1e-5


@DTYPES
@pytest.mark.parametrize("rows", [200, 400])
def test_a_normal_matrix_has_no_gap_and_settles(rows: int, dtype: torch.dtype) -> None:
    matrix = normal(rows, 300)
    top = leading_vectors(matrix.to(dtype), 20)
    assert top is not None
    assert loss_of(matrix, top.vectors, torch.linalg.svdvals(matrix).square()) < 2e-3
    assert top.energy_left == pytest.approx(float(matrix.square().sum() - top.values.sum()), rel=1e-5)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(100, 100, 40), (8, 8, 3), (40, 300, 20), (300, 40, 20)])
def test_a_basis_that_would_fill_the_whole_space_is_not_grown(rows: int, columns: int, rank: int) -> None:
    # Of a normal matrix the leading vectors do not settle early; there is no room for another block beside them.
    matrix = normal(rows, columns)
    top = leading_vectors(matrix, rank)
    assert top is None or loss_of(matrix, top.vectors, torch.linalg.svdvals(matrix).square()) < 2e-3


def test_float32_holds_where_squares_would_be_below_its_rounding() -> None:
    values = torch.arange(1, 401, dtype=torch.float64) ** -2.0
    matrix = with_singular_values(values, 400, 400)
    top = leading_vectors(matrix.float(), 50)
    assert top is not None
    assert values[49] ** 2 < torch.finfo(torch.float32).eps * 2
    assert loss_of(matrix, top.vectors, values.square()) < 1e-3
    assert top.energy_left == pytest.approx(float(values[50:].square().sum()), rel=1e-3)
    gram = (matrix.float() @ matrix.float().T).double()
    squared = torch.linalg.eigh(gram.float()).eigenvectors[:, -50:]
    assert loss_of(matrix, squared, values.square()) > 0.05


def test_a_start_that_misses_a_direction_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    # Diagonal, so that nothing but zeros ever mixes the direction in.
    matrix = torch.diag(torch.cat([torch.tensor([30.0]), torch.linspace(3.0, 1.0, 199)]))
    assert leading_vectors(matrix, 20) is not None
    numbers = krylov.normal_numbers

    def blind(rows: int, columns: int, generator: torch.Generator, like: Tensor) -> Tensor:
        drawn = numbers(rows, columns, generator, like)
        if columns > krylov.NUM_PROBES:
            drawn[0] = 0.0
        return drawn

    monkeypatch.setattr(krylov, "normal_numbers", blind)
    assert leading_vectors(matrix, 20) is None
    # Its Ritz residuals say that all is well: only the probe says no.
    monkeypatch.setattr(krylov, "complement_gain", lambda *_, **__: 0.0)
    top = leading_vectors(matrix, 20)
    assert top is not None
    assert float(top.vectors[0].abs().max()) == 0.0


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31 - 1), st.integers(0, 29))
def test_the_probe_finds_any_missing_direction_and_no_other(seed: int, missing: int) -> None:
    values = torch.cat([torch.linspace(20.0, 10.0, 30), torch.linspace(3.0, 1.0, 170)]).double()
    matrix = with_singular_values(values, 200, 220, seed % 1000)
    found = torch.linalg.svd(matrix).U[:, :31]
    gaps = torch.ones(30, dtype=torch.float64)
    left = float(values[30:].square().sum())
    whole = krylov.LeadingVectors(values[:30].square(), found[:, :30], gaps, left)
    assert complement_gain(matrix, whole, seed) <= loss_bound(left, 1.0, torch.float64)
    keep = [i for i in range(31) if i != missing]
    short = whole._replace(values=values[keep].square(), vectors=found[:, keep])
    gain = complement_gain(matrix, short, seed)
    assert gain == pytest.approx(float(values[missing] ** 2 - values[30] ** 2), rel=0.1)
    assert gain > loss_bound(left, 1.0, torch.float64)


def test_more_equal_values_than_a_block_is_wide_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(krylov, "FIRST_CHECK_IF_SMALL", 1.5)
    values = torch.where(torch.arange(640) < 80, 1.0, 0.5).double()
    matrix = with_singular_values(values, 640, 640)
    assert leading_vectors(matrix, 80) is None


@DTYPES
def test_low_rank_and_zero_end_at_rounding(dtype: torch.dtype) -> None:
    low = normal(200, 5, 1) @ normal(5, 220, 2)
    squares = torch.linalg.svdvals(low).square()
    sparse = torch.zeros(200, 200, dtype=dtype)
    sparse[3, 4] = 2.0
    for matrix, expected in (
        (low.to(dtype), squares[:20]),
        (sparse, torch.tensor([4.0])),
        (0 * sparse, torch.zeros(1)),
    ):
        top = leading_vectors(matrix, 20)
        assert top is not None
        assert float(top.values.sum()) == pytest.approx(float(expected.sum()), rel=1e-6)
        identity = torch.eye(20, dtype=dtype)
        torch.testing.assert_close(top.vectors.T @ top.vectors, identity, rtol=0, atol=1e-5)


@DTYPES
def test_of_the_square_the_same_vectors_while_rounding_lets_it(dtype: torch.dtype) -> None:
    values = torch.arange(1, 201, dtype=torch.float64) ** -0.5
    matrix = with_singular_values(values, 200, 300)
    top = leading_vectors((matrix @ matrix.T).to(dtype), 20, squared=True)
    assert top is not None
    assert loss_of(matrix, top.vectors, values.square()) < 1e-3
    assert top.energy_left == pytest.approx(float(values[20:].square().sum()), rel=1e-3)
    steep = with_singular_values(values**6, 200, 300)
    assert leading_vectors((steep @ steep.T).float(), 20, squared=True) is None
    assert leading_vectors(steep.float(), 20) is not None


@pytest.mark.parametrize("times", [1000.0, 3000.0])
def test_the_energy_left_beside_a_massive_column_is_what_is_left(times: float) -> None:
    matrix = normal(400, 400)
    matrix[:, 3] *= times
    top = leading_vectors(matrix.float(), 20)
    assert top is not None
    vectors = torch.linalg.qr(top.vectors.double()).Q
    left = float((matrix - vectors @ (vectors.T @ matrix)).square().sum())
    assert top.energy_left == pytest.approx(left, rel=1e-4)


def test_what_float32_cannot_hold_ends_the_search_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = with_singular_values(torch.arange(1, 301, dtype=torch.float64) ** -4.0, 300, 300)
    checks: list[int] = []
    check = krylov.KrylovSpace.check

    def counted(self: krylov.KrylovSpace, rank: int, total: float) -> tuple[krylov.RitzPairs, torch.Tensor, float]:
        checks.append(self.size)
        return check(self, rank, total)

    monkeypatch.setattr(krylov.KrylovSpace, "check", counted)
    top = leading_vectors(matrix.float(), 60)
    assert top is not None
    assert krylov.is_lost(top.energy_left, 1.0, torch.float32)
    assert not krylov.is_lost(top.energy_left, 1.0, torch.float64)
    assert len(checks) == 1


def test_a_space_that_would_be_nearly_everything_is_refused() -> None:
    assert leading_vectors(normal(100, 100), 70) is None


def test_same_seed_same_bits() -> None:
    matrix = normal(200, 300).float()
    first, again, other = (leading_vectors(matrix, 20, seed) for seed in (1, 1, 2))
    assert first is not None
    assert again is not None
    assert other is not None
    assert torch.equal(first.vectors, again.vectors)
    assert math.isclose(first.energy_left, other.energy_left, rel_tol=2e-3)


def test_dependent_columns_get_a_basis_all_the_same() -> None:
    columns = normal(50, 4)
    basis, kept = orthonormal(torch.cat([columns, columns[:, :2]], dim=1))
    torch.testing.assert_close(basis.T @ basis, torch.eye(6, dtype=torch.float64))
    assert float(kept[4:].max()) < 1e-12
    assert float(kept[:4].min()) > 0.1
