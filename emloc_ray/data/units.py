"""Units of work on rows: neighbouring shards of a split. Ray Data does them; one process does those of small data."""

import contextlib
import functools
import json
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from emloc_ray.core.overlapping import silenced
from emloc_ray.data.splits import RowSelection
from emloc_ray.io.store.node_cache import sizes

# One process tokenizes so much text in some 10 s. A second takes as long to import transformers; Ray Data starts in 3 s.
SMALL_BYTES, SMALL_ROWS = 2**23, 2**14
_UNPACKED = 8  # bytes of text a byte of a compressed file, about
_READS_PER_GROUP = 16
_RAY_DATA = "ray.data"  # what it would log of an error it also raises
_MAKING = threading.Lock()
_SETTINGS = {
    "raise_original_map_exception": True,  # its own, around ours, would lose it
    "enable_progress_bars": False,  # our progress shows it
    "print_on_execution_start": False,
}

Unit = dict[str, Any]
Work = Callable[[dict[str, Any]], dict[str, Any]]


def shard_units(split: str, selection: RowSelection, rows_per_shard: int) -> Iterator[Unit]:
    """Units of work of neighbouring shards: of one shard each, where files can be entered at any row. A Parquet row group is
    read from its beginning: there a unit spans at least a sixteenth of the largest, so that it is read eight times in all."""
    bounds = selection.bounds(rows_per_shard).tolist()
    span = max(source.group_rows for source in selection.sources) / _READS_PER_GROUP
    first = 0
    for shard in range(1, len(bounds)):
        if bounds[shard] - bounds[first] >= span or shard == len(bounds) - 1:
            part = bounds[first : shard + 1]
            yield {"split": split, "first": first, "rows_per_shard": rows_per_shard, "bounds": part}
            first = shard


class InOneProcess:
    """Calls ``function`` on one unit after the other, in a task each. Ray runs them in one process: in one that is idle and has
    imported what they need, if there is one."""

    def __init__(self, work: Sequence[Unit], function: Work, memory: int) -> None:
        self._work, self._function, self._memory = work, function, memory
        self._at_work: Any = None
        self._turn, self._ended = threading.Lock(), False

    def blocks(self) -> Iterator[dict[str, Any]]:
        """What is made, by unit."""
        import ray

        function = ray.put(self._function)
        options = {"num_cpus": 1, "max_retries": 0, **({"memory": self._memory} if self._memory else {})}
        task = _task().options(name=type(self._function).__name__, **options)
        for unit in self._work:
            with self._turn:
                if self._ended:
                    return
                self._at_work = task.remote(function, unit)
            try:
                block = ray.get(self._at_work)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            finally:
                self._at_work = None
            yield block

    def end(self) -> None:
        """Ends the process of the task at work, and begins no other."""
        import ray

        with self._turn:
            self._ended = True
        # To cancel a task whose result has just come ends this process: a check of Ray's fails (2.60).
        if (task := self._at_work) is not None and not ray.wait([task], timeout=0)[0]:
            ray.cancel(task, force=True)


@functools.cache
def _task() -> Any:
    """Made once: Ray keeps each remote function as long as the driver lives."""
    import ray

    return ray.remote(_made)


def _made(function: Work, unit: Unit) -> dict[str, Any]:
    return function({"unit": [json.dumps(unit)]})


class ByRayData:
    """Calls ``function`` on all units, in a task each, some at a time."""

    def __init__(self, work: Sequence[Unit], function: Work, num_workers: int, memory: int) -> None:
        import ray.data

        workers = ray.data.TaskPoolStrategy(size=min(num_workers, len(work)))
        # No retries: a row that kills its worker would kill one after another. The caller counts tries.
        items = [{"unit": json.dumps(unit)} for unit in work]
        # A block's results come once all of its units are done, and who waits takes a long silence for a hang.
        with _settings():
            self._dataset: Any = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
                function, batch_size=1, num_cpus=1, memory=memory or None, compute=workers, max_retries=0
            )

    def blocks(self) -> Iterator[dict[str, Any]]:
        """What is made, by unit, in any order."""
        with silenced(_RAY_DATA):
            yield from self._dataset.iter_batches(batch_size=None, batch_format="numpy")

    def end(self) -> None:
        """Ends the processes of the tasks: Ray Data itself does so only where one that takes its rows leaves, and that one may be
        waiting for ever."""
        executor = getattr(self._dataset, "_current_executor", None)  # known from the first row on
        if executor is not None:
            executor.shutdown(force=True)


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """While it lasts Ray Data is set up for our work; a data set takes that over as it is made."""
    import ray.data

    context: Any = ray.data.DataContext.get_current()
    with _MAKING, silenced(_RAY_DATA), warnings.catch_warnings():
        # Its tasks' retries can be bounded in no other way.
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
        before = {key: getattr(context, key) for key in _SETTINGS}
        try:
            for key, value in _SETTINGS.items():
                setattr(context, key, value)
            yield
        finally:
            for key, value in before.items():
                setattr(context, key, value)


def mapped(
    work: Sequence[Unit], function: Work, selections: Iterable[RowSelection], num_workers: int, memory: int
) -> InOneProcess | ByRayData:
    """Calls ``function`` on each unit of the selections, in tasks that ask for a CPU and ``memory`` bytes of their node. It runs
    ``num_workers`` tasks at a time; of small data one, which is done sooner."""
    if is_small(selections):
        return InOneProcess(work, function, memory)
    return ByRayData(work, function, num_workers, memory)


def is_small(selections: Iterable[RowSelection]) -> bool:
    """Whether the local files of these rows are small, and show no images, which are other files."""
    sources = {source for selection in selections for source in selection.sources}
    if any(source.is_stored or source.images for source in sources):
        return False
    rows, text = sum(source.num_rows for source in sources), 0
    for source in sources:
        packed = _UNPACKED if source.path.lower().endswith((".parquet", ".gz", ".zst")) else 1
        text += packed * sum(sizes(Path(source.path)).values())  # of a file of the run, a store may have the only copy
    return rows <= SMALL_ROWS and text <= SMALL_BYTES
