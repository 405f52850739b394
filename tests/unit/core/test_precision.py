"""Products of float32 are of float32 where it matters, whatever torch was set to before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from float32_products import Float32Products

from emloc_ray.core.gram import Gram
from emloc_ray.core.precision import exact_float32

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


def test_a_gram_s_products_are_exact() -> None:
    torch.set_float32_matmul_precision("high")
    with Float32Products() as products:
        Gram.zero(8).update(torch.ones(3, 8))
    assert set(products.precisions) == {"highest"}
    assert torch.get_float32_matmul_precision() == "high"
