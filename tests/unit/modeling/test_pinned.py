"""What waits for a GPU in pinned memory takes little more than its bytes, and arrives as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from emloc_ray.modeling.pinned import Pinned, may_stay_pinned, piece_sizes, pinned_bytes

# A block of Qwen2.5-7B: queries and outputs, keys and values, the feed-forward's three, their biases and norms.
BLOCK = [
    *[(3584, 3584)] * 2,
    *[(512, 3584)] * 2,
    *[(18944, 3584), (18944, 3584), (3584, 18944)],
    *[(3584,), (512,), (512,), (3584,), (3584,)],
]


def test_a_block_takes_its_own_size_not_the_next_powers_of_two() -> None:
    weights = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in BLOCK]
    own = sum(weight.numel() * 2 for weight in weights)
    assert own <= pinned_bytes(weights) <= own + 2**20 + 512 * len(weights)
    by_weight = sum(1 << (weight.numel() * 2 - 1).bit_length() for weight in weights)  # each pinned by itself
    assert by_weight > 1.8 * own


@pytest.mark.parametrize("num_bytes", [0, 1, 2**20, 2**20 + 1, 466_115_584])
def test_pieces_are_powers_of_two_that_hold_all(num_bytes: int) -> None:
    sizes = piece_sizes(num_bytes)
    assert all(size.bit_count() == 1 for size in sizes)
    assert len({*sizes}) == len(sizes)
    assert num_bytes <= sum(sizes) < num_bytes + 2**20


def test_half_of_the_memory_stays_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emloc_ray.modeling.pinned.memory_bytes", lambda: 32 * 2**30)
    monkeypatch.setattr("emloc_ray.modeling.pinned.available_bytes", lambda: 20 * 2**30)
    assert may_stay_pinned(4 * 2**30)
    assert not may_stay_pinned(5 * 2**30)


def test_weights_arrive_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[int] = []
    empty = torch.empty

    def without_pinning(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        made = empty(*size, **options)
        pinned.extend([made.numel()] if pin_memory else [])
        return made

    monkeypatch.setattr(torch, "empty", without_pinning)  # pinned memory asks for a GPU
    dtypes = (torch.bfloat16, torch.float32, torch.int64, torch.uint8, torch.bool)
    shapes = ((700, 1001), (3,), (), (0, 4), (5, 7))
    weights = [(9 * torch.randn(shape)).to(dtype) for dtype in dtypes for shape in shapes]
    weights.append(torch.randn(40, 30).T)  # laid out otherwise
    held = Pinned.of(weights)
    assert sum(pinned) == pinned_bytes(weights) == sum(piece.numel() for piece in held.pieces)
    arrived = held.on(torch.device("cpu"))
    for weight, other in zip(weights, arrived, strict=True):
        assert (other.dtype, other.shape) == (weight.dtype, weight.shape)
        assert other.is_contiguous()
        assert torch.equal(other, weight)
        assert other.data_ptr() % 64 == 0 or not other.numel()
