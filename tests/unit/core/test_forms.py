"""Forms of a weight: the bytes that are counted are those that are stored."""

from __future__ import annotations

import pytest
import torch

from emloc_ray.core.factorization import factorize
from emloc_ray.core.forms import Form, FormSizes
from emloc_ray.core.integers import IntegerWeight
from emloc_ray.core.pivoting import pivot
from emloc_ray.core.quantization import quantize, quantize_factors, quantize_with_factors
from emloc_ray.core.ranks import Storage
from emloc_ray.core.whitening import Whitening

SHAPE, FLOATS = (24, 40), torch.float32


def stored(weight: torch.Tensor, form: Form, storage: Storage, group_size: int) -> list[IntegerWeight | torch.Tensor]:
    inputs = Whitening(torch.eye(SHAPE[1]))
    if form.bits is None:
        if form.rank is None:
            return [weight]
        factors = factorize(weight, inputs, form.rank).factors
        return list(factors if storage == "factors" else pivot(factors))
    if form.rank is not None:
        return list(
            quantize_factors(factorize(weight, inputs, form.rank).factors, weight, inputs, form.bits, group_size)
        )
    if form.residual_rank:
        beside = max(form.bits, 4)
        whole, up, down = quantize_with_factors(weight, inputs, form.bits, form.residual_rank, beside, group_size)
        return [whole, up, down]
    return [quantize(weight, inputs, form.bits, group_size)]


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize("group_size", [8, 64])
def test_bytes_are_those_of_the_tensors(storage: Storage, group_size: int) -> None:
    weight, form_sizes = torch.randn(SHAPE), FormSizes(4, storage, group_size)
    forms = form_sizes.forms(*SHAPE)
    assert {form.kind for form in forms} >= {"dense", "2 bits", "8 bits", "factors", "factors in 4 bits"}
    assert any(form.residual_rank for form in forms)
    for form in forms:
        parts = stored(weight, form, storage, group_size)
        tensors = [t for p in parts for t in (p.tensors(FLOATS).values() if isinstance(p, IntegerWeight) else [p])]
        assert form_sizes.num_bytes(*SHAPE, form) == sum(t.nbytes for t in tensors), form


@pytest.mark.parametrize(
    ("out_features", "in_features", "multiple"), [(1, 1, 1), (3, 2, 64), (64, 7, 8), (576, 1536, 8)]
)
def test_every_form_is_smaller_than_the_weight_but_itself(out_features: int, in_features: int, multiple: int) -> None:
    form_sizes = FormSizes(2)
    forms = form_sizes.forms(out_features, in_features, multiple)
    assert forms[0] == Form()
    assert len(set(forms)) == len(forms)
    dense = form_sizes.num_bytes(out_features, in_features, Form())
    assert all(form_sizes.num_bytes(out_features, in_features, form) < dense for form in forms[1:])
    ranks = {form.rank for form in forms if form.rank is not None}
    assert all(rank % multiple == 0 or multiple >= min(out_features, in_features) for rank in ranks)
