"""Reads the weights, the Gram and the gradients of a group while a GPU computes the group before."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from emloc_ray.data.ahead import made_ahead
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.io.formats.grams import StoredGram
from emloc_ray.modeling.architecture import LinearSpec

Work = TypeVar("Work")
Read = TypeVar("Read")


class GroupTensors(NamedTuple):
    """A group's tensors: the weight ``(out, in)`` of each linear by name, the packed triangle of the Gram ``(in, in)`` or None
    where nothing needs it, and those of the sums of gradients ``(out, out)`` by name, where a linear has one. They are unpacked
    on the device that uses them."""

    weights: dict[str, Tensor]
    gram: Tensor | None
    gradients: dict[str, Tensor]


def read_group(
    checkpoint: Checkpoint, specs: Sequence[LinearSpec], gram: StoredGram | None, gradients: Mapping[str, StoredGram]
) -> GroupTensors:
    """Reads them into this process's memory, whole."""
    weights = {spec.name: spec.read_weight(checkpoint).clone() for spec in specs}
    sums = {name: stored.packed() for name, stored in gradients.items()}
    return GroupTensors(weights, None if gram is None else gram.packed(), sums)


def read_ahead(
    pieces: Sequence[Work], read: Callable[[Work], Read], device: torch.device
) -> Iterator[tuple[Work, Read | None]]:
    """Yields each piece of a task for a GPU with its tensors, and reads the next one's meanwhile. A task's only piece, and all
    that a CPU computes, come without tensors: their layers are read one by one, in less memory."""
    if len(pieces) == 1 or device.type == "cpu":
        yield from ((piece, None) for piece in pieces)
        return
    yield from zip(pieces, made_ahead(pieces, read, most=1), strict=True)
