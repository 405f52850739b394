"""What forms are expected to lose, against what they lose once they are made."""

from __future__ import annotations

import pytest
import torch

from emloc_ray.core.factorization import factorize
from emloc_ray.core.forms import Form
from emloc_ray.core.predicted_loss import form_losses
from emloc_ray.core.quantization import quantize, quantize_factors
from emloc_ray.core.two_sided import factorize_two_sided
from emloc_ray.core.whitening import Whitening
from emloc_ray.errors import NumericsError

OUT, IN, GROUP = 96, 128, 32
FORMS = [
    *(Form(bits=bits) for bits in (8, 4, 3, 2)),
    *(Form(bits=bits, residual_rank=16) for bits in (3, 2)),
    *(Form(rank=rank, bits=bits) for bits in (None, 8, 4) for rank in (8, 48)),
]


def skewed_sum(order: int, decay: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    turned = torch.linalg.qr(torch.randn(order, order, generator=generator)).Q
    tokens = torch.randn(4 * order, order, generator=generator) * torch.exp(-decay * torch.arange(order) / order)
    tokens = tokens @ turned.T
    return tokens.T @ tokens


@pytest.fixture(scope="module")
def layer() -> tuple[torch.Tensor, Whitening, Whitening]:
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(3)) / IN**0.5
    return weight, Whitening(skewed_sum(IN, 3.0, 1), 1e-6), Whitening(skewed_sum(OUT, 2.0, 2), 1e-2)


def lost(weight: torch.Tensor, made: torch.Tensor, inputs: Whitening, outputs: Whitening) -> float:
    difference = (weight - made).double()
    seen = outputs.matrix(torch.float64) @ difference @ inputs.matrix(torch.float64)
    return float((seen * difference).sum()) * inputs.scale * outputs.scale


def made(weight: torch.Tensor, inputs: Whitening, outputs: Whitening, form: Form, plain: bool) -> torch.Tensor:
    def factors(matrix: torch.Tensor, rank: int, bits: int | None) -> torch.Tensor:
        found = factorize(matrix, inputs, rank) if plain else factorize_two_sided(matrix, inputs, outputs, rank)
        if bits is None:
            return found.factors.up @ found.factors.down
        up, down = quantize_factors(found.factors, matrix, inputs, bits, GROUP)
        return up.dense() @ down.dense()

    if form.rank is not None:
        return factors(weight, form.rank, form.bits)
    assert form.bits is not None
    whole = quantize(weight, inputs, form.bits, GROUP).dense()
    return whole + (factors(weight - whole, form.residual_rank, max(form.bits, 4)) if form.residual_rank else 0)


@pytest.mark.parametrize("plain", [True, False])
def test_each_form_loses_about_what_is_expected(layer: tuple[torch.Tensor, Whitening, Whitening], plain: bool) -> None:
    weight, inputs, outputs = layer
    expected = form_losses(weight, inputs, outputs, FORMS, GROUP, plain=plain)
    for form, loss in zip(FORMS, expected.tolist(), strict=True):
        measured = lost(weight, made(weight, inputs, outputs, form, plain), inputs, outputs)
        within = 1.02 if form.rank is not None and form.bits is None else 2.2 if form.bits == 8 else 1.35
        assert measured / within < loss < measured * within, (form, loss / measured)


def test_the_last_ranks_of_a_tall_linear_lose_what_is_expected() -> None:
    """Of which float32 leaves no eigenvalue that is above zero."""
    weight = torch.randn(IN, OUT, generator=torch.Generator().manual_seed(3)) / OUT**0.5
    inputs, outputs = Whitening(skewed_sum(OUT, 12.0, 1), 1e-6), Whitening(skewed_sum(IN, 2.0, 2), 1e-2)
    forms = [Form(rank=rank, bits=bits) for rank in (80, 96) for bits in (4, 3)]
    for form, loss in zip(forms, form_losses(weight, inputs, outputs, forms, GROUP).tolist(), strict=True):
        measured = lost(weight, made(weight, inputs, outputs, form, False), inputs, outputs)
        assert measured < loss < measured * 4, (form, loss / measured)


def test_a_massive_channel_does_not_make_the_others_count(layer: tuple[torch.Tensor, Whitening, Whitening]) -> None:
    """Rounding damps by 1 % of the mean energy, here most of what all channels but one have."""
    weight, _, outputs = layer
    channels = torch.ones(IN)
    channels[5] = 100.0
    inputs = Whitening(skewed_sum(IN, 3.0, 1) * torch.outer(channels, channels), 1e-6)
    forms = FORMS[1:4]
    for form, loss in zip(forms, form_losses(weight, inputs, outputs, forms, GROUP).tolist(), strict=True):
        measured = lost(weight, made(weight, inputs, outputs, form, False), inputs, outputs)
        assert measured / 2.5 < loss < measured * 2.5, (form, loss / measured)


@pytest.mark.parametrize("times", [1.0, 30.0, 300.0, 3000.0])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_group_that_reads_one_massive_channel_loses_what_is_expected(times: float, bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(128, 512, generator=generator), torch.randn(2000, 512, generator=generator)
    x[:, 3] *= times
    inputs = Whitening(x.T @ x, 1e-6)
    outputs = Whitening.identity(128)
    (loss,) = form_losses(weight, inputs, outputs, [Form(bits=bits)], 64, plain=True).tolist()
    measured = lost(weight, quantize(weight, inputs, bits, 64).dense(), inputs, outputs)
    assert measured / 2 < loss < measured * 2, loss / measured


def test_losses_grow_with_fewer_bits_and_ranks_and_dense_loses_nothing(
    layer: tuple[torch.Tensor, Whitening, Whitening],
) -> None:
    chain = [Form(), *FORMS[:4]]
    losses = form_losses(*layer, chain, GROUP)
    assert losses[0] == 0
    assert bool((losses.diff() > 0).all())
    beside = [Form(bits=2, residual_rank=rank) for rank in (0, 4, 16, 64)]
    assert bool((form_losses(*layer, beside, GROUP).diff() < 0).all())
    ranks = [Form(rank=rank) for rank in (1, 8, 64, 96)]
    assert bool((form_losses(*layer, ranks, GROUP).diff() < 0).all())


def test_a_scaled_weight_loses_by_the_square(layer: tuple[torch.Tensor, Whitening, Whitening]) -> None:
    weight, inputs, outputs = layer
    plain, scaled = (form_losses(w, inputs, outputs, FORMS, GROUP) for w in (weight, weight * 2.0**30))
    torch.testing.assert_close(scaled, plain * 2.0**60, rtol=1e-3, atol=0)


def test_a_broken_weight_is_named(layer: tuple[torch.Tensor, Whitening, Whitening]) -> None:
    weight = layer[0].clone()
    weight[0, 0] = torch.nan
    with pytest.raises(NumericsError, match=r"The weight of q_proj"):
        form_losses(weight, layer[1], layer[2], FORMS, GROUP, name="q_proj")
