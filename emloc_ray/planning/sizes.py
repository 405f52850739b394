"""What a model's blocks are made of: the sizes that memory is predicted from."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from emloc_ray.modeling.architecture import LinearSpec

FLOAT = 4  # bytes: Grams, adapters, norms and losses are in float32 whatever the model is in
HALF = 2  # of what autocast computes in
DOUBLE = 8  # of what is decided in float64

Part = TypeVar("Part")
Parts = dict[str, float]  # bytes by what holds them


def total(parts: Parts) -> int:
    """All parts together."""
    return int(sum(parts.values()))


@dataclass(frozen=True)
class Block:
    """A block's linears, by shared input, and the tokens that it sees for one of the row: 1, except in a vision tower, which
    sees more patches than the language model sees image tokens."""

    name: str
    groups: tuple[tuple[LinearSpec, ...], ...]
    multiple: float = 1.0

    @property
    def is_between(self) -> bool:
        """Whether these are linears that run between blocks, right before the one of this name."""
        return self.groups[0][0].between

    @property
    def specs(self) -> tuple[LinearSpec, ...]:
        """All its linears."""
        return tuple(spec for group in self.groups for spec in group)

    @property
    def num_parameters(self) -> int:
        """Parameters of their weights."""
        return sum(spec.num_parameters for spec in self.specs)

    @property
    def width(self) -> int:
        """The residual stream's, which its first linears read."""
        return self.groups[0][0].in_features


def gram_bytes(group: tuple[LinearSpec, ...]) -> int:
    """Bytes of a group's Gram in float32."""
    return FLOAT * group[0].in_features ** 2


def gradient_bytes(spec: LinearSpec) -> int:
    """Bytes of the sum of a linear's outputs' gradients in float32."""
    return FLOAT * spec.out_features**2


def packed_bytes(order: int) -> int:
    """Bytes of a Gram or a sum of gradients of this order as stored: its lower triangle in float32."""
    return FLOAT * order * (order + 1) // 2


def in_waves(parts: Iterable[Part], size: Callable[[Part], int], budget: float) -> list[list[Part]]:
    """Parts in order, in waves that fit ``budget`` bytes; a part that does not fit is a wave of its own."""
    waves: list[list[Part]] = []
    used = 0.0
    for part in parts:
        if not waves or used + size(part) > budget:
            waves.append([])
            used = 0.0
        waves[-1].append(part)
        used += size(part)
    return waves


def widest_step(block: Block) -> int:
    """Features of a token that live at once in a block's widest step."""
    steps = ([spec.out_features for spec in group] for group in block.groups)
    widest = max(group[0].in_features + sum(s) + max(s) for group, s in zip(block.groups, steps, strict=True))
    return 3 * block.width + widest


def blocks_of(groups: tuple[tuple[LinearSpec, ...], ...], multiples: Mapping[str, float]) -> tuple[Block, ...]:
    """The blocks of a model's linears. ``multiples``: tokens that a block sees for one of the row, by name, where that is not
    1."""
    blocks: dict[tuple[str, bool], list[tuple[LinearSpec, ...]]] = {}
    for group in groups:
        blocks.setdefault((group[0].block, group[0].between), []).append(group)
    return tuple(Block(name, tuple(inside), multiples.get(name, 1.0)) for (name, _), inside in blocks.items())
