"""Rounding under a Gram: against every rounding there is on tiny layers, against the nearest one, and on ugly layers."""

import gc
import itertools

import pytest
import torch
from torch import Tensor

from emloc_ray.core.factorization import LowRankFactors, factorize
from emloc_ray.core.integers import IntegerWeight
from emloc_ray.core.quantization import quantize, quantize_factors, quantize_with_factors
from emloc_ray.core.whitening import Whitening
from emloc_ray.errors import NumericsError


def _gram(columns: int, tokens: int = 400, spread: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    x = mixed * torch.logspace(0, torch.tensor(spread).log10().item(), columns)
    return x.T @ x


def _lost(weight: Tensor, made: IntegerWeight, gram: Tensor) -> Tensor:
    """Of every row, in float64 and without damping."""
    difference = weight.double() - made.dense().double()
    return ((difference @ gram.double()) * difference).sum(dim=1)


def _error(weight: Tensor, made: Tensor, whitening: Whitening) -> float:
    return float(whitening.energy(weight - made) / whitening.energy(weight)) ** 0.5


def _nearest(weight: Tensor, made: IntegerWeight) -> IntegerWeight:
    """The nearest codes at the same scales, one element at a time."""
    every = torch.stack([made.with_codes(torch.full_like(made.codes, code)).dense() for code in range(2**made.bits)])
    return made.with_codes((every - weight.float()).abs().argmin(dim=0).to(torch.uint8))


def test_a_tiny_layer_is_rounded_nearly_as_well_as_can_be() -> None:
    excess, excess_of_nearest = [], []
    for seed in range(30):
        torch.manual_seed(seed)
        weight, gram = torch.randn(1, 4), _gram(4, seed=seed)
        made = quantize(weight, Whitening(gram), 2)
        codes = torch.tensor(list(itertools.product(range(4), repeat=4)), dtype=torch.uint8)
        every = [float(_lost(weight, made.with_codes(code[None]), gram)) for code in codes]
        lost, nearest = float(_lost(weight, made, gram)), float(_lost(weight, _nearest(weight, made), gram))
        assert lost >= min(every) * (1 - 1e-9)
        assert lost <= nearest * (1 + 1e-4)
        excess.append(lost / min(every))
        excess_of_nearest.append(nearest / min(every))
    assert sum(1 for value in excess if value < 1 + 1e-6) >= 15  # half of them are the best there is
    assert sum(excess) / 30 < 1.1 < 1.3 < sum(excess_of_nearest) / 30


def test_without_correlations_the_nearest_is_best() -> None:
    torch.manual_seed(0)
    weight, gram = torch.randn(5, 24), torch.diag(torch.rand(24) + 0.1)
    made = quantize(weight, Whitening(gram, 1e-9), 3)
    assert torch.equal(made.codes, _nearest(weight, made).codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hardly_a_code_can_be_moved_to_lose_less(bits: int) -> None:
    """Of each code alone, by one: the nearest planes leave 2 to 6 % that can, which the descent finds."""
    torch.manual_seed(bits)
    weight, gram = torch.randn(64, 96), _gram(96, seed=bits)
    made = quantize(weight, Whitening(gram), bits, 32)
    lost, gaining = _lost(weight, made, gram), 0
    for column in range(96):
        for step in (-1, 1):
            moved = made.codes.int()
            moved[:, column] = (moved[:, column] + step).clamp(0, 2**bits - 1)
            after = _lost(weight, made.with_codes(moved.to(torch.uint8)), gram)
            gaining += int((after < lost * (1 - 1e-5)).sum())
    assert gaining < 0.012 * weight.numel()


@pytest.mark.parametrize("bits", [2, 3])
def test_scales_clip_as_well_as_the_best_of_seventy_ranges(bits: int) -> None:
    """Of ranges as shares of a group's own, each with the nearest of its values; their own scales are stored in steps of 9 %,
    and fitted to the codes. With its own range alone a group loses a tenth more than by the best of them."""
    torch.manual_seed(bits)
    weight, energies = torch.randn(64, 96), torch.rand(96) + 0.1
    made = quantize(weight, Whitening(torch.diag(energies), 1e-9), bits, 32)
    groups, lost = weight.unflatten(1, (3, 32)), list[Tensor]()
    for share in torch.linspace(0.3, 1.0, 70):
        low, high = share * groups.amin(-1, keepdim=True), share * groups.amax(-1, keepdim=True)
        values = low + (high - low) * torch.arange(2**bits) / (2**bits - 1)
        away = (groups[..., None] - values[..., None, :]).abs().amin(-1)
        lost.append((away**2 * energies.unflatten(0, (3, 32))).sum(-1))
    best = torch.stack(lost).amin(0).sum()
    assert _lost(weight, made, torch.diag(energies)).sum() < best < 0.9 * lost[-1].sum()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_row_loses_more_than_by_rounding_to_the_nearest(bits: int) -> None:
    torch.manual_seed(bits)
    weight, gram = torch.randn(40, 96), _gram(96, spread=3.0)
    found = quantize(weight, Whitening(gram), bits, 32)
    lost, nearest = _lost(weight, found, gram), _lost(weight, _nearest(weight, found), gram)
    assert (lost <= nearest * (1 + 1e-3)).all()
    assert lost.sum() < 0.7 * nearest.sum()


def test_more_bits_lose_less() -> None:
    torch.manual_seed(0)
    weight, whitening = torch.randn(64, 128), Whitening(_gram(128))
    errors = [_error(weight, quantize(weight, whitening, bits).dense(), whitening) for bits in (2, 3, 4, 8)]
    assert errors[0] > 1.7 * errors[1] > 1.7**2 * errors[2] > 1.7**3 * errors[3]


def test_of_a_gram_no_more_is_held_than_its_damped_form_and_a_root() -> None:
    torch.manual_seed(0)
    whitening = Whitening(_gram(137))
    quantize(torch.randn(8, 137), whitening, 4)
    held = [part for part in gc.get_objects() if type(part) is Tensor and part.shape == (137, 137)]
    assert len({part.data_ptr() for part in held}) == 3


def test_in_8_bits_no_element_is_clipped() -> None:
    torch.manual_seed(0)
    for columns in (64, 8, 1):  # a group each; factors of a few ranks have narrow ones
        weight = torch.randn(64, columns)
        errors = (weight - quantize(weight, Whitening(torch.eye(columns)), 8).dense()).abs().amax(dim=1)
        steps = (weight.amax(dim=1).clamp_min(0) - weight.amin(dim=1).clamp_max(0)) / 255
        assert (errors < 0.8 * steps).all()


@pytest.mark.parametrize(
    ("name", "weight", "gram"),
    [
        ("fewer tokens than channels", torch.randn(16, 64), _gram(64, tokens=10)),
        ("channels 3,000 times the others", torch.randn(16, 64), _gram(64, spread=3000.0)),
        ("no token", torch.randn(16, 64), torch.zeros(64, 64)),
        ("bfloat16", torch.randn(16, 64, dtype=torch.bfloat16), _gram(64)),
        ("a last group that is shorter", torch.randn(16, 100), _gram(100)),
        ("an odd number of channels", torch.randn(3, 13), _gram(13)),
        ("weights of zero", torch.zeros(4, 64), _gram(64)),
        ("rows of all sizes", torch.randn(16, 64) * torch.logspace(-4, 4, 16)[:, None], _gram(64)),
        ("huge weights", torch.randn(16, 64) * 1e30, _gram(64)),
        ("tiny weights", torch.randn(16, 64) * 1e-30, _gram(64)),
        ("positive weights", torch.rand(16, 64) + 3, _gram(64)),
    ],
)
def test_ugly_layers(name: str, weight: Tensor, gram: Tensor) -> None:
    found = quantize(weight, Whitening(gram), 4, 64, name=name)
    dense = found.dense()
    wide, scale = weight.double(), weight.double().abs().max().clamp_min(1e-300)
    metric = gram.double() if bool(gram.any()) else torch.eye(len(gram), dtype=torch.float64)

    def energy(matrix: Tensor) -> float:
        return float(((matrix / scale @ metric) * (matrix / scale)).sum())

    assert torch.isfinite(dense).all()
    assert energy(wide - dense.double()) <= 0.02 * energy(wide) + 1e-12
    for row, part in zip(wide / scale, dense.double() / scale, strict=True):  # small rows as well as large ones
        difference = row - part
        assert difference @ metric @ difference <= 0.05 * (row @ metric @ row)


def test_channels_that_never_fire_do_not_widen_a_range() -> None:
    torch.manual_seed(0)
    weight, gram = torch.randn(8, 64), _gram(64)
    gram[7], gram[:, 7] = 0, 0
    plain = quantize(weight, Whitening(gram), 3)
    weight[:, 7] = 1e4
    outlier = quantize(weight, Whitening(gram), 3)
    live = torch.arange(64) != 7
    kept = outlier.dense()[:, live] - weight[:, live]
    assert torch.linalg.vector_norm(kept) < 1.5 * torch.linalg.vector_norm(plain.dense()[:, live] - weight[:, live])


def test_a_weight_that_is_not_finite_is_named() -> None:
    weight = torch.randn(4, 16)
    weight[1, 2] = float("nan")
    with pytest.raises(NumericsError, match=r"blocks\.0\.q"):
        quantize(weight, Whitening(_gram(16)), 4, name="blocks.0.q")


def test_what_there_is_no_such_thing_of() -> None:
    with pytest.raises(ValueError, match="5 bits"):
        quantize(torch.randn(4, 16), Whitening(_gram(16)), 5)
    with pytest.raises(ValueError, match="groups of 12"):
        quantize(torch.randn(4, 16), Whitening(_gram(16)), 4, 12)


def test_residual_factors_are_the_closed_form() -> None:
    """QERA-exact: the truncated SVD of ``(W − Q) G^½``, taken back by ``G^−½``."""
    torch.manual_seed(0)
    weight, gram = torch.randn(24, 32), _gram(32)
    whitening = Whitening(gram)
    found, up, down = quantize_with_factors(weight, whitening, 2, 4, 8)
    damped = gram.double() + 1e-6 * gram.double().diagonal().mean() * torch.eye(32, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(damped)
    root, inverse = (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T
    u, s, vh = torch.linalg.svd((weight.double() - found.dense().double()) @ root, full_matrices=False)
    wanted = (u[:, :4] * s[:4]) @ vh[:4] @ inverse
    difference = (up.dense() @ down.dense()).double() - wanted
    assert torch.linalg.vector_norm(difference) < 0.02 * torch.linalg.vector_norm(wanted)  # 8 bits


def test_factors_beside_integers_lower_the_error() -> None:
    torch.manual_seed(1)
    weight, whitening = torch.randn(64, 96), Whitening(_gram(96))
    errors = [_error(weight, quantize(weight, whitening, 2).dense(), whitening)]
    for rank in (4, 16, 64):
        found, up, down = quantize_with_factors(weight, whitening, 2, rank, 4)
        errors.append(_error(weight, found.dense() + up.dense() @ down.dense(), whitening))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize(("bits", "added"), [(4, 0.11), (8, 0.02)])
def test_factors_in_integers(bits: int, added: float) -> None:
    torch.manual_seed(2)
    weight, gram = torch.randn(96, 128) * torch.logspace(0, -2, 96)[:, None], _gram(128)
    whitening = Whitening(gram)
    wide = factorize(weight, whitening, 48)
    up, down = quantize_factors(LowRankFactors(*wide.factors), weight, whitening, bits)
    difference = weight - up.dense() @ down.dense()
    assert _error(weight, weight - difference, whitening) ** 2 <= wide.relative_error**2 + added**2
    apart = [quantize(part, Whitening.identity(part.shape[1]), bits).dense() for part in wide.factors]
    assert float(whitening.energy(difference)) < float(whitening.energy(weight - apart[0] @ apart[1]))


@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 32])
def test_factors_beside_integers_stay_as_large_as_what_they_stand_for_where_few_tokens_were_seen(tokens: int) -> None:
    torch.manual_seed(3)
    weight, whitening = torch.randn(256, 256), Whitening(_gram(256, tokens))
    whole, up, down = quantize_with_factors(weight, whitening, 4, 32, 4)
    alone = torch.linalg.vector_norm(weight - whole.dense())
    assert torch.linalg.vector_norm(up.dense() @ down.dense()) < 2 * alone


@pytest.mark.parametrize("zero_rows", [0, 20])
def test_factors_of_more_ranks_than_a_weight_has_are_its_own(zero_rows: int) -> None:
    """Under the plain SVD, which nothing damps: the rows of the inner factor that are left are zero."""
    torch.manual_seed(4)
    weight, plain = torch.randn(96, 10) @ torch.randn(10, 128), Whitening.identity(128)
    weight[:zero_rows] = 0
    up, down = quantize_factors(factorize(weight, plain, 32).factors, weight, plain, 8)
    assert torch.linalg.vector_norm(weight - up.dense() @ down.dense()) < 0.02 * torch.linalg.vector_norm(weight)


@pytest.mark.parametrize("scale", [2.0**-80, 2.0**80])
def test_factors_of_weights_of_any_size(scale: float) -> None:
    torch.manual_seed(5)
    weight, whitening = torch.randn(64, 96), Whitening(_gram(96))
    wide = factorize(weight, whitening, 16).factors
    up, down = quantize_factors(wide, weight, whitening, 8)
    large = LowRankFactors(wide.up, wide.down * scale)
    scaled_up, scaled_down = quantize_factors(large, weight * scale, whitening, 8)
    made, wanted = scaled_up.dense() @ (scaled_down.dense() / scale), up.dense() @ down.dense()
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dampening_frac", [1e-3, 1e-2])
def test_inputs_of_little_energy_count_in_scales_whatever_the_damping(dampening_frac: float) -> None:
    """31 of a group's 32 inputs have a twentieth of a percent of the mean, and most of what their group can lose."""
    torch.manual_seed(6)
    weight, x = torch.randn(32, 64), torch.randn(500, 64)
    x[:, 1:32] *= 0.015
    x[:, 0] *= 0.2
    weight[:, 1:32] *= 5.0
    gram = x.T @ x
    made = quantize(weight, Whitening(gram, dampening_frac), 4, 32)
    damped = _lost(weight, made, gram).sum()
    assert damped < 1.5 * _lost(weight, quantize(weight, Whitening(gram, 1e-6), 4, 32), gram).sum()


def test_factors_are_damped_by_what_the_gram_is_and_no_more() -> None:
    torch.manual_seed(7)
    weight, gram = torch.randn(96, 128), _gram(128, spread=30.0)
    damped = Whitening(gram, 1e-2)
    wide = factorize(weight, damped, 64)
    up, down = quantize_factors(wide.factors, weight, damped, 8)
    best = wide.factors.up @ wide.factors.down
    lost = damped.energy(weight - up.dense() @ down.dense())
    assert float(lost / damped.energy(weight - best)) < 1.01


def test_inputs_that_were_never_there_are_rounded_without_damping_too() -> None:
    torch.manual_seed(8)
    weight, x = torch.randn(16, 32), torch.randn(200, 32)
    x[:, 5] = 0
    gram = x.T @ x
    made = quantize(weight, Whitening(gram, 0.0), 3, 16)
    assert torch.isfinite(made.dense()).all()
    assert (_lost(weight, made, gram) <= _lost(weight, _nearest(weight, made), gram) * (1 + 1e-4)).all()
