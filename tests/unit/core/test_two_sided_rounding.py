"""Rounding by columns and rows: against every rounding there is on tiny layers, one weight at a time, and on ugly sums."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from emloc_ray.core.integers import IntegerWeight, scale_values, zero_values
from emloc_ray.core.quantization import DAMPENING_FRAC, quantize, quantize_factors, quantize_with_factors
from emloc_ray.core.two_sided import factorize_two_sided
from emloc_ray.core.two_sided_rounding import OUTPUT_DAMPENING_FRAC, by_planes_of_both, fed_back, row_weights
from emloc_ray.core.whitening import Whitening


def sums(order: int, decay: float = 2.0, seed: int = 0, tokens: int | None = None) -> Tensor:
    """Of vectors with a skewed spectrum in no axis's direction."""
    generator = torch.Generator().manual_seed(seed)
    turned = torch.linalg.qr(torch.randn(order, order, generator=generator)).Q
    vectors = torch.randn(tokens or 8 * order, order, generator=generator)
    vectors = vectors * torch.exp(-decay * torch.arange(order) / order) @ turned
    return vectors.T @ vectors


def lost(weight: Tensor, made: Tensor, gram: Tensor, outputs: Tensor) -> float:
    """``tr(S Δ G Δᵀ)`` without damping."""
    difference = (weight - made).double()
    return float(((outputs.double() @ difference) * (difference @ gram.double())).sum())


def one_at_a_time(weight: Tensor, inputs: Whitening, outputs: Whitening, grid: IntegerWeight) -> Tensor:
    """Codes by the formula of the module, in float64: each weight's target from all that were rounded before it."""
    columns, rows = (w.matrix(torch.float64).diagonal().argsort(stable=True) for w in (inputs, outputs))

    def unit(whitening: Whitening, order: Tensor, frac: float) -> Tensor:
        sums = whitening.matrix(torch.float64)[order][:, order].clone()
        sums.diagonal().add_(frac - whitening.dampening_frac)
        root = torch.linalg.cholesky(sums)
        return root / root.diagonal()

    right, left = unit(inputs, columns, DAMPENING_FRAC), unit(outputs, rows, OUTPUT_DAMPENING_FRAC)
    scales = scale_values(grid.scales, grid.exponent).double()[:, torch.arange(weight.shape[1]) // grid.group_size]
    zeros = zero_values(grid.zeros, grid.bits).double()[:, torch.arange(weight.shape[1]) // grid.group_size]
    w, s, z = (part[rows][:, columns] for part in (weight.double(), scales, zeros))
    difference, seen, codes = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w)
    for i, k in itertools.product(reversed(range(w.shape[0])), reversed(range(w.shape[1]))):
        from_columns = difference[i, k + 1 :] @ right[k + 1 :, k]
        target = w[i, k] + from_columns + left[i + 1 :, i] @ seen[i + 1 :, k]
        codes[i, k] = (target / s[i, k] + z[i, k]).round().clamp(0, 2**grid.bits - 1)
        difference[i, k] = w[i, k] - (codes[i, k] - z[i, k]) * s[i, k]
        seen[i, k] = difference[i, k] + from_columns
    made = torch.empty_like(codes)
    made[rows[:, None], columns[None]] = codes
    return made.to(torch.uint8)


@pytest.mark.parametrize("shape", [(70, 133), (64, 64), (5, 200), (130, 3)])
def test_blocks_and_diagonals_give_what_one_weight_after_the_other_does(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    weight, inputs, outputs = torch.randn(shape), Whitening(sums(shape[1])), Whitening(sums(shape[0], seed=1), 1e-2)
    grid = quantize(weight, inputs, 3, 32)
    codes = by_planes_of_both(weight, inputs, outputs, grid, DAMPENING_FRAC)
    expected = one_at_a_time(weight, inputs, outputs, grid)
    assert float((codes != expected).float().mean()) < 0.01  # ties, decided by float32's rounding
    of_both = [
        lost(weight, grid.with_codes(c).dense(), sums(shape[1]), sums(shape[0], seed=1)) for c in (codes, expected)
    ]
    assert of_both[0] == pytest.approx(of_both[1], rel=0.01)


def test_a_tiny_layer_is_rounded_nearly_as_well_as_can_be() -> None:
    excess, excess_of_one_side = [], []
    every_code = torch.tensor(list(itertools.product(range(4), repeat=6)), dtype=torch.uint8).view(-1, 2, 3)
    for seed in range(20):
        torch.manual_seed(seed)
        weight, gram, outputs = torch.randn(2, 3), sums(3, 3.0, seed), sums(2, 4.0, seed + 100)
        made, alone = (quantize(weight, Whitening(gram), 2, outputs=o) for o in (Whitening(outputs, 1e-2), None))
        assert torch.equal(made.scales, alone.scales)
        least = min(lost(weight, made.with_codes(code).dense(), gram, outputs) for code in every_code)
        both, one = (lost(weight, part.dense(), gram, outputs) for part in (made, alone))
        assert both >= least * (1 - 1e-6)
        excess.append(both / least)
        excess_of_one_side.append(one / least)
    assert sum(excess) < sum(excess_of_one_side)
    assert sorted(excess)[10] < 1.3


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_less_is_lost_of_the_predictions_than_under_the_inputs_alone(bits: int) -> None:
    torch.manual_seed(bits)
    weight, gram, outputs = torch.randn(96, 128), sums(128, 3.0), sums(96, 6.0, seed=1)
    inputs, weighing = Whitening(gram), Whitening(outputs, 1e-2)
    both, alone = quantize(weight, inputs, bits, 32, outputs=weighing), quantize(weight, inputs, bits, 32)
    assert lost(weight, both.dense(), gram, outputs) < 0.75 * lost(weight, alone.dense(), gram, outputs)


def test_factors_and_what_lies_beside_integers_lose_less_too() -> None:
    torch.manual_seed(3)
    weight, gram, outputs = torch.randn(96, 128), sums(128, 3.0), sums(96, 6.0, seed=1)
    inputs, weighing = Whitening(gram), Whitening(outputs, 1e-2)
    factors = factorize_two_sided(weight, inputs, weighing, 40).factors
    rounded = [quantize_factors(factors, weight, inputs, 3, 32, outputs=o) for o in (weighing, None)]
    both, alone = (lost(weight, up.dense() @ down.dense(), gram, outputs) for up, down in rounded)
    assert both < alone
    whole, up, down = quantize_with_factors(weight, inputs, 2, 8, 4, 32, outputs=weighing)
    made = quantize(weight, inputs, 2, 32, outputs=weighing).dense()
    beside = lost(weight, whole.dense() + up.dense() @ down.dense(), gram, outputs)
    assert beside < lost(weight, made, gram, outputs)


def test_without_gradients_it_is_rounding_under_the_inputs() -> None:
    torch.manual_seed(0)
    weight, inputs = torch.randn(16, 64), Whitening(sums(64))
    silent = quantize(weight, inputs, 3, outputs=Whitening(torch.zeros(16, 16), 1e-2))
    assert torch.equal(silent.codes, quantize(weight, inputs, 3).codes)


@pytest.mark.parametrize(
    ("gram", "outputs"),
    [
        (sums(100), sums(40, tokens=3)),
        (sums(100, tokens=5), sums(40)),
        (sums(100, 12.0), sums(40, 12.0)),
        (torch.zeros(100, 100), sums(40)),
        (sums(100) * 1e30, sums(40) * 1e-30),
    ],
    ids=["gradients of three tokens", "five tokens", "huge spreads", "no token", "sums of all sizes"],
)
def test_ugly_sums(gram: Tensor, outputs: Tensor) -> None:
    torch.manual_seed(5)
    weight, weighing = torch.randn(40, 100, dtype=torch.bfloat16), Whitening(outputs, 1e-2)
    made = quantize(weight, Whitening(gram), 4, outputs=weighing).dense()
    assert torch.isfinite(made).all()
    metric = gram if bool(gram.any()) else torch.eye(100)
    unit_gram, unit_sums = metric / metric.diagonal().mean(), outputs / outputs.diagonal().mean()
    assert lost(weight, made, unit_gram, unit_sums) < 0.02 * lost(weight, torch.zeros(40, 100), unit_gram, unit_sums)


def test_independent_errors_lose_what_the_rows_count_by() -> None:
    outputs = Whitening(sums(30, 5.0, seed=2), 1e-2)
    weights = row_weights(outputs)
    matrix = outputs.matrix(torch.float64)
    for row in (0, 7, 29):
        error = torch.zeros(30, 1)
        error[row] = 1.0
        spread = fed_back(error, outputs).double()
        assert float((matrix @ spread * spread).sum()) == pytest.approx(float(weights[row]), rel=1e-4)
    assert float(weights.mean()) < float(matrix.diagonal().mean())
