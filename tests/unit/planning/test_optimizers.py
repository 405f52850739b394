"""Bytes of optimizers, by the Trainer's names."""

from __future__ import annotations

import pytest
import torch

from emloc_ray.planning.optimizers import optimizer_bytes


@pytest.mark.parametrize(
    ("name", "on_gpu", "expected"),
    [
        ("adamw_torch", True, 16),
        ("adamw_torch_fused", False, 16),
        ("adamw_8bit", True, 8 + 2 * (1 + 1 / 64)),
        ("adamw_torch_4bit", True, 8 + 2 * (0.5 + 1 / 64)),
        ("paged_adamw_8bit", True, 8),
        ("paged_adamw_32bit", False, 16),
        ("lion_32bit", True, 12),
        ("ademamix", True, 20),
        ("adafactor", True, 8),
        ("sgd", True, 8),
    ],
)
def test_bytes_follow_from_the_name(name: str, on_gpu: bool, expected: float) -> None:
    assert optimizer_bytes(name, on_gpu) == expected


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("adamw_torch", torch.optim.AdamW), ("sgd", torch.optim.SGD), ("adagrad", torch.optim.Adagrad)],
)
def test_torch_s_hold_as_much(name: str, optimizer: type[torch.optim.Optimizer]) -> None:
    weight = torch.nn.Parameter(torch.ones(64, 64))
    weight.grad = torch.ones_like(weight)
    made = optimizer([weight], lr=0.1)  # type: ignore[call-arg]
    made.step()
    held = [value for value in made.state[weight].values() if isinstance(value, torch.Tensor) and value.ndim]
    assert optimizer_bytes(name, False) * weight.numel() == sum(t.nbytes for t in (weight, weight.grad, *held))
