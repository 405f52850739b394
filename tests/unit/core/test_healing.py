"""Ranks with and without healing, and what a LoRA adds to factors."""

from __future__ import annotations

import torch

from emloc_ray.core.healing import added_factors, healed_layers, ranks_before_healing


def test_ranks_leave_room_for_the_healing_alone() -> None:
    ranks = {"a": 30, "b": 9, "c": 8, "d": 3}
    assert ranks_before_healing(ranks, 8) == {"a": 22, "b": 1, "c": 8, "d": 3}
    assert healed_layers(ranks, 8) == ("a", "b")


def test_added_factors_are_the_update_with_orthonormal_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 30, generator=generator), 1e-4 * torch.randn(50, 4, generator=generator)
    found = added_factors(a, b, 2.5)
    torch.testing.assert_close(found.up @ found.down, 2.5 * (b.double() @ a.double()))
    torch.testing.assert_close(found.up.T @ found.up, torch.eye(4, dtype=torch.float64))


def test_an_untrained_lora_adds_nothing() -> None:
    found = added_factors(torch.randn(4, 30), torch.zeros(50, 4), 2.0)
    assert bool(torch.isfinite(found.up).all())
    assert not found.down.any()
