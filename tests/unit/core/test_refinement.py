"""What a block's factors are fitted by: balanced factors, steps that fall to 0, and errors of the tokens that count."""

from __future__ import annotations

import math

import pytest
import torch

from emloc_ray.core.refinement import balanced, step_size, token_error


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]))


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_balanced_factors_are_the_same_product_in_one_scale(scale: float) -> None:
    up, down = numbers(12, 5) * scale, numbers(5, 9) / scale
    left, right = balanced(up, down)
    torch.testing.assert_close(left @ right, up @ down, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(left.T @ left, right @ right.T, rtol=1e-5, atol=1e-5)
    assert left.dtype == right.dtype == torch.float32


def test_a_product_of_lower_rank_stays_what_it_is() -> None:
    up, down = numbers(6, 4), numbers(4, 8)
    up[:, 3] = up[:, 2]
    left, right = balanced(up, down)
    assert left.shape == up.shape
    torch.testing.assert_close(left @ right, up @ down, rtol=1e-5, atol=1e-5)


def test_steps_rise_then_fall_to_nothing() -> None:
    sizes = [step_size(step, 40) for step in range(41)]
    assert sizes[0] < sizes[3]
    assert max(sizes) <= 1
    assert sizes[5:] == sorted(sizes[5:], reverse=True)
    assert sizes[-1] == pytest.approx(0, abs=1e-12)


def test_the_error_is_of_the_tokens_that_count() -> None:
    given, wanted = numbers(2, 3, 4).bfloat16(), numbers(2, 3, 4)
    counted = torch.tensor([[True, False, True], [False, False, True]])
    expected = 0.0
    for row, place in counted.nonzero().tolist():
        pairs = [(float(a), float(b)) for a, b in zip(given[row, place], wanted[row, place], strict=True)]
        expected += sum((a - b) ** 2 for a, b in pairs) / sum(b**2 for _, b in pairs)
    assert float(token_error(given, wanted, counted)) == pytest.approx(expected, rel=1e-5)
    assert float(token_error(2 * wanted, wanted)) == pytest.approx(6)
    assert float(token_error(torch.zeros(2, 4), torch.zeros(2, 4))) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_that_does_not_count_is_in_no_gradient(dtype: torch.dtype) -> None:
    values, wanted, counted = (
        numbers(5, 4).to(dtype),
        numbers(5, 4) + 1,
        torch.tensor([True, False, False, False, True]),
    )
    plain = values.clone().requires_grad_()
    expected = token_error(plain[counted], wanted[counted])
    values[1], wanted[2], wanted[3] = math.nan, math.nan, math.inf
    given = values.requires_grad_()
    error = token_error(given, wanted, counted)
    assert torch.equal(error, expected)
    error.backward()
    expected.backward()
    torch.testing.assert_close(given.grad, plain.grad, rtol=0, atol=0)
