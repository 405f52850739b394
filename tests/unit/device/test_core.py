"""The method's algebra on a device of its own: nothing is left on the CPU, and what comes out is what the CPU gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_weights import stored_product
from pretend_device import Meter
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from emloc_ray.core import factorization
from emloc_ray.core.correction import (
    apply_correction,
    canonical_form,
    clamp_columns,
    correction,
    difference,
    residual_energy,
    shortfall,
)
from emloc_ray.core.distillation import divergence, top_log_probs
from emloc_ray.core.factorization import LowRankFactors, factorize, relative_error
from emloc_ray.core.forms import Form
from emloc_ray.core.gram import Gram, packed_triangle, unpack_triangle
from emloc_ray.core.healing import added_factors
from emloc_ray.core.krylov import leading_vectors
from emloc_ray.core.merging import merged_rows
from emloc_ray.core.pivoting import pivot
from emloc_ray.core.predicted_loss import form_losses
from emloc_ray.core.products import product_by_rows
from emloc_ray.core.quantization import quantize, quantize_factors, quantize_with_factors
from emloc_ray.core.refinement import balanced, token_error
from emloc_ray.core.spectra import plain_gains, spectrum
from emloc_ray.core.stored_weight import StoredWeight
from emloc_ray.core.trained_integers import Unrounded, rounded_weight, unrounded
from emloc_ray.core.two_sided import factorize_two_sided
from emloc_ray.core.updates import HadamardUpdate, KroneckerUpdate, LowRankUpdate
from emloc_ray.core.whitening import Whitening
from emloc_ray.io.formats.grams import StoredGram, write_gram_shard
from emloc_ray.modeling.integer_linear import IntegerLinear

OUT, IN, R = 24, 40, 6


def made() -> dict[str, Tensor]:
    """Of one linear: its weight, sums over inputs and gradients, an adapter."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, g = normal(100, IN) @ normal(IN, IN), normal(100, OUT) @ normal(OUT, OUT)
    lora = {"a": normal(4, IN), "b": normal(OUT, 4), "more": normal(OUT, 4), "less": normal(4, IN)}
    return {"weight": normal(OUT, IN), "gram": x.T @ x, "gradients": g.T @ g, "x": x, "delta": normal(OUT, IN), **lora}


def plain(t: dict[str, Tensor], solver: Any = "exact", turned: bool = False) -> Any:
    weight, gram = (t["weight"].T.contiguous(), t["gradients"]) if turned else (t["weight"], t["gram"])
    found = factorize(weight, Whitening(gram), R, solver=solver)
    error = relative_error(weight, found.factors.up @ found.factors.down, Whitening(gram))
    return found.factors, found.eigenvalues, found.total_energy, found.relative_error, error


def two_sided(t: dict[str, Tensor]) -> Any:
    found = factorize_two_sided(t["weight"], Whitening(t["gram"]), Whitening(t["gradients"], 1e-2), R)
    return found.factors, found.eigenvalues


def pivoted(t: dict[str, Tensor]) -> Any:
    found = pivot(LowRankFactors(*plain(t)[0]))
    return found, stored_product(*found)


def whitened(t: dict[str, Tensor]) -> Any:
    whitening, weight, dtype = Whitening(t["gram"]), t["weight"], torch.float32
    tensors = whitening.matrix(dtype), whitening.root(dtype), whitening.outer(weight), whitening.whiten(weight)
    return tensors, whitening.energy(weight), whitening.times(t["x"].T.double())


def summed(t: dict[str, Tensor]) -> Any:
    gram = Gram.zero(IN, device=t["x"].device)
    gram.update(t["x"])
    whole = gram.symmetric()
    return whole, gram.num_tokens, unpack_triangle(torch.cat([*packed_triangle(whole, 1000)]).to(whole.device))


def corrected(t: dict[str, Tensor]) -> Any:
    form = canonical_form(t["a"], t["b"])
    stored, found = StoredWeight(*plain(t)[0]), []
    for method, gram in (("projection", None), ("covariance", t["gram"])):
        energy = residual_energy(t["weight"], stored, gram, 0.5)
        gram_q = None if gram is None else product_by_rows(gram, form.q)
        seen = difference(t["weight"], stored, form.q, gram_q, energy=energy)
        applied = clamp_columns(correction(seen, method, 2.0), form.b, 3.0)  # type: ignore[arg-type]
        found.append((apply_correction(form, applied, 4), shortfall(seen, applied, 2.0) if gram is not None else 0.0))
    return found


def updates(t: dict[str, Tensor]) -> Any:
    all_of_them = (
        LowRankUpdate(t["a"], t["b"], 2.0),
        HadamardUpdate(t["b"], t["a"], t["more"], t["less"], 0.5),
        KroneckerUpdate(t["b"][:6], t["less"][:, :10], 0.5),
    )
    return [(update.rows(1, 5), update.dominant(1e-3), merged_rows(t["weight"], update)) for update in all_of_them]


def distilled(t: dict[str, Tensor]) -> Any:
    top = top_log_probs(t["weight"], 5)
    return top, divergence(t["delta"], *top), added_factors(t["a"], t["b"], 2.0)


def in_integers(t: dict[str, Tensor]) -> Any:
    whitening = Whitening(t["gram"], 1e-2)
    alone, inside = quantize(t["weight"], whitening, 3, 16), quantize_factors(plain(t)[0], t["weight"], whitening, 4, 8)
    found, *beside = quantize_with_factors(t["weight"], whitening, 2, R, 4, 16)
    weights = [weight.dense() for weight in (alone, *inside, found, *beside)]
    lost = [whitening.energy(t["weight"] - made) for made in (weights[0], weights[3] + weights[4] @ weights[5])]
    return weights[0], lost, (weights[1] @ weights[2]).norm().item()


def through_integers(t: dict[str, Tensor]) -> Any:
    stored = quantize(t["weight"], Whitening(t["gram"], 1e-2), 3, 16)
    layer, x = IntegerLinear(IN, OUT, 3, 16), t["x"].clone().requires_grad_()
    for name, tensor in stored.tensors(torch.float32).items():
        setattr(layer, name, tensor.to(x.device))
    y = layer(x)
    y.square().sum().backward()
    return y.detach(), x.grad


def trained_integers(t: dict[str, Tensor]) -> Any:
    grid = quantize(t["weight"], Whitening(t["gram"], 1e-2), 3, 16)
    floats = Unrounded(*(part.requires_grad_() for part in unrounded(grid)))
    y = t["x"] @ rounded_weight(floats, grid).T
    y.square().sum().backward()
    return y.detach(), *(part.grad for part in floats)


def forms(t: dict[str, Tensor]) -> Any:
    asked = [Form(None), Form(R), Form(None, bits=3), Form(R, bits=4)]
    losses = form_losses(t["weight"], Whitening(t["gram"], 1e-2), Whitening(t["gradients"], 1e-2), asked, 16)
    assert losses.device.type == "cpu"
    return losses.tolist()


def refined(t: dict[str, Tensor]) -> Any:
    up, down = balanced(*plain(t)[0])
    counted = t["x"][:, 0] > 0
    return up @ down, token_error(t["x"] @ down.T, t["x"] @ (2 * down).T, counted)


CASES: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "exact": plain,
    "exact, tall": lambda t: plain(t, turned=True),
    "subspace": lambda t: plain(t, "subspace"),
    "subspace, tall": lambda t: plain(t, "subspace", turned=True),
    "products": lambda t: plain(t, "products"),
    "products, tall": lambda t: plain(t, "products", turned=True),
    "two-sided": two_sided,
    "pivoted": pivoted,
    "whitening": whitened,
    "Grams": summed,
    "spectrum": lambda t: spectrum(t["weight"], Whitening(t["gram"]), Whitening(t["gradients"], 1e-2)),
    "plain gains": lambda t: plain_gains(t["weight"], Whitening(t["gram"]), Whitening(t["gradients"], 1e-2)),
    "correction": corrected,
    "updates": updates,
    "distillation": distilled,
    "integers": in_integers,
    "a linear of integers": through_integers,
    "forms": forms,
    "refinement": refined,
    "trained integers": trained_integers,
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_the_cpu_gives(case: str, device: torch.device) -> None:
    here = tree_leaves(CASES[case](made()))
    there = tree_leaves(CASES[case](tree_map_only(Tensor, lambda tensor: tensor.to(device), made())))
    for expected, found in zip(here, there, strict=True):
        if isinstance(expected, Tensor):
            assert found.device == device
            torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)
        else:
            assert found == pytest.approx(expected, rel=1e-4)


def wide(order: int, power: float) -> tuple[Tensor, Tensor]:
    """A layer of ``order + 40`` outputs whose ``W G Wᵀ`` has eigenvalues that fall as ``i^-power``, and its Gram."""
    generator = torch.Generator().manual_seed(3)
    u, v = (torch.linalg.qr(torch.randn(n, order, generator=generator)).Q for n in (order + 40, order))
    return (u * torch.arange(1, order + 1) ** (-power / 2)) @ v.T, torch.eye(order)


@pytest.mark.parametrize("order", [256, 512])
def test_the_host_waits_for_looks_not_for_steps(order: int, device: torch.device, meter: Meter) -> None:
    weight, gram = (tensor.to(device) for tensor in wide(order, 1.0))
    meter.restart()
    assert factorize(weight, Whitening(gram), order // 4).solver == "products"
    assert meter.waits.total() <= 40, meter.waits


def test_slow_float64_is_done_on_the_cpu(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factorization, "SURE_ROUNDING_SHARE", 0.0)
    monkeypatch.setattr(factorization, "MAX_RESIDUAL_DIFFERENCE", -1.0)
    taken = []
    inner = leading_vectors
    monkeypatch.setattr(
        factorization, "leading_vectors", lambda matrix, *rest: taken.append(matrix) or inner(matrix, *rest)
    )
    weight, gram = wide(256, 1.0)
    found = factorize(weight.to(device), Whitening(gram.to(device)), 40)
    assert [(matrix.device.type, matrix.dtype) for matrix in taken] == [("cpu", torch.float64)]
    assert found.dtype == torch.float64
    assert {part.device for part in (*found.factors, found.eigenvalues)} == {device}
    assert found.relative_error == pytest.approx(factorize(weight, Whitening(gram), 40).relative_error, rel=1e-3)


@pytest.mark.parametrize("has_cholesky", [True, False])
def test_a_root_that_float32_does_not_have_is_taken_on_the_cpu(
    has_cholesky: bool, device: torch.device, meter: Meter
) -> None:
    order = 300
    tokens = torch.randn(100, order, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 30.0
    gram = (tokens.T @ tokens).float()
    if not has_cholesky:
        gram -= 1e-3 * gram.diagonal().mean() * torch.eye(order)
    here, there = Whitening(gram), Whitening(gram.to(device))
    assert int(torch.linalg.cholesky_ex(here.matrix(torch.float32)).info) != 0
    assert (here.cholesky(torch.float64) is not None) is has_cholesky
    meter.restart()
    before, root = meter.current, there.root(torch.float32)
    assert root.device == device
    torch.testing.assert_close(root.cpu(), here.root(torch.float32), rtol=1e-4, atol=1e-5)
    assert meter.peak - before < 2 * 4 * order**2 + 100  # the damped Gram in float32 and the root


def test_an_error_is_summed_without_a_wait(device: torch.device, meter: Meter) -> None:
    x = made()["x"].to(device)
    counted = x[:, 0] > 0
    meter.restart()
    token_error(x, 2 * x, counted)
    assert not meter.waits


def test_a_gram_is_added_to_without_a_wait(device: torch.device, meter: Meter) -> None:
    gram, x = Gram.zero(IN, device=device), made()["x"].to(device)
    meter.restart()
    before = meter.current
    gram.update(x)
    assert not meter.waits
    assert meter.current == before


def test_half_of_a_gram_goes_to_the_device_which_unpacks_it(tmp_path: Path, device: torch.device, meter: Meter) -> None:
    gram = Gram.zero(IN)
    gram.update(made()["x"])
    write_gram_shard(tmp_path / "grams", {"a": gram})
    stored = StoredGram(tmp_path / "grams", "a")
    before = meter.current
    packed = stored.packed().to(device)
    assert meter.current - before == 4 * IN * (IN + 1) // 2
    meter.restart()
    assert torch.equal(unpack_triangle(packed).cpu(), gram.symmetric())
    assert sum(meter.waits.values()) == 1  # the test's own copy: the rows are no launch each that the host waits for
    assert torch.equal(stored.read(device).cpu(), gram.symmetric())
