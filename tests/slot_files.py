"""What a calibration's slot has committed, as tests look at it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from emloc_ray.core.gram import Gram
from emloc_ray.io.formats.checkpoint import read_shard
from emloc_ray.io.formats.grams import add_slot


def read_slot(path: Path, names: Sequence[str] | None = None) -> tuple[dict[str, Gram], int]:
    """Its sums (all, or of the Grams named) and its last shard."""
    entries = [entry for entry in read_shard(path).entries if names is None or entry.name in names]
    grams = {entry.name: Gram.zero(entry.shape[0]) for entry in entries}
    return grams, add_slot(path, grams)
