"""Updates of every form against their dense formula: rows, transposed rows, and the dominant subspace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from emloc_ray.core.correction import apply_correction, canonical_form, correction, difference
from emloc_ray.core.merging import merged_rows, squared_row_norms
from emloc_ray.core.products import row_norms, seen_rows
from emloc_ray.core.stored_weight import StoredWeight
from emloc_ray.core.updates import HadamardUpdate, KroneckerUpdate, LowRankUpdate, Update

GENERATOR = torch.Generator().manual_seed(3)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def cases() -> dict[str, tuple[Update, Tensor]]:
    """An update and its dense ``(out, in)`` in float64, by PEFT's formulas."""
    a, b = random(4, 30), random(24, 4)
    w1_a, w1_b, w2_a, w2_b = random(24, 2), random(2, 30), random(24, 2), random(2, 30)
    wide = [random(24, 6), random(6, 30), random(24, 6), random(6, 30)]  # r² above the smaller side
    w1, w2 = random(4, 5), random(6, 6)
    return {
        "low rank": (LowRankUpdate(a, b, 0.5), 0.5 * b.double() @ a.double()),
        "hadamard": (
            HadamardUpdate(w1_a, w1_b, w2_a, w2_b, 2.0),
            2 * (w1_a.double() @ w1_b.double()) * (w2_a.double() @ w2_b.double()),
        ),
        "hadamard of full rank": (
            HadamardUpdate(wide[0], wide[1], wide[2], wide[3], 0.3),
            0.3 * (wide[0].double() @ wide[1].double()) * (wide[2].double() @ wide[3].double()),
        ),
        "kronecker": (KroneckerUpdate(w1, w2, 1.5), 1.5 * torch.kron(w1.double(), w2.double())),
    }


CASES = cases()


@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_the_dense_update(name: str) -> None:
    update, dense = CASES[name]
    assert update.shape == tuple(dense.shape)
    for transposed, expected in ((False, dense), (True, dense.T)):
        for first, last in ((0, 1), (3, 17), (0, expected.shape[0])):
            found = update.rows(first, last, transposed)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), expected[first:last], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tolerance", [0.0, 1e-3, 0.3])
def test_the_dominant_subspace_is_the_truncated_svd_at_the_tolerance(name: str, tolerance: float) -> None:
    update, dense = CASES[name]
    found = update.dominant(tolerance)
    product = found.lora_b @ found.lora_a
    k = found.lora_a.shape[0]
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    torch.testing.assert_close(product, u[:, :k] * s[:k] @ vh[:k], rtol=1e-6, atol=1e-6 * float(s[0]))
    lack = float((dense - product).norm() / dense.norm())
    assert lack <= tolerance + 1e-7
    assert found.error == pytest.approx(lack, abs=1e-7)
    if k > 1:  # one direction fewer would not do
        assert float(s[k - 1 :].norm() / s.norm()) > tolerance
    eye = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(found.lora_a @ found.lora_a.T, eye, rtol=0, atol=1e-9)


def test_a_hadamard_of_small_r_has_rank_r_squared() -> None:
    assert CASES["hadamard"][0].dominant(0.0).lora_a.shape[0] == 4
    assert CASES["hadamard of full rank"][0].dominant(0.0).lora_a.shape[0] == 24


@pytest.mark.parametrize(
    "update", [KroneckerUpdate(torch.zeros(2, 3), random(4, 4), 1.0), LowRankUpdate(random(2, 9), torch.zeros(7, 2))]
)
def test_an_untrained_update_has_one_direction_and_no_weight(update: Update) -> None:
    found = update.dominant(1e-3)
    assert found.lora_a.shape[0] == 1
    assert not found.lora_b.any()
    assert found.error == 0
    assert bool(torch.isfinite(found.lora_a).all())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bit_of_a_merge_depends_on_the_chunks(name: str, transposed: bool, dtype: torch.dtype) -> None:
    update, dense = CASES[name]
    stored = random(*(dense.T if transposed else dense).shape).to(dtype)
    whole = merged_rows(stored, update, 0, transposed)
    torch.testing.assert_close(
        whole.float(), (stored.double() + (dense.T if transposed else dense)).to(dtype).float(), rtol=1e-2, atol=1e-2
    )
    for step in (1, 5, 11):
        parts = [merged_rows(stored[at : at + step], update, at, transposed) for at in range(0, len(stored), step)]
        assert torch.equal(torch.cat(parts), whole)


def test_row_norms_from_thin_products() -> None:
    weight, (update, dense) = random(24, 30), CASES["low rank"]
    assert isinstance(update, LowRankUpdate)
    a, b = update.lora_a.double(), update.lora_b.double()
    base, cross = seen_rows(weight, a.T)
    expected = torch.linalg.norm(weight.double() + dense, dim=1)
    torch.testing.assert_close(row_norms(base, cross, a, b, update.scale), expected, rtol=1e-9, atol=1e-9)
    for transposed in (False, True):
        stored = weight.T if transposed else weight
        chunks = [(at, stored[at : at + 7]) for at in range(0, len(stored), 7)]
        found = squared_row_norms(chunks, update, transposed).sqrt()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gains_along_rows_columns_and_of_a_vector() -> None:
    weight, rows, columns = random(6, 4), random(6), random(4)
    assert torch.equal(merged_rows(weight, None, gains=rows), weight * rows[:, None])
    assert torch.equal(merged_rows(weight[2:5], None, 2, gains=rows), (weight * rows[:, None])[2:5])
    assert torch.equal(merged_rows(weight[2:5], None, 2, gains=columns, along_rows=False), (weight * columns)[2:5])
    assert torch.equal(merged_rows(weight[:, 0], None, gains=rows), weight[:, 0] * rows)


def test_a_full_rank_update_is_corrected_as_the_dense_formula_says() -> None:
    """Projection: on the update's row space ``R``, ``W + ΔW_c`` does what ``W_E + ΔW`` did: ``ΔW_c = ΔW − Δ P_R``."""
    update, dense = CASES["kronecker"]
    delta = random(*dense.shape)
    found = update.dominant(0.0)
    form = canonical_form(found.lora_a, found.lora_b)
    taken = correction(difference(delta, StoredWeight(torch.zeros_like(delta)), form.q), "projection", 1.0)
    corrected = apply_correction(form, taken, found.lora_a.shape[0])
    _, s, vh = torch.linalg.svd(dense, full_matrices=False)
    space = vh[: int((s > 1e-9 * s[0]).sum())]
    expected = dense - delta.double() @ space.T @ space
    torch.testing.assert_close((corrected.lora_b @ corrected.lora_a).double(), expected, rtol=1e-4, atol=1e-4)
