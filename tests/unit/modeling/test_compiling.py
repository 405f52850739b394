"""Compiled blocks keep no weight that was unpacked for a product: that would be the memory that few bits save."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import make_model
from torch import Tensor
from torch._dynamo.utils import counters

from emloc_ray.core.integer_forms import IntegerForms
from emloc_ray.modeling.architecture import block_linears
from emloc_ray.modeling.compiling import compile_blocks
from emloc_ray.modeling.emulator import factorize_modules

# As inductor does, this backend chooses between keeping and computing again.
BACKEND = {"torch_compile": True, "torch_compile_backend": "aot_eager_decomp_partition"}


def saved(model: Any, ids: Tensor) -> tuple[list[tuple[int, ...]], Tensor]:
    shapes: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (shapes.append(tuple(t.shape)), t)[1], lambda t: t):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return shapes, loss.detach()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_weights_in_few_bits_are_not_kept_for_the_backward_pass() -> None:
    model = make_model("llama", num_hidden_layers=2)
    specs = block_linears(model)
    factorize_modules(model, {}, integers=IntegerForms({spec.name: 4 for spec in specs}))
    model.requires_grad_(False).get_input_embeddings().requires_grad_(True)
    ids = torch.randint(2, 300, (2, 11), generator=torch.Generator().manual_seed(0))
    _, expected = saved(model, ids)
    compile_blocks(model, BACKEND)
    counters.clear()
    shapes, loss = saved(model, ids)
    assert counters["stats"]["unique_graphs"]
    assert loss == pytest.approx(float(expected))
    weights = {(spec.out_features, spec.in_features) for spec in specs}
    assert not weights & set(shapes)
    assert not {shape[::-1] for shape in weights} & set(shapes)


@pytest.fixture
def precision_as_it_is() -> Iterator[None]:
    matmuls = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = torch.get_float32_matmul_precision(), [matmul.fp32_precision for matmul in matmuls]
    yield
    setattr(torch.backends, "fp32_precision", "none")  # noqa: B010
    torch.set_float32_matmul_precision(before[0])
    for matmul, precision in zip(matmuls, before[1], strict=True):
        matmul.fp32_precision = precision


def test_what_compiles_can_ask_for_the_precision_that_the_trainer_sets(precision_as_it_is: None) -> None:
    """Inductor asks by the older name where it chooses among products."""
    setattr(torch.backends, "fp32_precision", "tf32")  # noqa: B010  as transformers does for tf32: true
    compile_blocks(make_model("llama", num_hidden_layers=1), {**BACKEND, "tf32": True})
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
