"""Products of float32 are of float32 where it matters, whatever torch was set to before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from float32_products import Float32Products
from torch import Tensor

from emloc_ray.core.correction import residual_energy
from emloc_ray.core.factorization import factorize, relative_error
from emloc_ray.core.forms import Form
from emloc_ray.core.gram import Gram, GramColumns
from emloc_ray.core.merging import merged_rows, squared_row_norms
from emloc_ray.core.precision import exact_float32
from emloc_ray.core.predicted_loss import form_losses
from emloc_ray.core.quantization import quantize, quantize_factors, quantize_with_factors
from emloc_ray.core.spectra import plain_gains, spectrum
from emloc_ray.core.stored_weight import StoredWeight
from emloc_ray.core.two_sided import factorize_two_sided
from emloc_ray.core.updates import KroneckerUpdate, LowRankUpdate
from emloc_ray.core.whitening import Whitening

MATMUL: Any = torch.backends.cuda.matmul
WAYS: dict[str, Callable[[], None]] = {
    "untouched": lambda: None,
    "allow_tf32": lambda: setattr(MATMUL, "allow_tf32", True),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "fp32_precision": lambda: setattr(MATMUL, "fp32_precision", "tf32"),
    "fp32_precision of all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


def settings() -> list[Any]:
    """All that torch can be asked; what it refuses to answer, as that."""
    found: list[Any] = [MATMUL.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]  # type: ignore[attr-defined]
    for ask in (torch.get_float32_matmul_precision, lambda: MATMUL.allow_tf32):
        try:
            found.append(ask())
        except RuntimeError:
            found.append("refused")
    return found


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = torch.backends.fp32_precision  # type: ignore[attr-defined]
    with exact_float32():  # sets back what it found
        yield
        torch.backends.fp32_precision = before  # type: ignore[attr-defined]


@pytest.mark.parametrize("way", WAYS)
def test_it_is_exact_inside_and_as_before_after(way: str) -> None:
    WAYS[way]()
    before = settings()
    with exact_float32():
        assert settings() == ["ieee", "ieee", "highest", False]
    assert settings() == before
    with pytest.raises(ZeroDivisionError), exact_float32():
        raise ZeroDivisionError
    assert settings() == before


@pytest.mark.parametrize("way", WAYS)
def test_it_is_exact_until_the_last_of_two_threads_leaves(way: str) -> None:
    """Their blocks overlap: the one that began first ends first."""
    WAYS[way]()
    before = settings()
    with contextlib.ExitStack() as second:
        with exact_float32():
            second.enter_context(exact_float32())
        assert settings() == ["ieee", "ieee", "highest", False]
    assert settings() == before


@pytest.mark.parametrize("before", ["none", "tf32", "ieee"])
def test_an_inherited_precision_is_inherited_again(before: str) -> None:
    backends: Any = torch.backends
    for matmul in (MATMUL, backends.mkldnn.matmul):
        matmul.fp32_precision = "none"
    backends.fp32_precision = before
    inherited = settings()
    Gram.zero(2).update(torch.ones(1, 2))
    assert settings() == inherited
    for after in ("tf32", "ieee"):
        backends.fp32_precision = after
        assert [MATMUL.fp32_precision, backends.mkldnn.matmul.fp32_precision] == [after, after]


def test_a_gram_s_products_are_exact() -> None:
    torch.set_float32_matmul_precision("high")
    with Float32Products() as products:
        Gram.zero(8).update(torch.ones(3, 8))
    assert set(products.precisions) == {"highest"}
    assert torch.get_float32_matmul_precision() == "high"


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, device="cpu", dtype=torch.float32)


def gram_of(features: int) -> Gram:
    gram = Gram.zero(features)
    gram.update(normal(3 * features, features, seed=features))
    return gram


def columns_of(tokens: Tensor) -> Tensor:
    columns = GramColumns(normal(40, 3))
    columns.update(tokens)
    return columns.matrix


INPUTS, OUTPUTS, WEIGHT = gram_of(40), gram_of(30), normal(30, 40)
TALL = normal(320, 300) @ torch.diag(torch.logspace(0, -5, 300))
FACTORS = factorize(WEIGHT, INPUTS, 5).factors
PRODUCT = FACTORS.up @ FACTORS.down
FORMS = [Form(), Form(4), Form(bits=4), Form(4, bits=8), Form(bits=3, residual_rank=4)]
KRONECKER = KroneckerUpdate(normal(5, 8), normal(6, 5), 2.0)
# Each with a whitening of its own, whose root and copies are made where they are first asked for.
COMPUTED: dict[str, Callable[[], Any]] = {
    "Gram": lambda: gram_of(40).matrix,
    "GramColumns": lambda: columns_of(normal(50, 40)),
    "diagonal": lambda: Whitening.identity(40).diagonal(),
    "root_by_energy": lambda: Whitening.identity(40).root_by_energy(1e-2),
    "identity": lambda: factorize(WEIGHT, Whitening.identity(40), 5).factors,
    "exact": lambda: factorize(WEIGHT, INPUTS, 5, solver="exact").factors,
    "exact, tall": lambda: factorize(WEIGHT.T, OUTPUTS, 5, solver="exact").factors,
    "subspace": lambda: factorize(WEIGHT, INPUTS, 5, solver="subspace").factors,
    "products": lambda: factorize(WEIGHT, INPUTS, 5, solver="products").factors,
    "keyword": lambda: factorize(weight=WEIGHT, whitening=INPUTS, rank=5).factors,
    "two-sided": lambda: factorize_two_sided(WEIGHT, Whitening(INPUTS), Whitening(OUTPUTS), 5).factors,
    "relative_error": lambda: relative_error(WEIGHT, PRODUCT, Whitening(INPUTS)),
    "quantize": lambda: quantize(WEIGHT, Whitening(INPUTS), 4).codes,
    "quantize by weights": lambda: quantize(WEIGHT, Whitening.identity(40), 4).tensors(torch.float16),
    "quantize_factors": lambda: [part.codes for part in quantize_factors(FACTORS, WEIGHT, Whitening(INPUTS), 4)],
    "quantize_with_factors": lambda: [
        part.codes for part in quantize_with_factors(WEIGHT, Whitening(INPUTS), 4, 3, 8, outputs=Whitening(OUTPUTS))
    ],
    "spectrum": lambda: spectrum(WEIGHT, Whitening(INPUTS), Whitening(OUTPUTS)),
    "plain_gains": lambda: plain_gains(WEIGHT, Whitening(INPUTS), Whitening(OUTPUTS)),
    "form_losses": lambda: form_losses(WEIGHT, Whitening(INPUTS), Whitening(OUTPUTS), FORMS),
    "residual_energy": lambda: residual_energy(WEIGHT, StoredWeight(*FACTORS), INPUTS.symmetric()),
    "merged_rows": lambda: merged_rows(WEIGHT, LowRankUpdate(normal(4, 40), normal(30, 4))),
    "merged_rows of LoKr": lambda: merged_rows(WEIGHT, KRONECKER),
    "squared_row_norms": lambda: squared_row_norms([(0, WEIGHT)], KRONECKER),
    "drawn numbers": lambda: factorize(TALL, Whitening.identity(300), 9, solver="products").factors,
    "drawn for Krylov spaces": lambda: factorize(TALL, Whitening.identity(300), 9, solver="subspace").factors,
}


@pytest.mark.parametrize("name", COMPUTED)
def test_what_is_computed_is_exact_whatever_the_caller_set(name: str) -> None:
    expected = COMPUTED[name]()
    torch.set_float32_matmul_precision("high")
    with Float32Products() as products:
        COMPUTED[name]()
    assert set(products.precisions) <= {"highest"}
    assert torch.get_float32_matmul_precision() == "high"
    with torch.autocast("cpu", torch.bfloat16):
        computed = COMPUTED[name]()
        assert torch.is_autocast_enabled("cpu")
    torch.testing.assert_close(computed, expected, rtol=0, atol=0)


@pytest.fixture
def defaults() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)
    torch.set_default_device(None)


@pytest.mark.usefixtures("defaults")
@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.device("meta")], ids=str)
def test_what_is_computed_does_not_depend_on_defaults(default: torch.dtype | torch.device, name: str) -> None:
    expected = COMPUTED[name]()
    if isinstance(default, torch.dtype):
        torch.set_default_dtype(default)
    else:
        torch.set_default_device(default)
    computed = COMPUTED[name]()
    torch.set_default_device(None)
    torch.testing.assert_close(computed, expected, rtol=0, atol=0)
