"""Spectra: what each rank gains, against products of roots in float64."""

from __future__ import annotations

import pytest
import torch
from test_two_sided import DAMPING, best, root, sums

from emloc_ray.core.spectra import plain_gains, spectrum
from emloc_ray.core.whitening import Whitening
from emloc_ray.errors import NumericsError


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_spectra_are_those_of_the_roots_product(shape: tuple[int, int], scale: float) -> None:
    weight, gram, gradients = sums(shape)
    _, both = best(weight * scale, gram, gradients, 4, DAMPING)
    found = spectrum((weight * scale).float(), Whitening(gram.float()), Whitening(gradients.float(), DAMPING))
    torch.testing.assert_close(found, both, rtol=1e-3, atol=1e-5 * float(both[0]))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("scale", [1.0, 1e-9])
@pytest.mark.parametrize("tokens", [200, 1])
def test_gains_of_plain_factors_are_what_these_save(shape: tuple[int, int], scale: float, tokens: int) -> None:
    weight, gram, gradients = sums(shape, tokens)
    weight, rows = weight * scale, min(shape)
    left, right = (root(matrix, share) for matrix, share in ((gradients, DAMPING), (gram, 1e-6)))
    u, s, vh = torch.linalg.svd(weight @ right, full_matrices=False)
    saved = [0.0] + [float((left @ (u[:, :r] * s[:r]) @ vh[:r]).square().sum()) for r in range(1, rows + 1)]
    found = plain_gains(weight.float(), Whitening(gram.float()), Whitening(gradients.float(), DAMPING)).cumsum(0)
    torch.testing.assert_close(found, torch.tensor(saved[1:], dtype=torch.float64), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("shape", [(200, 260), (260, 200)])
def test_a_channel_far_above_the_others_leaves_the_tail_as_it_is(shape: tuple[int, int]) -> None:
    # λ₁ is some 1e10 of the others: float32 would leave these to chance.
    generator = torch.Generator().manual_seed(0)
    weight, tokens = torch.randn(*shape, generator=generator), torch.randn(900, shape[1], generator=generator)
    weight[:, 3] *= 30
    tokens[:, 3] *= 3000
    gram = tokens.double().T @ tokens.double()
    gradients = torch.eye(shape[0], dtype=torch.float64)
    right = root(gram, 1e-6)
    reference = torch.linalg.svdvals(weight.double() @ right).square()
    assert reference[0] > 1e9 * reference[50]
    for gains in (spectrum, plain_gains):
        found = gains(weight, Whitening(gram), Whitening(gradients, 0.0))
        torch.testing.assert_close(found, reference, rtol=1e-3, atol=0.0)


def test_a_weight_that_is_no_number_names_the_layer() -> None:
    weight, gram, _ = sums((24, 40))
    weight[3, 3] = torch.inf
    for gains in (spectrum, plain_gains):
        with pytest.raises(NumericsError, match="The weight of q_proj"):
            gains(weight, Whitening(gram), Whitening(torch.eye(24)), name="q_proj")
        with pytest.raises(ValueError, match="q_proj reads 40 features"):
            gains(weight, Whitening(torch.eye(3)), Whitening(torch.eye(24)), name="q_proj")
