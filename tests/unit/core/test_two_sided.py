"""Two-sided factors, against the SVD of ``S^½ W G^½`` in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from emloc_ray.core.factorization import factorize
from emloc_ray.core.two_sided import factorize_two_sided, output_whitened
from emloc_ray.core.whitening import Whitening
from emloc_ray.errors import NumericsError

DAMPING = 1e-2
SHAPES = [(24, 40), (40, 24), (32, 32)]


def samples(count: int, width: int, seed: int, spread: float = 1.0) -> Tensor:
    """``(count, width)``, correlated, channels up to ``spread`` apart."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, width, generator=generator, dtype=torch.float64) @ (
        torch.eye(width) + 0.3 * torch.randn(width, width, generator=generator)
    ).to(torch.float64)
    return mixed * torch.logspace(0, torch.log10(torch.tensor(spread)).item(), width, dtype=torch.float64)


def sums(shape: tuple[int, int], tokens: int = 200, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, a Gram and a sum of gradients, in float64."""
    out_features, in_features = shape
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x, g = samples(tokens, in_features, 1, spread), samples(tokens, out_features, 2, spread)
    return weight, x.T @ x, 1e-6 * g.T @ g


def root(matrix: Tensor, dampening_frac: float) -> Tensor:
    damped = matrix + dampening_frac * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(damped)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def best(weight: Tensor, gram: Tensor, gradients: Tensor, rank: int, dampening_frac: float) -> tuple[Tensor, Tensor]:
    """``W_E`` by symmetric roots, inverses and an SVD, and all singular values, squared."""
    left, right = root(gradients, dampening_frac), root(gram, 1e-6)
    u, s, vh = torch.linalg.svd(left @ weight @ right, full_matrices=False)
    found = torch.linalg.inv(left) @ (u[:, :rank] * s[:rank]) @ vh[:rank] @ torch.linalg.inv(right)
    return found, s.square()


def lost(weight: Tensor, approximation: Tensor, gram: Tensor, gradients: Tensor, dampening_frac: float) -> float:
    """``‖S_d^½ Δ G^½‖``."""
    delta = weight - approximation.to(torch.float64)
    return float(torch.linalg.norm(root(gradients, dampening_frac) @ delta @ root(gram, 1e-6)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [200, 7, 1])
def test_factors_are_the_best_of_their_rank(shape: tuple[int, int], dtype: torch.dtype, tokens: int) -> None:
    weight, gram, gradients = sums(shape, tokens)
    found = factorize_two_sided(weight.to(dtype), Whitening(gram.to(dtype)), Whitening(gradients.to(dtype), DAMPING), 9)
    up, down = found.factors
    expected, values = best(weight, gram, gradients, 9, DAMPING)
    whole = float(values.sum()) ** 0.5
    assert up.shape == (shape[0], 9)
    assert down.shape == (9, shape[1])
    error = lost(weight, up.double() @ down.double(), gram, gradients, DAMPING)
    assert error <= lost(weight, expected, gram, gradients, DAMPING) * (1 + 1e-3) + 1e-6 * whole
    torch.testing.assert_close(found.eigenvalues, values, rtol=1e-3, atol=1e-5 * float(values[0]))
    assert found.total_energy == pytest.approx(float(values.sum()), rel=1e-4)
    assert found.relative_error == pytest.approx(error / whole, rel=1e-2, abs=1e-6)


def test_channels_far_apart_and_numbers_far_from_one() -> None:
    weight, gram, gradients = sums((40, 64), 500, spread=3000.0)
    found = factorize_two_sided(
        weight.float() * 1e-3, Whitening((gram * 1e6).float()), Whitening((gradients * 1e-9).float(), DAMPING), 12
    )
    up, down = found.factors
    expected, _ = best(weight * 1e-3, gram * 1e6, gradients * 1e-9, 12, DAMPING)
    error = lost(weight * 1e-3, up.double() @ down.double(), gram * 1e6, gradients * 1e-9, DAMPING)
    assert error <= lost(weight * 1e-3, expected, gram * 1e6, gradients * 1e-9, DAMPING) * (1 + 1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_gradients_leave_the_plain_factors(shape: tuple[int, int]) -> None:
    weight, gram, _ = sums(shape)
    whitening = Whitening(gram)
    plain = factorize(weight, whitening, 6)
    for gradients in (7.0 * torch.eye(shape[0], dtype=torch.float64), torch.zeros(shape[0], shape[0])):
        found = factorize_two_sided(weight, whitening, Whitening(gradients, DAMPING), 6)
        torch.testing.assert_close(
            found.factors.up @ found.factors.down, plain.factors.up @ plain.factors.down, rtol=1e-6, atol=1e-8
        )
        assert found.relative_error == pytest.approx(plain.relative_error)


def test_what_does_not_fit_is_said() -> None:
    weight, gram, gradients = sums((24, 40))
    with pytest.raises(ValueError, match="gives 24 features, but its gradients are of 40"):
        output_whitened(weight, Whitening(gram, DAMPING))
    gradients[2, 2] = torch.nan
    with pytest.raises(NumericsError, match="the gradients of q_proj"):
        Whitening(gradients, DAMPING, name="the gradients of q_proj")
