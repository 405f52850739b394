"""Training rows in an order that is a function of seed, epoch, row and world size, streamed by Ray Data."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from emloc_ray.data.formats import Tokens
from emloc_ray.data.hash_order import Rows, shuffled
from emloc_ray.data.packing import Packs, join, packs_of
from emloc_ray.data.token_shards import TokenShards, from_table, to_table

STEPS_PER_TASK = 256
_TASK_BYTES = 2**26  # of a reading task's rows, which are of 100 KB rather than one where they show images
_READERS = 2
_READ_AHEAD_BYTES = 2**27


@dataclass(frozen=True)
class SampleOrder:
    """Which rows every micro-step of every rank reads.

    The stream is epoch after epoch, each a permutation of the rows by hash of (row, seed, epoch). Micro-step m of rank k
    reads ``batch_size`` positions from ``(m · world_size + k) · batch_size``. With ``pack_length`` its rows are packs of
    rows, of so many tokens at most (:mod:`emloc_ray.data.packing`).
    """

    num_rows: int
    batch_size: int
    rank: int
    world_size: int
    seed: int
    pack_length: int | None = None

    def micro_steps(self, begin: int, end: int) -> Rows:
        """The rows of this rank's micro-steps ``[begin, end)``, in order: ``((end - begin) · batch_size,)``."""
        steps = np.arange(begin, end)[:, None] * self.world_size + self.rank
        positions = (steps * self.batch_size + np.arange(self.batch_size)).reshape(-1)
        epochs, places = positions // self.num_rows, positions % self.num_rows
        rows = np.empty_like(positions)
        for number in np.unique(epochs):
            inside = epochs == number
            first, last = int(places[inside].min()), int(places[inside].max())
            rows[inside] = self.epoch(int(number), first, last + 1)[places[inside] - first]
        return rows

    def batches(self, begin: int, end: int) -> Iterator[Rows]:
        """The rows of each of this rank's micro-steps ``[begin, end)``: ``(batch_size,)``."""
        for start in range(begin, end, STEPS_PER_TASK):
            yield from self.micro_steps(start, min(end, start + STEPS_PER_TASK)).reshape(-1, self.batch_size)

    def seen(self, micro_steps: int) -> Rows:
        """The rows that all ranks together have read after so many micro-steps each, ascending."""
        places = micro_steps * self.world_size * self.batch_size
        if places >= self.num_rows:  # the first epoch has all
            return np.arange(self.num_rows)
        return np.sort(self.epoch(0, 0, places))

    def epoch(self, number: int, begin: int = 0, end: int | None = None) -> Rows:
        """One epoch's permutation, or its places ``[begin, end)``, without holding the others."""
        return shuffled(
            self.num_rows, self.seed + 1_000_003 * (number + 1), begin, self.num_rows if end is None else end
        )


def read_micro_steps(tokens_dir: Path, order: SampleOrder, begin: int, end: int) -> pa.Table:
    """The rows of this rank's micro-steps ``[begin, end)``, in order, with their tokens."""
    shards = TokenShards(tokens_dir)
    wanted = order.micro_steps(begin, end)
    if order.pack_length is not None:
        return _joined(shards, packs_of(tokens_dir, order.pack_length), wanted)
    tokens = shards.rows(wanted.tolist())
    return to_table([tokens[row] for row in wanted.tolist()], shards.has_images)


def _joined(shards: TokenShards, packs: Packs, wanted: Rows) -> pa.Table:
    parts = [packs[number] for number in wanted.tolist()]
    tokens = shards.rows(row for part in parts for row in part)
    sequences = [join([tokens[row] for row in part]) for part in parts]
    return to_table(sequences)


def steps_per_task(tokens_dir: Path, order: SampleOrder) -> int:
    """How many micro-steps a reading task has."""
    shards = TokenShards(tokens_dir)
    rows = 1.0 if order.pack_length is None else len(shards) / order.num_rows
    step_bytes = max(1.0, order.batch_size * rows * shards.row_bytes)
    return int(min(max(1, _TASK_BYTES // step_bytes), STEPS_PER_TASK))


def stream_batches(tokens_dir: Path, order: SampleOrder, begin: int, end: int) -> Iterator[list[Tokens]]:
    """This rank's micro-batches ``[begin, end)``, in order, read ahead by Ray Data.

    The reading tasks ask Ray for no CPU: they move a few kilobytes, and the worker group may hold all CPUs. Two at once are
    faster than any training; unbounded, Ray would start hundreds, and fill its object store with a long training's rows. They run
    on this node: Ray would spread them over all, each of which would fetch the split from a store.
    """
    steps = steps_per_task(tokens_dir, order)
    ranges = [{"begin": start, "end": min(end, start + steps)} for start in range(begin, end, steps)]
    if len(ranges) <= 1:  # nothing to stream: starting Ray Data takes longer than reading it
        yield from _batches(iter([read_micro_steps(tokens_dir, order, begin, end)]), order)
        return

    def read(part: dict[str, Any]) -> pa.Table:
        return read_micro_steps(tokens_dir, order, int(part["begin"][0]), int(part["end"][0]))

    context: Any = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    limits = ray.data.ExecutionResources.for_limits(object_store_memory=_READ_AHEAD_BYTES)
    context.execution_options.resource_limits = limits
    context.enable_progress_bars = False
    readers = ray.data.TaskPoolStrategy(size=_READERS)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    dataset: Any = ray.data.from_items(ranges, override_num_blocks=len(ranges)).map_batches(
        read, batch_size=1, num_cpus=0, compute=readers, max_retries=3, scheduling_strategy=here
    )
    tables = dataset.iter_batches(batch_size=order.batch_size, batch_format="pyarrow", prefetch_batches=2)
    yield from _batches(tables, order)


def _batches(tables: Iterator[pa.Table], order: SampleOrder) -> Iterator[list[Tokens]]:
    for table in tables:
        for start in range(0, len(table), order.batch_size):
            yield from_table(table.slice(start, order.batch_size))
