"""Lower ranks by cutting and higher ranks by adding are as good as those computed from nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from emloc_ray.core.factorization import Factorization, LowRankFactors, factorize
from emloc_ray.core.gram import Gram
from emloc_ray.core.nested import extended, truncated
from emloc_ray.core.whitening import Whitening

SHAPES = pytest.mark.parametrize(("out_features", "in_features"), [(40, 70), (70, 40), (300, 300)])


def a_layer(out_features: int, in_features: int, seed: int = 0, tokens: int = 500) -> tuple[Tensor, Whitening, Tensor]:
    """A weight, its whitening, and the damped Gram in float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    scales = torch.logspace(0, -2, in_features)
    inputs = torch.randn(tokens, in_features, generator=generator) * scales
    gram = Gram.zero(in_features)
    gram.update(inputs)
    exact = inputs.double().T @ inputs.double()
    return weight, Whitening(gram, 1e-6), exact + 1e-6 * exact.trace() / in_features * torch.eye(in_features)


def error_of(weight: Tensor, factors: LowRankFactors, gram: Tensor) -> float:
    delta = weight.double() - factors.up.double() @ factors.down.double()
    whole = weight.double()
    return math.sqrt(float(torch.trace(delta @ gram @ delta.T) / torch.trace(whole @ gram @ whole.T)))


@SHAPES
@pytest.mark.parametrize("solver", ["exact", "subspace"])
def test_a_lower_rank_is_cut_out_as_good_as_computed(out_features: int, in_features: int, solver: str) -> None:
    weight, whitening, gram = a_layer(out_features, in_features)
    known = factorize(weight, whitening, 20, solver=solver)  # type: ignore[arg-type]
    for rank in (1, 7, 20):
        cut, direct = truncated(known, rank), factorize(weight, whitening, rank, solver="exact")
        assert cut.factors.up.shape == (out_features, rank)
        assert error_of(weight, cut.factors, gram) == pytest.approx(error_of(weight, direct.factors, gram), rel=2e-3)
        assert cut.relative_error == pytest.approx(error_of(weight, cut.factors, gram), rel=2e-3)


@SHAPES
@pytest.mark.parametrize("own", [1, 8, 30])
def test_a_higher_rank_is_added_as_good_as_computed(out_features: int, in_features: int, own: int) -> None:
    weight, whitening, gram = a_layer(out_features, in_features)
    found = extended(weight, whitening, factorize(weight, whitening, own), 36)
    direct = factorize(weight, whitening, 36, solver="exact")
    assert error_of(weight, found.factors, gram) == pytest.approx(error_of(weight, direct.factors, gram), rel=2e-3)
    assert found.relative_error == pytest.approx(error_of(weight, found.factors, gram), rel=2e-3)
    up = found.factors.up.double()
    assert float((up.T @ up - torch.eye(36)).abs().max()) < 1e-5
    # One by one they are as sure as the first search had to be; what they add up to is what the error rests on.
    assert float(found.eigenvalues[:36].sum()) == pytest.approx(float(direct.eigenvalues[:36].sum()), rel=1e-3)
    assert len(found.eigenvalues) <= min(weight.shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_in_16_bits_a_basis_serves_too(dtype: torch.dtype) -> None:
    weight, whitening, gram = a_layer(64, 96)
    known = factorize(weight, whitening, 16)
    stored = Factorization(
        LowRankFactors(known.factors.up.to(dtype), known.factors.down.to(dtype)),
        known.eigenvalues,
        known.total_energy,
        known.relative_error,
        known.solver,
        known.dtype,
    )
    best = error_of(weight, factorize(weight, whitening, 32, solver="exact").factors, gram)
    assert error_of(weight, extended(weight, whitening, stored, 32).factors, gram) == pytest.approx(best, rel=5e-3)
    # The first columns are the stored ones themselves: no better and no worse than what the other run wrote.
    assert torch.equal(truncated(stored, 5).factors.up, stored.factors.up[:, :5])


@given(ranks=st.lists(st.integers(1, 24), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_any_way_through_the_ranks_ends_at_the_best(ranks: list[int], seed: int) -> None:
    weight, whitening, gram = a_layer(24, 32, seed, tokens=100)
    known = factorize(weight, whitening, ranks[0])
    for rank in ranks[1:]:
        own = known.factors.up.shape[1]
        known = truncated(known, rank) if rank <= own else extended(weight, whitening, known, rank)
    best = error_of(weight, factorize(weight, whitening, ranks[-1], solver="exact").factors, gram)
    assert error_of(weight, known.factors, gram) == pytest.approx(best, rel=5e-3, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scales_do_not_matter(scale: float) -> None:
    weight, whitening, gram = a_layer(40, 70)
    weight = weight * scale
    found = extended(weight, whitening, factorize(weight, whitening, 8), 20)
    best = error_of(weight, factorize(weight, whitening, 20, solver="exact").factors, gram)
    assert error_of(weight, found.factors, gram) == pytest.approx(best, rel=2e-3)


def test_one_token_leaves_little_to_add() -> None:
    weight, whitening, gram = a_layer(40, 70, tokens=1)
    found = extended(weight, whitening, factorize(weight, whitening, 1), 12)
    best = error_of(weight, factorize(weight, whitening, 12, solver="exact").factors, gram)
    assert error_of(weight, found.factors, gram) == pytest.approx(best, rel=0.05, abs=1e-6)


def test_ranks_out_of_range_are_refused() -> None:
    weight, whitening, _ = a_layer(40, 70)
    known = factorize(weight, whitening, 8)
    with pytest.raises(ValueError, match="holds none of rank 9"):
        truncated(known, 9)
    with pytest.raises(ValueError, match="rank 8 already"):
        extended(weight, whitening, known, 8)
