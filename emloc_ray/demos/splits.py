"""The splits of a task made on the spot: drawn by hash, written as Parquet."""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from emloc_ray.io.store.atomic import atomic_file

SPLIT_FRACTIONS = {"train": 0.7, "calibration": 0.1, "selection": 0.08, "eval": 0.12}
"""The split names, which are also the file names, and each one's share."""

_ROWS_PER_GROUP = 256  # they may hold images


def draw(seed: int, kind: str, name: str) -> float:
    """A number in [0, 1) that depends on the arguments alone, the same on every machine."""
    digest = hashlib.sha256(f"{seed}:{kind}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_at(drawn: float, shares: Mapping[str, float] = SPLIT_FRACTIONS) -> str:
    """The split that a number in [0, 1) falls into, of those whose ``shares`` sum to 1."""
    bounds = zip(shares, accumulate(shares.values()), strict=True)
    return next((name for name, bound in bounds if drawn < bound), next(iter(shares)))


def write_splits(out_dir: Path, splits: Mapping[str, Sequence[dict[str, Any]]], schema: pa.Schema) -> dict[str, int]:
    """Writes each split as a Parquet file into ``out_dir``, whole or not at all; returns the number of rows of each."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        with atomic_file(out_dir / f"{name}.parquet") as file:
            pq.write_table(pa.Table.from_pylist(rows, schema), file, row_group_size=_ROWS_PER_GROUP)
    return {name: len(rows) for name, rows in splits.items()}
