"""What a group's factors are made from, read ahead of time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.io.formats.grams import StoredGram
from emloc_ray.modeling.architecture import LinearSpec
from emloc_ray.stages.factorize.job import FactorizationJob

GroupPiece = tuple[Sequence[LinearSpec], StoredGram | None, Path]  # linears, their Gram, the shard of their factors


class GroupTensors(NamedTuple):
    """The weights ``(out, in)`` of a group's linears by name, and their Gram ``(in, in)``, None where nothing needs it."""

    weights: dict[str, Tensor]
    gram: Tensor | None


def read_group(job: FactorizationJob, specs: Sequence[LinearSpec], gram: StoredGram | None) -> GroupTensors:
    """Reads them into this process's memory, whole."""
    checkpoint = Checkpoint(job.model_dir)
    weights = {spec.name: spec.read_weight(checkpoint).clone() for spec in specs}
    return GroupTensors(weights, None if gram is None else gram.read())
