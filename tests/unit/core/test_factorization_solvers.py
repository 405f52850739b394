"""Solvers of the factorization: leading vectors alone, where float32 is enough, and what takes over where it is not."""

from __future__ import annotations

import math

import pytest
import torch
from test_factorization import DTYPES, best_error, damped, error_of, normal, with_spectrum
from torch import Tensor

from emloc_ray.core import factorization, krylov
from emloc_ray.core.factorization import Solver, factorize
from emloc_ray.core.whitening import Whitening


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


@pytest.mark.parametrize(("solver", "most"), [("subspace", 90), ("products", 150)])
@pytest.mark.parametrize("power", [0, 0.5, 1, 2, 4, 6])
@pytest.mark.parametrize(("out_features", "in_features"), [(300, 340), (340, 300)])
@DTYPES
def test_leading_vectors_are_within_a_thousandth_of_the_optimum(
    solver: Solver, most: int, power: float, out_features: int, in_features: int, dtype: torch.dtype
) -> None:
    eigenvalues = torch.arange(1, 301, dtype=torch.float64) ** -power
    weight, gram = with_spectrum(300, eigenvalues, out_features, in_features)
    for rank in (20, most):
        whitening = Whitening(gram.to(dtype), dampening_frac=0.0)
        result = factorize(weight.to(dtype), whitening, rank, solver=solver, seed=3)
        optimum = math.sqrt(float(eigenvalues[rank:].sum() / eigenvalues.sum()))
        assert (result.solver, len(result.eigenvalues)) == (solver, rank)
        assert result.dtype == (
            torch.float64 if power == 6 and rank > 20 else dtype
        )  # what float32 cannot hold is redone
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
    gram = tokens.T @ tokens - 0.1 * torch.eye(160, dtype=torch.float64)
    whitening = Whitening(gram)
    assert whitening.cholesky(torch.float64) is None
    assert factorize(weight, whitening, 12, solver="subspace").solver == "exact"


def test_auto_takes_the_subspace_where_it_pays() -> None:
    weight, tokens = normal(256, 256, 8).float(), normal(500, 256, 9).float()
    whitening = Whitening(tokens.T @ tokens)
    assert factorize(weight, whitening, 20).solver == "subspace"
    assert factorize(weight, whitening, 60).solver == "exact"
    assert factorize(weight[:50], whitening, 5).solver == "exact"
