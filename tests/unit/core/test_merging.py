"""Merging by row chunks is merging the whole: not one bit may depend on where the chunks are cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emloc_ray.core.merging import merged_rows
from emloc_ray.core.updates import LowRankUpdate


def case(dtype: torch.dtype, out_features: int = 200, in_features: int = 131, r: int = 5) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    return weight, torch.randn(r, in_features, generator=generator), torch.randn(out_features, r, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
@given(step=st.integers(1, 210))
def test_chunked_equals_whole_bit_for_bit(dtype: torch.dtype, transposed: bool, step: int) -> None:
    weight, lora_a, lora_b = case(dtype)
    stored = weight.T.contiguous() if transposed else weight
    update = LowRankUpdate(lora_a, lora_b, 0.7)
    whole = merged_rows(stored, update, transposed=transposed)
    parts = [
        merged_rows(stored[begin : begin + step], update, begin, transposed) for begin in range(0, len(stored), step)
    ]
    assert torch.equal(torch.cat(parts), whole)
    formula = (weight.float() + 0.7 * (lora_b @ lora_a)).to(dtype)
    assert torch.equal(whole, formula.T if transposed else formula)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_it_is_the_formula_rounded_once(dtype: torch.dtype, transposed: bool) -> None:
    weight, lora_a, lora_b = case(dtype)
    merged = merged_rows(weight.T if transposed else weight, LowRankUpdate(lora_a, lora_b, 0.7), transposed=transposed)
    exact = weight.double() + 0.7 * lora_b.double() @ lora_a.double()
    exact = exact.T if transposed else exact
    torch.testing.assert_close(merged.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_small_updates_are_not_lost_to_a_narrow_adapter_dtype() -> None:
    weight = torch.ones(2, 2, dtype=torch.bfloat16)
    lora_a, lora_b = torch.full((1, 2), 0.1), torch.full((2, 1), 0.1)
    merged = merged_rows(weight, LowRankUpdate(lora_a, lora_b, 1.0))
    assert torch.equal(merged, torch.full((2, 2), 1.01).to(torch.bfloat16))
    assert merged[0, 0] != 1
