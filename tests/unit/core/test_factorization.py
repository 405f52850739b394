"""The factors are the best of their rank: against the published route and float64 references."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from benchmarks.baselines import published_route
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emloc_ray.core import factorization
from emloc_ray.core.factorization import Factorization, LowRankFactors, Solver, factorize, relative_error
from emloc_ray.core.forms import Form
from emloc_ray.core.gram import Gram
from emloc_ray.core.predicted_loss import form_losses
from emloc_ray.core.quantization import quantize, quantize_with_factors
from emloc_ray.core.spectra import spectrum
from emloc_ray.core.two_sided import factorize_two_sided
from emloc_ray.core.whitening import Whitening
from emloc_ray.errors import NumericsError

FEW = settings(deadline=None, max_examples=25)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
ORIENTATIONS = pytest.mark.parametrize(("out_features", "in_features"), [(40, 70), (70, 40), (50, 50)])


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def damped(gram: Tensor, dampening_frac: float = 1e-6) -> Tensor:
    gram = gram.to(torch.float64)
    return gram + dampening_frac * gram.trace() / len(gram) * torch.eye(len(gram), dtype=torch.float64)


def error_of(weight: Tensor, factors: tuple[Tensor, Tensor], gram: Tensor) -> float:
    """``‖(W − W_E) G^½‖_F / ‖W G^½‖_F`` in float64, by the traces that define it."""
    weight = weight.to(torch.float64)
    up, down = (factor.to(torch.float64) for factor in factors)
    delta = weight - up @ down
    return math.sqrt(max(float(torch.trace(delta @ gram @ delta.T) / torch.trace(weight @ gram @ weight.T)), 0.0))


def best_error(weight: Tensor, gram: Tensor, rank: int) -> float:
    """The optimum, from the singular values of ``W G^½`` in float64."""
    values, vectors = torch.linalg.eigh(gram)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    squares = torch.linalg.svdvals(weight.to(torch.float64) @ root).square()
    return math.sqrt(float(squares[rank:].sum() / squares.sum()))


def with_spectrum(order: int, eigenvalues: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """``W`` and ``G`` with ``eigenvalues (order,)`` of ``W G Wᵀ``: ``W = U S^½ V^T G^-½`` with random ``U``, ``V`` and ``G``."""
    u = torch.linalg.qr(normal(out_features, order, 1)).Q
    v = torch.linalg.qr(normal(in_features, order, 2)).Q
    x = normal(3 * in_features, in_features, 3)
    gram = x.T @ x
    values, vectors = torch.linalg.eigh(gram)
    return (u * eigenvalues.sqrt()) @ v.T @ (vectors / values.sqrt()) @ vectors.T, gram


@pytest.mark.parametrize("strength", [30, 100, 300])
def test_the_error_of_few_ranks_is_what_they_leave_beside_a_strong_direction(strength: float) -> None:
    """Float32's rounding of the strong direction moves each of the many eigenvalues that are left."""
    x = normal(1200, 512)
    x[::100] += strength * normal(1, 512, 1)
    whitening, weight = Whitening((x.T @ x).float()), normal(512, 512, 2).float()
    made = factorize(weight, whitening, 4, solver="exact")
    left = error_of(weight, made.factors, damped((x.T @ x).float()))
    assert made.relative_error == pytest.approx(left, rel=5e-4)


def test_a_gram_is_whitened_as_a_whitening_is() -> None:
    gram = Gram.zero(12)
    gram.update(normal(40, 12))
    made, same = (factorize(normal(8, 12), inputs, 3) for inputs in (gram, Whitening(gram)))
    assert torch.equal(made.factors.up @ made.factors.down, same.factors.up @ same.factors.down)


@FEW
@given(st.integers(0, 2**31 - 1), st.integers(1, 24), st.integers(1, 24), st.integers(1, 60), st.data())
def test_optimal_for_any_shape_and_number_of_tokens(
    seed: int, out_features: int, in_features: int, num_tokens: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(out_features, in_features)))
    weight, tokens = normal(out_features, in_features, seed), normal(num_tokens, in_features, seed + 1)
    gram = damped(tokens.T @ tokens)
    result = factorize(weight, Whitening(tokens.T @ tokens), rank)
    reached, optimum = error_of(weight, result.factors, gram), best_error(weight, gram, rank)
    assert reached == pytest.approx(optimum, rel=1e-5, abs=1e-7)
    assert result.relative_error == pytest.approx(reached, rel=1e-5, abs=1e-7)
    assert result.total_energy == pytest.approx(float(torch.trace(weight @ gram @ weight.T)), rel=1e-9)
    assert result.factors.up.shape == (out_features, rank)
    assert result.factors.down.shape == (rank, in_features)


@FEW
@given(
    st.integers(0, 2**31 - 1), st.sampled_from([(20, 33), (33, 20), (25, 25)]), st.integers(1, 19), st.integers(5, 90)
)
def test_float32_is_optimal_and_reports_what_it_reached(
    seed: int, shape: tuple[int, int], rank: int, num_tokens: int
) -> None:
    weight, tokens = normal(*shape, seed).float(), normal(num_tokens, shape[1], seed + 1).float()
    gram = damped(tokens.T @ tokens)
    result = factorize(weight, Whitening(tokens.T @ tokens), rank)
    reached, optimum = error_of(weight, result.factors, gram), best_error(weight, gram, rank)
    # What the factors lose by being stored in float32 is all that may be missing where the optimum is near zero.
    assert reached == pytest.approx(optimum, rel=1e-3, abs=3e-6)
    assert result.relative_error == pytest.approx(reached, rel=1e-3, abs=3e-6)


@DTYPES
@ORIENTATIONS
@pytest.mark.parametrize("num_tokens", [400, 10])
def test_agrees_with_the_published_route(
    dtype: torch.dtype, out_features: int, in_features: int, num_tokens: int
) -> None:
    weight, tokens = normal(out_features, in_features, 4).to(dtype), normal(num_tokens, in_features, 5)
    gram = tokens.T @ tokens
    result = factorize(weight, Whitening(gram.to(dtype)), 15)
    # Undamped, or, where tokens are fewer than ranks, damped as ours is: the published floor leaves the rest arbitrary.
    theirs = published_route(weight.to(torch.float64), damped(gram), 15)
    ours_error, their_error = (error_of(weight, factors, damped(gram)) for factors in (result.factors, theirs))
    assert ours_error <= their_error * (1 + 1e-3) + 1e-6
    if num_tokens > in_features:
        difference = (result.factors.up @ result.factors.down).to(torch.float64) - theirs[0] @ theirs[1]
        assert float(difference.norm() / weight.to(torch.float64).norm()) < (1e-3 if dtype == torch.float32 else 1e-8)


@ORIENTATIONS
def test_the_direct_check_decides_between_the_bounds(
    monkeypatch: pytest.MonkeyPatch, out_features: int, in_features: int
) -> None:
    weight, tokens = normal(out_features, in_features).float(), normal(99, in_features, 1).float()
    whitening, gram = Whitening(tokens.T @ tokens), damped(tokens.T @ tokens)
    monkeypatch.setattr(factorization, "SURE_ROUNDING_SHARE", 0.0)
    result = factorize(weight, whitening, 9)
    assert result.dtype == torch.float32
    assert result.relative_error == pytest.approx(error_of(weight, result.factors, gram), rel=1e-5)
    monkeypatch.setattr(factorization, "MAX_RESIDUAL_DIFFERENCE", -1.0)
    again = factorize(weight, whitening, 9)
    assert again.dtype == torch.float64
    assert again.relative_error == pytest.approx(best_error(weight, gram, 9), rel=1e-6)


def test_float32_would_have_failed_unnoticed_on_that_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, tokens = normal(200, 260, 6).float(), normal(900, 260, 7).float()
    tokens[:, 3] *= 3000
    weight[:, 3] *= 30
    gram = tokens.to(torch.float64).T @ tokens.to(torch.float64)
    monkeypatch.setattr(factorization, "SURE_ROUNDING_SHARE", math.inf)
    result = factorize(weight, Whitening(gram), 30, solver="exact")
    assert result.dtype == torch.float32
    assert error_of(weight, result.factors, damped(gram)) > 1.02 * best_error(weight, damped(gram), 30)


@DTYPES
@ORIENTATIONS
def test_up_is_orthonormal_and_down_its_projection(dtype: torch.dtype, out_features: int, in_features: int) -> None:
    weight, tokens = normal(out_features, in_features).to(dtype), normal(99, in_features, 1).to(dtype)
    for solver in ("exact", "subspace"):
        up, down = factorize(weight, Whitening(tokens.T @ tokens), 9, solver=solver).factors
        tolerance = 3e-6 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(up.T @ up, torch.eye(9, dtype=dtype), rtol=0, atol=tolerance)
        torch.testing.assert_close(down, up.T @ weight, rtol=1e-4, atol=1e-5)
        assert up.is_contiguous()
        assert down.is_contiguous()


@DTYPES
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 1), (1, 9), (9, 1), (6, 6), (6, 9), (9, 6)])
def test_full_rank_reproduces_the_weight(dtype: torch.dtype, out_features: int, in_features: int) -> None:
    weight, tokens = normal(out_features, in_features).to(dtype), normal(30, in_features, 1).to(dtype)
    result = factorize(weight, Whitening(tokens.T @ tokens), min(out_features, in_features))
    assert result.relative_error == 0.0
    torch.testing.assert_close(result.factors.up @ result.factors.down, weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("out_features", "in_features"), [(5, 8), (8, 5), (140, 160), (160, 140)])
@pytest.mark.parametrize("solver", ["exact", "subspace"])
def test_zero_weight_and_zero_gram(out_features: int, in_features: int, solver: Solver) -> None:
    result = factorize(torch.zeros(out_features, in_features), Whitening.identity(in_features), 3, solver=solver)
    assert result.relative_error == 0.0
    assert result.total_energy == 0.0
    assert bool(torch.isfinite(result.factors.up).all())
    assert float((result.factors.up @ result.factors.down).abs().max()) == 0.0
    weight = normal(out_features, in_features).float()
    result = factorize(weight, Whitening(torch.zeros(in_features, in_features)), 3, solver=solver)
    plain = torch.linalg.svdvals(weight.double()).square()
    assert result.relative_error == pytest.approx(math.sqrt(float(plain[3:].sum() / plain.sum())), rel=1e-3)


@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize(("out_features", "in_features"), [(20, 30), (30, 20)])
def test_extreme_magnitudes_change_nothing(factor: float, out_features: int, in_features: int) -> None:
    weight, tokens = normal(out_features, in_features).float(), normal(99, in_features, 1).float()
    gram = tokens.T @ tokens
    plain = factorize(weight, Whitening(gram), 7)
    scaled = factorize(weight * factor, Whitening(gram / factor), 7)
    assert scaled.relative_error == pytest.approx(plain.relative_error, rel=1e-4)
    assert scaled.total_energy == pytest.approx(plain.total_energy * factor, rel=1e-4)
    torch.testing.assert_close(scaled.eigenvalues / factor, plain.eigenvalues, rtol=1e-4, atol=1e-5)
    recovered = (scaled.factors.up @ scaled.factors.down).double() / factor
    torch.testing.assert_close(recovered, (plain.factors.up @ plain.factors.down).double(), rtol=1e-3, atol=1e-4)


def test_bfloat16_weights_are_computed_in_float32() -> None:
    weight, tokens = normal(20, 30).bfloat16(), normal(99, 30, 1).float()
    result = factorize(weight, Whitening(tokens.T @ tokens), 7)
    assert result.factors.up.dtype == result.factors.down.dtype == result.dtype == torch.float32
    gram = damped(tokens.T @ tokens)
    assert error_of(weight, result.factors, gram) == pytest.approx(best_error(weight, gram, 7), rel=1e-4)


def test_eigenvalues_give_the_error_of_every_rank() -> None:
    weight, tokens = normal(20, 30), normal(99, 30, 1)
    gram = damped(tokens.T @ tokens)
    result = factorize(weight, Whitening(tokens.T @ tokens), 5, solver="exact")
    assert result.eigenvalues.shape == (20,)
    for rank in range(1, 20):
        foreseen = math.sqrt(1 - float(result.eigenvalues[:rank].sum()) / result.total_energy)
        assert foreseen == pytest.approx(best_error(weight, gram, rank), rel=1e-8)


def test_damping_serves_tokens_that_were_not_seen() -> None:
    weight, tokens = normal(60, 60), normal(2000, 60, 1) * torch.logspace(0, -2, 60, dtype=torch.float64)
    few, unseen = tokens[:12], tokens[12:]
    tiny, usual = (factorize(weight, Whitening(few.T @ few, frac), 30).factors for frac in (1e-14, 1e-6))
    gram = unseen.T @ unseen
    assert error_of(weight, usual, gram) <= error_of(weight, tiny, gram) * 1.05


@pytest.mark.parametrize("solver", ["exact", "subspace"])
def test_same_seed_same_bits(solver: Solver) -> None:
    weight, tokens = normal(150, 150).float(), normal(400, 150, 1).float()
    a, b = (factorize(weight, Whitening(tokens.T @ tokens), 20, solver=solver, seed=5) for _ in range(2))
    assert torch.equal(a.factors.up, b.factors.up)
    other = factorize(weight, Whitening(tokens.T @ tokens), 20, solver=solver, seed=6)
    assert other.relative_error == pytest.approx(a.relative_error, rel=1e-3)


def test_leaves_its_arguments_alone() -> None:
    weight, tokens = normal(150, 150).float(), normal(400, 150, 1).float()
    gram = tokens.T @ tokens
    copies = weight.clone(), gram.clone()
    whitening = Whitening(gram)
    for solver in ("exact", "subspace"):
        factorize(weight, whitening, 20, solver=solver)
    assert torch.equal(weight, copies[0])
    assert torch.equal(gram, copies[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_inf_name_the_layer(value: float, dtype: torch.dtype) -> None:
    weight = torch.ones(4, 6, dtype=dtype)
    weight[1, 2] = value
    with pytest.raises(NumericsError, match=r"weight of layers\.3\.q_proj holds a NaN or an Inf") as raised:
        factorize(weight, Whitening.identity(6), 2, name="layers.3.q_proj")
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"q_proj reads 6 features, but its Gram is of 5"):
        factorize(torch.ones(4, 6), Whitening.identity(5), 2, name="q_proj")
    for rank in (0, 5):
        with pytest.raises(ValueError, match=r"q_proj has 4 ranks, so its rank cannot be"):
            factorize(torch.ones(4, 6), Whitening.identity(6), rank, name="q_proj")


@pytest.mark.parametrize(
    ("weight", "rank", "solver", "sentence"),
    [
        (torch.ones(6), 2, "auto", r"q_proj has a weight of shape \(6,\) on cpu: give a matrix"),
        (torch.ones(4, 6, device="meta"), 2, "auto", r"q_proj has a weight of shape \(4, 6\) on meta: give a matrix"),
        (torch.ones(4, 6), 2.0, "auto", r"The rank of q_proj is 2\.0: give a whole number"),
        (torch.ones(4, 6), 2, "svd", "solver is 'svd': give one of auto, exact, subspace, products"),
    ],
)
def test_refuses_what_is_no_argument(weight: Tensor, rank: Any, solver: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        factorize(weight, Whitening.identity(6), rank, solver=solver, name="q_proj")


@pytest.mark.parametrize("solver", ["exact", "subspace", "products"])
@pytest.mark.parametrize(("dtype", "large"), [(torch.float32, 2e38), (torch.float64, 1e308)])
def test_a_weight_near_the_end_of_its_dtype_has_finite_factors(
    dtype: torch.dtype, large: float, solver: Solver
) -> None:
    """As long as these fit it."""
    weight = torch.zeros(40, 60, dtype=dtype)
    weight.diagonal().copy_(large * torch.linspace(1.0, 0.5, 40, dtype=dtype))
    made = factorize(weight, Whitening.identity(60), 10, solver=solver)
    assert float((made.factors.up @ made.factors.down).abs().max()) == pytest.approx(large, rel=1e-3)
    assert made.relative_error == pytest.approx(
        best_error(weight / large, torch.eye(60, dtype=torch.float64), 10), rel=2e-3
    )
    with pytest.raises(NumericsError, match=r"The weight of q_proj is so large that its factors overflow torch\.float"):
        factorize(torch.full((40, 60), large, dtype=dtype), Whitening.identity(60), 10, solver=solver, name="q_proj")


def test_takes_a_gram_s_matrix_and_one_of_activations_with_gradients() -> None:
    x, weight = normal(50, 6).requires_grad_(), normal(4, 6, 1).requires_grad_()
    gram = x.T @ x
    made = [factorize(weight, inputs, 2).factors for inputs in (Whitening(gram), Gram(gram), gram)]
    assert not any(factor.requires_grad for factors in made for factor in factors)
    assert all(torch.equal(made[0].down, factors.down) for factors in made)


def test_a_factorization_survives_pickling() -> None:
    result = factorize(normal(5, 6), Whitening.identity(6), 2)
    again = pickle.loads(pickle.dumps(result))
    assert isinstance(again, Factorization)
    assert isinstance(again.factors, LowRankFactors)
    assert torch.equal(again.factors.up, result.factors.up)


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e12])
def test_the_error_of_any_approximation(scale: float) -> None:
    weight, tokens = normal(12, 20, 1) * scale, normal(50, 20, 2)
    gram = tokens.T @ tokens
    up, down = normal(12, 3, 3) * scale, normal(3, 20, 4)  # far from the best
    found, total = relative_error(weight.float(), (up @ down).float(), Whitening(gram.float()))
    assert found == pytest.approx(error_of(weight, (up, down), damped(gram)), rel=1e-4)
    assert found > 1
    assert total == pytest.approx(float(torch.trace(weight @ damped(gram) @ weight.T)), rel=1e-4)
    assert relative_error(torch.zeros(12, 20), torch.zeros(12, 20), Whitening(gram.float())) == (0.0, 0.0)


NO_FLOATS = [
    torch.ones(4, 6, dtype=torch.int32),
    torch.ones(4, 6, dtype=torch.complex64),
    torch.ones(4, 6, dtype=torch.bool),
]


@pytest.mark.parametrize("weight", NO_FLOATS, ids=lambda weight: str(weight.dtype))
def test_a_weight_that_is_not_of_floats_is_refused(weight: Tensor) -> None:
    inputs, outputs = Whitening.identity(6), Whitening.identity(4)
    calls: list[Callable[[], object]] = [
        lambda: factorize(weight, inputs, 2, name="q_proj"),
        lambda: factorize_two_sided(weight, inputs, outputs, 2, name="q_proj"),
        lambda: relative_error(weight, weight, inputs, name="q_proj"),
        lambda: quantize(weight, inputs, 4, name="q_proj"),
        lambda: quantize_with_factors(weight, inputs, 4, 2, 8, name="q_proj"),
        lambda: spectrum(weight, inputs, outputs, name="q_proj"),
        lambda: form_losses(weight, inputs, outputs, [Form(2)], name="q_proj"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"q_proj has a weight of shape \(4, 6\) in torch\..*: give a matrix"):
            call()


def test_a_weight_without_rows_is_refused() -> None:
    weight, inputs = torch.ones(0, 6), Whitening.identity(6)
    for call in (
        lambda: relative_error(weight, weight, inputs, name="a"),
        lambda: quantize(weight, inputs, 4, name="a"),
    ):
        with pytest.raises(ValueError, match=r"The weight of a is of shape \(0, 6\), which holds no number"):
            call()


@pytest.mark.parametrize("shape", [(1, 6), (4, 1), (6,), (), (4, 5)])
def test_an_error_is_of_an_approximation_of_the_weight_s_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"a has a weight of shape \(4, 6\), but its approximation is of"):
        relative_error(torch.ones(4, 6), torch.ones(shape), Whitening.identity(6), name="a")
