"""Linears whose weights their owners' code reads, which no pass on a CPU shows."""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.bamba.modeling_bamba import BambaMixer
from transformers.models.bloom.modeling_bloom import BloomMLP
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

from emloc_ray.modeling.weight_reads import children_read


class Owner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.called, self.asked, self.read = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.called.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.asked.weight.dtype)
        if self.called.bias is not None and isinstance(self.asked.weight, torch.Tensor):
            x = self.called(x)
        return torch.nn.functional.linear(x, weight=self.read.weight) if self.training else self.read(x)


class Heir(Owner):
    pass


def test_only_weights_that_are_computed_with_are_read() -> None:
    assert children_read(Owner) == {"read"}
    assert children_read(Heir) == {"read"}


def test_code_of_transformers() -> None:
    """Mamba's mixer hands its projection to a kernel, T5 asks for a dtype, BLOOM cuts weights only where it is told to."""
    assert "out_proj" in children_read(BambaMixer)
    assert "in_proj" not in children_read(BambaMixer)
    for owner in (LlamaAttention, T5DenseGatedActDense, BloomMLP):
        assert not children_read(owner)


def test_a_class_without_source_reads_nothing() -> None:
    made = type("Made", (nn.Module,), {})
    assert not children_read(made)
