"""The kernels on a GPU, against the CPU."""

from __future__ import annotations

import pytest
import torch

from emloc_ray.core.factorization import factorize
from emloc_ray.core.gram import Gram
from emloc_ray.core.whitening import Whitening

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]


def test_a_gram_is_summed_in_full_float32() -> None:
    tokens = torch.randn(4096, 512, dtype=torch.float64) * torch.logspace(0, 3, 512, dtype=torch.float64)
    gram = Gram.zero(512, device="cuda")
    gram.update(tokens.float().cuda())
    expected = tokens.T @ tokens
    assert torch.allclose(gram.symmetric().cpu().double(), expected, rtol=1e-4, atol=1e-4 * float(expected.max()) / 1e3)


@pytest.mark.parametrize("shape", [(1024, 1024), (2048, 512), (512, 2048)])
def test_a_layer_factorizes_as_on_the_cpu(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    tokens = torch.randn(4096, shape[1], generator=generator) * torch.logspace(0, -2, shape[1])
    rank = min(shape) // 4
    here = factorize(weight, Whitening(tokens.T @ tokens), rank)
    there = factorize(weight.cuda(), Whitening((tokens.T @ tokens).cuda()), rank)
    assert there.factors.up.device.type == "cuda"
    assert there.relative_error == pytest.approx(here.relative_error, rel=1e-3)
