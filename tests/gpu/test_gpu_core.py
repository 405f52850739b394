"""The algorithms on a GPU, against the CPU: the same sums, factors, ranks and corrections, on the device they began on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu_device import DEVICE, ON_GPU
from torch import Tensor

from emloc_ray.core.correction import Candidate, canonical_form, difference, residual_energy
from emloc_ray.core.factorization import factorize
from emloc_ray.core.gram import Gram
from emloc_ray.core.pivoting import pivot
from emloc_ray.core.products import product_by_rows
from emloc_ray.core.quantization import quantize
from emloc_ray.core.spectra import spectrum
from emloc_ray.core.stored_weight import StoredWeight
from emloc_ray.core.trained_integers import Unrounded, rounded_weight, unrounded
from emloc_ray.core.two_sided import factorize_two_sided
from emloc_ray.core.whitening import Whitening
from emloc_ray.modeling.adapter_files import LoraModule
from emloc_ray.stages.correct.modules import CorrectableModule

pytestmark = ON_GPU
SHAPES = [(1024, 1024), (2048, 512), (512, 2048)]


def layer(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """``W (out, in)`` and the Gram of inputs whose strengths fall by a hundred."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(4096, shape[1], generator=generator) * torch.logspace(0, -2, shape[1])
    return torch.randn(shape, generator=generator), tokens.T @ tokens


def direct_error(weight: Tensor, product: Tensor, gram: Tensor) -> float:
    """``‖(W − W_E) G^½‖ / ‖W G^½‖`` in float64 on the CPU."""
    weight, gram = weight.double(), gram.double()
    rest = weight - product.double().cpu()
    return float((((rest @ gram) * rest).sum() / ((weight @ gram) * weight).sum()).sqrt())


def test_a_gram_is_summed_in_full_float32() -> None:
    tokens = torch.randn(4096, 512, dtype=torch.float64) * torch.logspace(0, 3, 512, dtype=torch.float64)
    gram = Gram.zero(512, device=DEVICE)
    gram.update(tokens.float().to(DEVICE))
    expected = tokens.T @ tokens
    assert torch.allclose(gram.symmetric().cpu().double(), expected, rtol=1e-4, atol=1e-4 * float(expected.max()) / 1e3)


def test_a_gram_of_bfloat16_has_exact_products_and_float32_sums() -> None:
    """Tensor cores cut off what they add, which a sum of squares shows."""
    tokens = torch.randn(4096, 2500, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE).bfloat16()
    gram = Gram.zero(2500, device=DEVICE)
    gram.update(tokens)
    wide = tokens.double()
    assert torch.allclose(gram.symmetric().double(), wide.T @ wide, rtol=1e-4, atol=1e-2)


def test_a_whitening_is_a_root_of_the_damped_gram() -> None:
    _, gram = layer((8, 1024))
    there = Whitening(gram.to(DEVICE))
    root = there.root(torch.float32).double()
    damped = Whitening(gram).matrix(torch.float64)
    assert root.device.type == DEVICE
    assert torch.linalg.norm((root @ root.T).cpu() - damped) <= 1e-5 * torch.linalg.norm(damped)


@pytest.mark.parametrize("share", [2, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_factorizes_as_on_the_cpu(shape: tuple[int, int], share: int) -> None:
    weight, gram = layer(shape)
    rank = min(shape) // share
    here = factorize(weight, Whitening(gram), rank)
    there = factorize(weight.to(DEVICE), Whitening(gram.to(DEVICE)), rank)
    assert there.factors.up.device.type == DEVICE
    assert there.solver == "products" or DEVICE != "cuda"
    assert there.relative_error == pytest.approx(here.relative_error, rel=1e-3)
    product = there.factors.up @ there.factors.down
    assert direct_error(weight, product, gram) == pytest.approx(here.relative_error, rel=2e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_for_predictions_are_those_of_the_cpu(shape: tuple[int, int]) -> None:
    weight, gram = layer(shape)
    _, gradients = layer((8, shape[0]))
    rank = min(shape) // 4
    here = factorize_two_sided(weight, Whitening(gram), Whitening(gradients, 1e-2), rank)
    there = factorize_two_sided(
        weight.to(DEVICE), Whitening(gram.to(DEVICE)), Whitening(gradients.to(DEVICE), 1e-2), rank
    )
    assert there.factors.up.device.type == DEVICE
    assert there.relative_error == pytest.approx(here.relative_error, rel=1e-3)


def test_pivoted_factors_are_the_same_product() -> None:
    weight, gram = layer((512, 2048))
    factors = factorize(weight.to(DEVICE), Whitening(gram.to(DEVICE)), 128).factors
    pivoted = pivot(factors)
    expected = factors.up @ factors.down
    assert pivoted.up.device.type == DEVICE
    assert torch.linalg.norm(pivoted.product() - expected) <= 1e-5 * torch.linalg.norm(expected)


@pytest.mark.parametrize("method", ["projection", "covariance"])
def test_an_adapter_is_corrected_as_on_the_cpu(method: str) -> None:
    weight, gram = layer((512, 768))
    stored = StoredWeight(*factorize(weight, Whitening(gram), 128).factors)
    generator = torch.Generator().manual_seed(1)
    lora_a, lora_b = torch.randn(8, 768, generator=generator), torch.randn(512, 8, generator=generator)
    lora, form, candidate = LoraModule("layer", lora_a, lora_b, 2.0), canonical_form(lora_a, lora_b), Candidate(method)  # type: ignore[arg-type]
    products, shortfalls = [], []
    for device in map(torch.device, ("cpu", DEVICE)):
        here, matrix, q = weight.to(device), gram.to(device), form.q.to(device)
        there = StoredWeight(*(None if part is None else part.to(device) for part in stored))  # type: ignore[arg-type]
        seen = difference(here, there, q, product_by_rows(matrix, q))
        assert seen.delta_q.device.type == device.type
        module = CorrectableModule(lora, form, seen.first(8, residual_energy(here, there, matrix)))
        corrected = module.corrected(candidate, 1e-4)
        products.append(corrected.lora_b @ corrected.lora_a)
        shortfalls.append(module.shortfalls(candidate, 1e-4))
    assert torch.linalg.norm(products[1] - products[0]) <= 1e-4 * torch.linalg.norm(products[0])
    assert shortfalls[1] == pytest.approx(shortfalls[0], rel=1e-4)


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("shape", [(512, 768), (96, 200)])
def test_rounding_loses_what_it_loses_on_the_cpu(shape: tuple[int, int], bits: int) -> None:
    weight, gram = layer(shape)
    lost = []
    for device in ("cpu", DEVICE):
        made = quantize(weight.to(device), Whitening(gram.to(device)), bits)
        assert made.codes.device.type == device
        lost.append(direct_error(weight, made.dense(), gram))
    assert lost[1] == pytest.approx(lost[0], rel=1e-2)  # a code at the middle of two may fall to either


@pytest.mark.parametrize("bits", [4, 2])
def test_integers_that_are_trained_have_the_weight_and_gradients_of_the_cpu(bits: int) -> None:
    grid = quantize(layer((96, 200))[0], Whitening.identity(200), bits)

    def gradients(device: torch.device | str) -> list[Tensor]:
        here = replace(grid, **{part: getattr(grid, part).to(device) for part in ("codes", "scales", "zeros")})
        floats = Unrounded(*(part.requires_grad_() for part in unrounded(here)))
        weight = rounded_weight(floats, here)
        weight.square().sum().backward()
        return [tensor.cpu() for tensor in (weight.detach(), *(part.grad for part in floats)) if tensor is not None]

    for there, here in zip(gradients(DEVICE), gradients("cpu"), strict=True):
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-5)


def test_spectra_are_those_of_the_cpu() -> None:
    for shape in SHAPES:
        weight, gram = layer(shape)
        found = {}
        for device in ("cpu", DEVICE):
            outputs = Whitening(torch.eye(shape[0], device=device, dtype=gram.dtype))
            found[device] = spectrum(weight.to(device), Whitening(gram.to(device)), outputs)
            assert found[device].device.type == device
        expected = found["cpu"]
        assert torch.allclose(found[DEVICE].cpu(), expected, rtol=1e-3, atol=1e-5 * float(expected[0]))
