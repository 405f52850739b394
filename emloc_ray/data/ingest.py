"""Training rows in an order that is a function of seed, epoch, row and world size, streamed by Ray Data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from emloc_ray.data.formats import Tokens
from emloc_ray.data.splits import row_hash
from emloc_ray.data.token_shards import TokenShards

_STEPS_PER_BLOCK = 1024


@dataclass(frozen=True)
class SampleOrder:
    """Which rows every micro-step of every rank sees.

    The stream is epoch after epoch, each a permutation of the rows by hash of (row, seed, epoch); micro-step m of rank k
    takes positions ``(m · world_size + k) · batch_size`` and the ``batch_size - 1`` after it.
    """

    num_rows: int
    batch_size: int
    rank: int
    world_size: int
    seed: int

    def epoch(self, number: int) -> NDArray[np.int64]:
        """The permutation of one epoch."""
        rows = np.arange(self.num_rows)
        return np.argsort(row_hash(rows, self.seed + 1_000_003 * (number + 1)), kind="stable")

    def micro_steps(self, begin: int, end: int) -> NDArray[np.int64]:
        """The rows of this rank's micro-steps ``[begin, end)``, in order: ``((end - begin) · batch_size,)``."""
        steps = np.arange(begin, end)[:, None] * self.world_size + self.rank
        positions = (steps * self.batch_size + np.arange(self.batch_size)).reshape(-1)
        epochs, places = positions // self.num_rows, positions % self.num_rows
        rows = np.empty_like(positions)
        for number in np.unique(epochs):
            rows[epochs == number] = self.epoch(int(number))[places[epochs == number]]
        return rows


@dataclass(frozen=True)
class RowReader:
    """A Ray Data function: row positions in, the rows' tokens out."""

    tokens_dir: Path

    def __call__(self, batch: pa.Table) -> pa.Table:
        shards = TokenShards(self.tokens_dir)
        rows = [shards.row(position.as_py()) for position in batch["row"]]
        ids = pa.array([row.input_ids for row in rows], pa.list_(pa.int32()))
        completion = pa.array([row.completion_mask for row in rows], pa.list_(pa.bool_()))
        return pa.table({"input_ids": ids, "completion_mask": completion})


def stream_batches(tokens_dir: Path, order: SampleOrder, begin: int, end: int) -> Iterator[list[Tokens]]:
    """This rank's micro-batches ``[begin, end)``, in order, read ahead by Ray Data.

    The reading tasks ask Ray for no CPU: they move a few kilobytes, and a worker group may hold every CPU there is.
    """
    import ray.data

    context: Any = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    for first in range(begin, end, _STEPS_PER_BLOCK * 64):
        last = min(end, first + _STEPS_PER_BLOCK * 64)
        blocks = [
            pa.table({"row": order.micro_steps(start, min(last, start + _STEPS_PER_BLOCK))})
            for start in range(first, last, _STEPS_PER_BLOCK)
        ]
        dataset = ray.data.from_arrow(blocks).map_batches(
            RowReader(tokens_dir), batch_format="pyarrow", batch_size=256, num_cpus=0
        )
        table: Any
        for table in dataset.iter_batches(batch_size=order.batch_size, batch_format="pyarrow", prefetch_batches=2):
            columns = table["input_ids"].to_pylist(), table["completion_mask"].to_pylist()
            yield [Tokens(ids, mask) for ids, mask in zip(*columns, strict=True)]
