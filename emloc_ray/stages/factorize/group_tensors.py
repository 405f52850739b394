"""Reads the weights, the Gram and the gradients of a group into memory, whole, for a GPU that computes it next."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.io.formats.grams import StoredGram
from emloc_ray.modeling.architecture import LinearSpec


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
