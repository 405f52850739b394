"""The Gram accumulator is a monoid, and padding never counts; the packed triangle loses nothing."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emloc_ray.core import gram as gram_module
from emloc_ray.core.gram import (
    Gram,
    GramColumns,
    TokenSum,
    gather_triangle,
    not_finite,
    packed_triangle,
    unpack_triangle,
)

FEW = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31 - 1)


def tokens_of(seed: int, count: int, features: int) -> Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram_of(tokens: Tensor, dtype: torch.dtype = torch.float64) -> Gram:
    gram = Gram.zero(tokens.shape[1], dtype)
    gram.update(tokens)
    return gram


def assert_same(left: Gram, right: Gram) -> None:
    torch.testing.assert_close(left.symmetric(), right.symmetric(), rtol=1e-12, atol=1e-12)
    assert left.num_tokens == right.num_tokens


@FEW
@given(seeds, st.integers(0, 40), st.integers(1, 30), st.integers(1, 17))
def test_is_the_sum_of_outer_products_for_any_block_size(seed: int, count: int, features: int, block: int) -> None:
    tokens = tokens_of(seed, count, features)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram_module, "BLOCK", block)
        gram = gram_of(tokens)
    expected = torch.einsum("ni,nj->ij", tokens, tokens)
    torch.testing.assert_close(gram.symmetric(), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(gram.symmetric(), gram.symmetric().T)
    assert gram.num_tokens == count


@pytest.mark.parametrize("features", [255, 256, 257, 600])
def test_widths_around_the_block_size(features: int) -> None:
    tokens = tokens_of(0, 70, features)
    torch.testing.assert_close(gram_of(tokens).symmetric(), tokens.T @ tokens, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("total", [Gram.zero(600), GramColumns(torch.eye(600, 3))])
@pytest.mark.parametrize("shape", [(5, 96), (5, 100), (2, 5, 192), (5, 700), (5, 1), ()])
def test_activations_of_another_width_are_refused_whole(total: TokenSum, shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=rf"^activations of the shape {re.escape(str(shape))} do not end in the 600 feat"
    ):
        total.update(torch.ones(shape))
    assert total.num_tokens == 0
    assert not total.matrix.any()


@FEW
@given(seeds, st.integers(1, 12), st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_grouping_does_not_matter(seed: int, features: int, counts: list[int]) -> None:
    parts = [tokens_of(seed + i, count, features) for i, count in enumerate(counts)]
    stepwise = Gram.zero(features, torch.float64)
    for part in parts:
        stepwise.update(part)
    assert_same(stepwise, gram_of(torch.cat(parts)))


def test_half_precision_activations_are_summed_in_the_grams_dtype() -> None:
    tokens = tokens_of(0, 3000, 5).to(torch.bfloat16)
    gram = Gram.zero(5)
    gram.update(tokens)
    wide = tokens.to(torch.float64)
    assert gram.matrix.dtype == torch.float32
    torch.testing.assert_close(gram.symmetric().to(torch.float64), wide.T @ wide, rtol=1e-4, atol=1e-2)


def test_update_takes_no_gradient() -> None:
    gram = Gram.zero(3)
    gram.update(torch.ones(2, 3, requires_grad=True))
    assert not gram.matrix.requires_grad


@FEW
@given(seeds, st.integers(1, 40))
def test_triangle_round_trip(seed: int, n: int) -> None:
    matrix = gram_of(tokens_of(seed, 7, n)).symmetric()
    packed = torch.cat([*packed_triangle(matrix, 100)])
    assert packed.shape == (n * (n + 1) // 2,)
    assert torch.equal(unpack_triangle(packed), matrix)
    assert torch.equal(gather_triangle(packed, 100), matrix)  # as a GPU does


def test_packing_reads_the_lower_triangle_alone() -> None:
    gram = gram_of(tokens_of(0, 9, 300))
    assert torch.equal(unpack_triangle(torch.cat([*packed_triangle(gram.matrix)])), gram.symmetric())


@FEW
@given(seeds, st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 12), st.integers(0, 4))
def test_columns_are_those_of_the_gram_in_other_directions(seed: int, counts: list[int], features: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(features, k, generator=generator)
    gram, columns = Gram.zero(features), GramColumns(q)
    for count in counts:
        x = torch.randn(count, features, generator=generator)
        gram.update(x)
        columns.update(x)
    assert columns.num_tokens == gram.num_tokens
    torch.testing.assert_close(columns.matrix, gram.symmetric() @ q, rtol=1e-4, atol=1e-4)
    assert not_finite({"layer": columns}) is None
    if k:
        columns.update(torch.full((1, features), float("nan")))
        assert not_finite({"layer": columns}) == "layer"


def test_what_overflows_beside_the_diagonal_of_columns_is_found() -> None:
    columns = GramColumns(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    columns.update(torch.tensor([[1.0, 0.0, 1e30]]))
    assert not_finite({"layer": columns}) is None
    columns.update(torch.tensor([[1e10, 0.0, 1e30]]))  # 1e40 in the last row, where there is no diagonal
    assert not_finite({"layer": columns}) == "layer"
