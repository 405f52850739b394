"""Weights of a block in pinned memory of the host, from which a GPU copies them while both compute."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emloc_ray.io.available_memory import available_bytes, memory_bytes

_RESERVE = 0.5  # of the memory: what stays free of pinned weights, which the system can neither move nor take back
_ALIGNMENT = 512  # bytes, as torch's allocator of CUDA aligns tensors
_SMALLEST_PIECE = 2**20


def piece_sizes(num_bytes: int) -> list[int]:
    """Powers of two that add up to ``num_bytes``, rounded up to a MiB; the largest first.

    torch takes a power of two for whatever it pins: 256 MiB for a weight of 136 MB.
    """
    pieces = -(-num_bytes // _SMALLEST_PIECE)
    return [_SMALLEST_PIECE << bit for bit in reversed(range(pieces.bit_length())) if pieces >> bit & 1]


def pinned_bytes(weights: Iterable[Tensor]) -> int:
    """What :class:`Pinned` takes for ``weights``, whatever device they are on."""
    return sum(piece_sizes(sum(map(_aligned_bytes, weights))))


def may_stay_pinned(num_bytes: int) -> bool:
    """Whether a worker may keep so many more bytes pinned. It is asked before each part is, for other workers of the node may
    fill its memory meanwhile."""
    return num_bytes + _RESERVE * memory_bytes() <= available_bytes()


def release_unused() -> None:
    """Gives the system back what torch keeps pinned of tensors that are gone, where it can: by torch 2.13."""
    release = getattr(torch.accelerator, "empty_host_cache", None)
    if release is not None and torch.cuda.is_initialized():
        release()


@dataclass(frozen=True)
class Pinned:
    """Weights one after another as bytes, in ``pieces`` of pinned memory that are powers of two; ``shapes``: of the same shapes
    and dtypes on the meta device."""

    pieces: Sequence[Tensor]
    shapes: Sequence[Tensor]

    @classmethod
    def of(cls, weights: Sequence[Tensor]) -> Pinned:
        """A copy of weights on the host."""
        sizes = piece_sizes(sum(map(_aligned_bytes, weights)))
        pieces = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes]
        ends, begin = [*itertools.accumulate(sizes)], 0
        for weight in weights:
            content = weight.contiguous().view(-1).view(torch.uint8)
            for piece, end in zip(pieces, ends, strict=True):  # a weight may lie in several
                first, last = max(begin, end - len(piece)), min(begin + len(content), end)
                if first < last:
                    piece[first - end + len(piece) : last - end + len(piece)] = content[first - begin : last - begin]
            begin += _aligned_bytes(weight)
        return cls(pieces, [torch.empty(weight.shape, dtype=weight.dtype, device="meta") for weight in weights])

    def on(self, device: torch.device) -> list[Tensor]:
        """The weights on a GPU, in one stretch of its memory: the current stream copies them while the host goes on."""
        stretch = torch.empty(sum(map(len, self.pieces)), dtype=torch.uint8, device=device)
        for place, piece in zip(stretch.split([*map(len, self.pieces)]), self.pieces, strict=True):
            place.copy_(piece, non_blocking=True)
        return list(_places(stretch, self.shapes))


def _aligned_bytes(weight: Tensor) -> int:
    return -(-weight.numel() * weight.element_size() // _ALIGNMENT) * _ALIGNMENT


def _places(stretch: Tensor, weights: Iterable[Tensor]) -> Iterator[Tensor]:
    """Views of the bytes of each weight, one after another, with its dtype and shape."""
    begin = 0
    for weight in weights:
        size = weight.numel() * weight.element_size()
        yield stretch[begin : begin + size].view(weight.dtype).view(weight.shape)
        begin += _aligned_bytes(weight)
