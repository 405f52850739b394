"""The factors are the best of their rank: against the published route and float64 references."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator

import pytest
import torch
from benchmarks.baselines import published_route
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emloc_ray.core import factorization, krylov
from emloc_ray.core.factorization import Factorization, LowRankFactors, Solver, factorize, relative_error
from emloc_ray.core.whitening import Whitening
from emloc_ray.errors import NumericsError

FEW = settings(deadline=None, max_examples=25)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
ORIENTATIONS = pytest.mark.parametrize(("out_features", "in_features"), [(40, 70), (70, 40), (50, 50)])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small products gain nothing from a second thread, and wait for it where other work holds its core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


@pytest.mark.parametrize("solver", ["exact", "subspace"])
@pytest.mark.parametrize("where", ["activations", "weight", "both"])
@pytest.mark.parametrize(("out_features", "in_features"), [(200, 260), (260, 200)])
def test_one_channel_3000_times_the_others(solver: Solver, where: str, out_features: int, in_features: int) -> None:
    weight, tokens = normal(out_features, in_features, 6).float(), normal(900, in_features, 7).float()
    if where != "weight":
        tokens[:, 3] *= 3000
    if where != "activations":
        weight[:, 3] *= 3000
    gram = tokens.to(torch.float64).T @ tokens.to(torch.float64)
    result = factorize(weight, Whitening(gram), 30, solver=solver)
    # The eigendecomposition squares the scales; what works on W L finds float32 enough where one of the two is large.
    assert result.dtype == (torch.float32 if solver == "subspace" and where != "both" else torch.float64)
    assert result.solver == solver
    optimum = best_error(weight, damped(gram), 30)
    assert result.relative_error == pytest.approx(optimum, rel=1e-3)
    # In float64 the factors as computed; stored in float32 they lose up to 2⁻²⁴ of the large channel.
    assert error_of(weight, result.factors, damped(gram)) == pytest.approx(optimum, rel=1e-3, abs=1e-6)


def test_float32_that_the_probes_refuse_is_redone_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, tokens = normal(200, 260, 6).float(), normal(900, 260, 7).float()
    tokens[:, 3] *= 3000
    gram = tokens.to(torch.float64).T @ tokens.to(torch.float64)
    whitening, optimum = Whitening(gram), best_error(weight, damped(gram), 30)
    assert factorize(weight, whitening, 30, solver="subspace").dtype == torch.float32
    for name in ("PROBED_EXCESS", "MAX_RESIDUAL_DIFFERENCE"):
        with monkeypatch.context() as patch:
            patch.setattr(factorization, name, 0.0)
            result = factorize(weight, whitening, 30, solver="subspace")
        assert (result.solver, result.dtype) == ("subspace", torch.float64)
        assert result.relative_error == pytest.approx(optimum, rel=1e-3)


@pytest.mark.parametrize("what", ["root", "vectors"])
def test_the_probes_see_what_float32_got_wrong(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    eigenvalues = torch.arange(1, 301, dtype=torch.float64) ** -4
    weight, gram = with_spectrum(300, eigenvalues, 300, 340)
    whitening = Whitening(gram.float(), dampening_frac=0.0)
    assert factorize(weight.float(), whitening, 40, solver="subspace").dtype == torch.float32
    noise = 3e-6 * normal(300, 340).float()
    if what == "root":
        whiten = Whitening.whiten
        spoilt = lambda self, w: whiten(self, w) + noise * (w.dtype == torch.float32)  # noqa: E731
        monkeypatch.setattr(Whitening, "whiten", spoilt)
    else:
        polish = factorization.polish
        spoilt_up = lambda u: polish(u + 10 * noise[:, : u.shape[1]] if u.dtype == torch.float32 else u)  # noqa: E731
        monkeypatch.setattr(factorization, "polish", spoilt_up)
    result = factorize(weight.float(), whitening, 40, solver="subspace")
    assert (result.solver, result.dtype) == ("subspace", torch.float64)
    optimum = math.sqrt(float(eigenvalues[40:].sum() / eigenvalues.sum()))
    assert error_of(weight, result.factors, gram) == pytest.approx(optimum, rel=1e-3)


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


@pytest.mark.parametrize("power", [0, 1, 2, 4, 6])
@pytest.mark.parametrize(("out_features", "in_features"), [(300, 340), (340, 300)])
@DTYPES
def test_subspace_is_within_a_thousandth_of_the_optimum(
    power: int, out_features: int, in_features: int, dtype: torch.dtype
) -> None:
    eigenvalues = torch.arange(1, 301, dtype=torch.float64) ** -power
    weight, gram = with_spectrum(300, eigenvalues, out_features, in_features)
    for rank in (20, 75):
        whitening = Whitening(gram.to(dtype), dampening_frac=0.0)
        result = factorize(weight.to(dtype), whitening, rank, solver="subspace", seed=3)
        optimum = math.sqrt(float(eigenvalues[rank:].sum() / eigenvalues.sum()))
        assert result.solver == "subspace"
        assert len(result.eigenvalues) == rank
        reached = error_of(weight, result.factors, gram)
        assert optimum * (1 - 1e-4) <= reached <= optimum * (1 + 1e-3)
        assert result.relative_error == pytest.approx(reached, rel=6e-4)
        torch.testing.assert_close(
            (result.eigenvalues.cumsum(0) / eigenvalues[:rank].cumsum(0)).clamp_max(1.0),
            torch.ones(rank, dtype=torch.float64), rtol=0, atol=0.02,
        )  # fmt: skip


def test_subspace_falls_back_where_it_does_not_settle(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, tokens = normal(60, 80, 8), normal(200, 80, 9)
    whitening = Whitening(tokens.T @ tokens)
    # Nothing to gain: the subspace would be nearly everything.
    assert factorize(weight, whitening, 45, solver="subspace").solver == "exact"
    assert factorize(weight, whitening, 10, solver="subspace").solver == "subspace"
    monkeypatch.setattr(krylov, "loss_bound", lambda *_: 1e-300)
    result = factorize(weight, whitening, 10, solver="subspace")
    assert result.solver == "exact"
    assert result.relative_error == pytest.approx(best_error(weight, damped(tokens.T @ tokens), 10), rel=1e-9)


@pytest.mark.parametrize(("out_features", "in_features"), [(150, 180), (180, 150)])
def test_subspace_of_a_low_rank_layer_and_of_diagonal_ones(out_features: int, in_features: int) -> None:
    low = normal(out_features, 12, 1) @ normal(12, in_features, 2)
    diagonal = torch.zeros(out_features, in_features, dtype=torch.float64)
    diagonal.diagonal().copy_(torch.arange(150, 0, -1))
    identity = Whitening.identity(in_features)
    for weight in (low, low.float(), diagonal, diagonal.float()):
        result = factorize(weight, identity, 20, solver="subspace")
        optimum = best_error(weight, torch.eye(in_features, dtype=torch.float64), 20)
        reached = error_of(weight, result.factors, torch.eye(in_features, dtype=torch.float64))
        assert reached == pytest.approx(optimum, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(("out_features", "in_features"), [(150, 340), (340, 150)])
@pytest.mark.parametrize(("power", "squares"), [(1, True), (4, False)])
def test_the_smaller_gram_serves_only_where_squaring_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, out_features: int, in_features: int, power: int, squares: bool
) -> None:
    eigenvalues = torch.arange(1, 151, dtype=torch.float64) ** -power
    weight, gram = with_spectrum(150, eigenvalues, out_features, in_features)
    taken: list[bool] = []

    def recorded(matrix: Tensor, rank: int, seed: int, *, squared: bool = False) -> krylov.LeadingVectors | None:
        taken.append(squared)
        return krylov.leading_vectors(matrix, rank, seed, squared=squared)

    monkeypatch.setattr(factorization, "leading_vectors", recorded)
    result = factorize(weight.float(), Whitening(gram.float(), 0.0), 20, solver="subspace")
    assert taken == ([True] if squares else [True, False])
    assert (result.solver, result.dtype) == ("subspace", torch.float32)
    optimum = math.sqrt(float(eigenvalues[20:].sum() / eigenvalues.sum()))
    assert error_of(weight, result.factors, gram) == pytest.approx(optimum, rel=1e-3)


def test_a_gram_without_a_cheap_root_takes_the_exact_route() -> None:
    weight, tokens = normal(150, 160, 1), normal(40, 160, 2)
    gram = tokens.T @ tokens - 1e-4 * torch.eye(160, dtype=torch.float64)
    whitening = Whitening(gram)
    assert whitening.cholesky(torch.float64) is None
    assert factorize(weight, whitening, 12, solver="subspace").solver == "exact"


def test_auto_takes_the_subspace_where_it_pays() -> None:
    weight, tokens = normal(256, 256, 8).float(), normal(500, 256, 9).float()
    whitening = Whitening(tokens.T @ tokens)
    assert factorize(weight, whitening, 20).solver == "subspace"
    assert factorize(weight, whitening, 60).solver == "exact"
    assert factorize(weight[:50], whitening, 5).solver == "exact"


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
