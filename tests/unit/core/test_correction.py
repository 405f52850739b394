"""The correction's laws, each against a formulation of its own: lstsq, brute-force norms, plain matrix products."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from emloc_ray.core.correction import (
    CanonicalLora,
    CorrectedLora,
    Difference,
    apply_correction,
    canonical_form,
    clamp_columns,
    correction,
    difference,
    energy_with,
    residual_energy,
    shortfall,
)
from emloc_ray.core.stored_weight import StoredWeight

seeds = st.integers(0, 2**31 - 1)
scales = st.sampled_from([0.25, 0.5, 1.0, 2.0, 16 / 8**0.5])
sizes = st.tuples(st.integers(2, 24), st.integers(4, 24), st.integers(1, 4))
clamps = st.sampled_from([None, 0.1, 1.0, 3.0])


def normal(seed: int, *shape: int) -> Tensor:
    """Float64 normal numbers."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spd(seed: int, n: int, tokens: int | None = None) -> Tensor:
    """A Gram of anisotropic inputs."""
    x = normal(seed, tokens or 3 * n, n) * torch.linspace(0.1, 3.0, n, dtype=torch.float64)
    return x.T @ x


def case(seed: int, size: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """``W − W_E (out, in)``, ``A (r, in)``, ``B (out, r)``."""
    out_features, in_features, r = size
    return normal(seed, out_features, in_features), normal(seed + 1, r, in_features), normal(seed + 2, out_features, r)


def energy_of(delta: Tensor, gram: Tensor | None = None) -> float:
    """``tr(Δ G Δᵀ)``, in float64."""
    wide = delta.double()
    return float((wide @ (torch.eye(delta.shape[1]).double() if gram is None else gram.double()) @ wide.T).trace())


def see(delta: Tensor, q: Tensor, gram: Tensor | None = None) -> Difference:
    """Of an emulator's layer of rank 1."""
    stored = StoredWeight(normal(8, len(delta), 1), normal(9, 1, delta.shape[1]))
    weight = delta.double() + stored.rows(0, len(delta)).double()
    return difference(weight, stored, q, None if gram is None else gram @ q, energy=energy_of(delta, gram))


def run(
    delta: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    method: str,
    scale: float,
    *,
    gram: Tensor | None = None,
    clamp: float | None = None,
    strength: float = 1.0,
    dampening_frac: float = 1e-12,
) -> tuple[CanonicalLora, Tensor, CorrectedLora]:
    """The whole chain, as the correct stage has it."""
    form = canonical_form(lora_a, lora_b)
    raw = correction(see(delta, form.q, gram), method, scale, dampening_frac)  # type: ignore[arg-type]
    applied = strength * clamp_columns(raw, form.b, clamp)
    return form, applied, apply_correction(form, applied, len(lora_a))


# The canonical form.


@given(seeds, sizes)
def test_canonical_form_keeps_the_update_in_an_orthonormal_basis(seed: int, size: tuple[int, int, int]) -> None:
    _, lora_a, lora_b = case(seed, size)
    b, q = canonical_form(lora_a, lora_b)
    assert b.dtype == q.dtype == torch.float64
    torch.testing.assert_close(b @ q.T, lora_b @ lora_a, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(q.T @ q, torch.eye(q.shape[1], dtype=q.dtype), rtol=0, atol=1e-12)


@given(seeds, st.integers(1, 3))
def test_dependent_rows_of_a_are_dropped(seed: int, rank: int) -> None:
    lora_a = normal(seed, 4, rank) @ normal(seed + 1, rank, 12)
    lora_b = normal(seed + 2, 6, 4)
    b, q = canonical_form(lora_a, lora_b)
    assert q.shape == (12, rank)
    assert b.shape == (6, rank)
    torch.testing.assert_close(b @ q.T, lora_b @ lora_a, rtol=1e-9, atol=1e-9)


def test_an_adapter_that_reads_nothing() -> None:
    form, applied, corrected = run(normal(0, 6, 5), torch.zeros(2, 5), normal(1, 6, 2), "projection", 1.0)
    assert form.q.shape == (5, 0)
    assert applied.shape == (6, 0)
    assert not corrected.lora_a.any()
    assert not corrected.lora_b.any()
    assert corrected.lora_a.shape == (2, 5)
    assert corrected.lora_b.shape == (6, 2)


# The two methods.


@given(seeds, sizes, scales, clamps, st.floats(1e-3, 1e6))
def test_an_isotropic_gram_makes_covariance_the_projection(
    seed: int, size: tuple[int, int, int], scale: float, clamp: float | None, height: float
) -> None:
    delta, lora_a, lora_b = case(seed, size)
    isotropic = height * torch.eye(size[1], dtype=torch.float64)
    _, by_data, _ = run(delta, lora_a, lora_b, "covariance", scale, gram=isotropic, clamp=clamp, dampening_frac=1e-2)
    _, projected, _ = run(delta, lora_a, lora_b, "projection", scale, clamp=clamp)
    torch.testing.assert_close(by_data, projected, rtol=1e-9, atol=1e-9)


@given(seeds, sizes, scales)
def test_unclamped_projection_reproduces_the_emulator_where_the_adapter_reads(
    seed: int, size: tuple[int, int, int], scale: float
) -> None:
    delta, lora_a, lora_b = case(seed, size)
    emulator = normal(seed + 5, size[0], size[1])
    original = emulator + delta
    _, _, corrected = run(delta, lora_a, lora_b, "projection", scale)
    inputs = lora_a.T @ normal(seed + 6, size[2], 7)  # in the span of the rows of A
    served = (original + scale * corrected.lora_b.double() @ corrected.lora_a.double()) @ inputs
    trained = (emulator + scale * lora_b @ lora_a) @ inputs
    torch.testing.assert_close(served, trained, rtol=1e-5, atol=1e-5 * float(trained.abs().max()))


@given(seeds, sizes, scales)
def test_nothing_changes_where_the_adapter_does_not_read(seed: int, size: tuple[int, int, int], scale: float) -> None:
    delta, lora_a, lora_b = case(seed, size)
    _, _, corrected = run(delta, lora_a, lora_b, "covariance", scale, gram=spd(seed, size[1]))
    unread = torch.linalg.svd(lora_a).Vh[torch.linalg.matrix_rank(lora_a) :].T
    change = corrected.lora_b.double() @ corrected.lora_a.double() @ unread
    assert float(change.abs().max() if change.numel() else 0.0) <= 1e-5 * float(corrected.lora_b.abs().max())


@given(seeds, sizes, scales)
def test_covariance_is_the_least_squares_fit_on_the_data(seed: int, size: tuple[int, int, int], scale: float) -> None:
    delta, lora_a, lora_b = case(seed, size)
    x = normal(seed + 7, 40, size[1]) * torch.linspace(0.1, 3.0, size[1], dtype=torch.float64)
    form, applied, _ = run(delta, lora_a, lora_b, "covariance", scale, gram=x.T @ x)
    fitted = torch.linalg.lstsq(x @ form.q * scale, x @ delta.T).solution.T
    torch.testing.assert_close(applied, fitted, rtol=1e-5, atol=1e-5 * float(fitted.abs().max()))


@given(seeds, sizes, scales)
def test_adapted_is_the_ridge_regression_on_what_the_adapted_emulator_reads(
    seed: int, size: tuple[int, int, int], scale: float
) -> None:
    """Fitted to stacked rows: tokens, and below them the ridge of a tenth of the mean square that a direction reads."""
    delta, lora_a, lora_b = case(seed, size)
    x = normal(seed + 7, 40, size[1]) * torch.linspace(0.1, 3.0, size[1], dtype=torch.float64)
    form = canonical_form(lora_a, lora_b)
    read, k = x @ form.q, form.q.shape[1]
    seen = replace(see(delta, form.q), delta_aq=delta @ x.T @ read, adapted_inner=read.T @ read)
    ridge = (0.1 * read.square().sum() / k).sqrt()
    left = scale * torch.cat([read, ridge * torch.eye(k, dtype=x.dtype)])
    right = torch.cat([x @ delta.T, torch.zeros(k, size[0], dtype=x.dtype)])
    fitted = torch.linalg.lstsq(left, right).solution.T
    corrected = correction(seen, "adapted", scale)
    torch.testing.assert_close(corrected, fitted, rtol=1e-6, atol=1e-6 * float(fitted.abs().max()))


@pytest.mark.parametrize("method", ["covariance", "adapted"])
def test_a_method_without_its_gram_is_an_error(method: Any) -> None:
    delta, lora_a, lora_b = case(0, (6, 8, 3))
    with pytest.raises(ValueError, match=f"{method} needs"):
        correction(see(delta, canonical_form(lora_a, lora_b).q), method, 1.0)


@given(seeds, sizes, scales, st.floats(1e-4, 1.0))
def test_no_other_c_leaves_less(seed: int, size: tuple[int, int, int], scale: float, step: float) -> None:
    delta, lora_a, lora_b = case(seed, size)
    gram = spd(seed + 3, size[1])
    form, applied, _ = run(delta, lora_a, lora_b, "covariance", scale, gram=gram)

    def left(c: Tensor) -> float:
        missed = delta - scale * c @ form.q.T
        return float(torch.trace(missed @ gram @ missed.T))

    other = applied + step * normal(seed + 9, *applied.shape)
    assert left(applied) <= left(other) * (1 + 1e-9)
    assert left(applied) <= left(torch.zeros_like(applied)) * (1 + 1e-9)


def test_none_takes_nothing_out() -> None:
    delta, lora_a, lora_b = case(0, (6, 8, 3))
    form, applied, corrected = run(delta, lora_a, lora_b, "none", 2.0)
    assert not applied.any()
    torch.testing.assert_close(corrected.lora_b.double() @ corrected.lora_a.double(), lora_b @ lora_a)
    torch.testing.assert_close(form.b @ form.q.T, lora_b @ lora_a)


def test_covariance_asks_for_a_gram() -> None:
    delta, lora_a, lora_b = case(0, (6, 8, 3))
    with pytest.raises(ValueError, match="needs a Gram"):
        run(delta, lora_a, lora_b, "covariance", 1.0)


@pytest.mark.parametrize("tokens", [1, 2])
def test_fewer_tokens_than_directions_stay_finite_and_near_the_projection_where_unseen(tokens: int) -> None:
    delta, lora_a, lora_b = case(3, (10, 12, 4))
    x = normal(4, tokens, 12)
    form, applied, _ = run(delta, lora_a, lora_b, "covariance", 1.0, gram=x.T @ x, dampening_frac=1e-4)
    assert torch.isfinite(applied).all()
    unseen = torch.linalg.svd(x @ form.q).Vh[tokens:].T  # directions of the basis that no token has
    projected = delta @ form.q
    torch.testing.assert_close(applied @ unseen, projected @ unseen, rtol=1e-6, atol=1e-6)


# lora_alpha is a matter of bookkeeping.


@given(seeds, sizes, scales, clamps, st.sampled_from(["projection", "covariance"]))
def test_scaling_s_up_and_b_down_changes_nothing(
    seed: int, size: tuple[int, int, int], scale: float, clamp: float | None, method: str
) -> None:
    delta, lora_a, lora_b = case(seed, size)
    gram = spd(seed, size[1]) if method == "covariance" else None
    _, _, one = run(delta, lora_a, lora_b, method, scale, gram=gram, clamp=clamp, strength=0.5)
    _, _, two = run(delta, lora_a, lora_b / 2, method, 2 * scale, gram=gram, clamp=clamp, strength=0.5)
    update_one = scale * one.lora_b.double() @ one.lora_a.double()
    update_two = 2 * scale * two.lora_b.double() @ two.lora_a.double()
    torch.testing.assert_close(update_one, update_two, rtol=1e-5, atol=1e-5 * float(update_one.abs().max()))


# The clamp.


@given(seeds, sizes, scales, st.floats(1e-3, 10))
def test_the_clamp_bounds_every_column_and_touches_only_those_above(
    seed: int, size: tuple[int, int, int], scale: float, clamp: float
) -> None:
    delta, lora_a, lora_b = case(seed, size)
    form, free, _ = run(delta, lora_a, lora_b, "projection", scale)
    _, clamped, _ = run(delta, lora_a, lora_b, "projection", scale, clamp=clamp)
    for j in range(free.shape[1]):
        ratio = float(free[:, j].abs().mean() / form.b[:, j].abs().mean())
        assert float(clamped[:, j].abs().mean() / form.b[:, j].abs().mean()) <= clamp * (1 + 1e-9)
        expected = free[:, j] * min(1.0, clamp / ratio)
        torch.testing.assert_close(clamped[:, j], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("clamp", [None, 3.0])
@pytest.mark.parametrize("method", ["projection", "covariance"])
def test_an_untrained_adapter_is_left_alone(method: str, clamp: float | None) -> None:
    delta, lora_a, _ = case(0, (6, 8, 3))
    gram = spd(1, 8) if method == "covariance" else None
    _, applied, corrected = run(delta, lora_a, torch.zeros(6, 3), method, 2.0, gram=gram, clamp=clamp)
    assert not applied.any()
    assert not corrected.lora_b.any()


def test_an_untrained_direction_is_left_alone_beside_trained_ones() -> None:
    lora_a = torch.eye(8, dtype=torch.float64)[:3] * torch.tensor([[3.0], [2.0], [1.0]], dtype=torch.float64)
    lora_b = normal(0, 6, 3)
    lora_b[:, 1] = 0
    form, applied, _ = run(normal(1, 6, 8), lora_a, lora_b, "projection", 1.0)
    untrained = form.b.abs().mean(dim=0) == 0
    assert untrained.tolist() == [False, True, False]
    assert applied[:, ~untrained].abs().sum(dim=0).min() > 0
    assert not applied[:, untrained].any()


# What goes into the file.


@given(seeds, sizes)
def test_padding_keeps_r_and_the_update(seed: int, size: tuple[int, int, int]) -> None:
    _, lora_a, lora_b = case(seed, size)
    lora_a = torch.cat([lora_a, lora_a[:1]])  # a dependent row: k < r
    lora_b = torch.cat([lora_b, lora_b[:, :1]], dim=1)
    form = canonical_form(lora_a, lora_b)
    corrected = apply_correction(form, torch.zeros_like(form.b), len(lora_a))
    assert corrected.lora_a.shape == lora_a.shape
    assert corrected.lora_b.shape == lora_b.shape
    assert corrected.lora_a.dtype == corrected.lora_b.dtype == torch.float32
    product = corrected.lora_b.double() @ corrected.lora_a.double()
    torch.testing.assert_close(product, lora_b @ lora_a, rtol=1e-5, atol=1e-5)
    assert not corrected.lora_a[form.q.shape[1] :].any()


# What is left.


@given(seeds, sizes, scales, st.booleans(), st.sampled_from([0.0, 0.5, 1.0]))
@example(1, (2, 4, 4), 0.25, False, 1.0)  # of which nothing is left
def test_shortfall_is_the_norm_itself(
    seed: int, size: tuple[int, int, int], scale: float, with_gram: bool, strength: float
) -> None:
    delta, lora_a, lora_b = case(seed, size)
    gram = spd(seed + 4, size[1]) if with_gram else None
    form, applied, _ = run(delta, lora_a, lora_b, "projection", scale, gram=gram, strength=strength)
    missed = delta - scale * applied @ form.q.T
    root = torch.eye(size[1], dtype=torch.float64) if gram is None else torch.linalg.cholesky(gram)
    expected, whole = (float(torch.linalg.matrix_norm(m @ root)) ** 2 for m in (missed, delta))
    found = shortfall(see(delta, form.q, gram), applied, scale) ** 2
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6 * whole)  # what is left of a sum in float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [None, 5])
def test_what_is_seen_in_chunks_equals_the_plain_products(dtype: torch.dtype, rank: int | None) -> None:
    weight = normal(0, 2500, 12).to(dtype)  # more rows than one chunk
    left, right = normal(3, 2500, rank or 12).to(dtype), None if rank is None else normal(4, rank, 12).to(dtype)
    stored = StoredWeight(left, right)
    delta = weight.double() - (left.double() if right is None else left.double() @ right.double())
    gram, q = spd(1, 12).float(), torch.linalg.qr(normal(2, 12, 3)).Q
    seen = difference(weight, stored, q, gram.double() @ q)
    torch.testing.assert_close(seen.delta_q, delta @ q)
    torch.testing.assert_close(seen.delta_gq, delta @ gram.double() @ q)
    torch.testing.assert_close(seen.inner, q.T @ gram.double() @ q)
    assert residual_energy(weight, stored, gram) == pytest.approx(energy_of(delta, gram), rel=1e-5)
    damped = gram + 0.5 * torch.eye(12)
    assert residual_energy(weight, stored, gram, 0.5) == pytest.approx(energy_of(delta, damped), rel=1e-5)
    assert residual_energy(weight, stored) == pytest.approx(energy_of(delta), rel=1e-5)


@given(seeds, sizes, st.floats(0.01, 10))
def test_the_energy_of_healed_factors_follows_from_what_was_joined(
    seed: int, size: tuple[int, int, int], strength: float
) -> None:
    delta, down, up = case(seed, size)
    up, gram = strength * up, spd(seed + 4, size[1])
    healed = delta - up @ down
    found = energy_with(energy_of(delta, gram), up, healed @ gram @ down.T, down @ gram @ down.T)
    assert found == pytest.approx(energy_of(healed, gram), rel=1e-9)


@given(seeds, sizes, st.floats(1e-6, 10))
def test_shortfall_is_under_the_damped_gram(seed: int, size: tuple[int, int, int], damping: float) -> None:
    delta, lora_a, lora_b = case(seed, size)
    gram = spd(seed + 4, size[1], tokens=2)  # of low rank: what is left may be all by damping
    damped = gram + damping * torch.eye(size[1], dtype=torch.float64)
    form, applied, _ = run(delta, lora_a, lora_b, "covariance", 2.0, gram=gram)
    stored = StoredWeight(torch.zeros_like(delta))
    seen = difference(delta, stored, form.q, gram @ form.q, energy=energy_of(delta, damped), damping=damping)
    missed = delta - 2.0 * applied @ form.q.T
    expected = energy_of(missed, damped) ** 0.5
    assert shortfall(seen, applied, 2.0) == pytest.approx(
        expected, rel=1e-5, abs=1e-6 * energy_of(delta, damped) ** 0.5
    )


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_the_sizes_of_a_and_b_change_nothing_where_their_product_is_the_same(size: float) -> None:
    _, lora_a, lora_b = case(3, (7, 9, 3))
    form, expected = canonical_form(size * lora_a, lora_b / size), canonical_form(lora_a, lora_b)
    torch.testing.assert_close(form.b @ form.q.T, expected.b @ expected.q.T)
    torch.testing.assert_close(form.b @ form.q.T, lora_b @ lora_a)
