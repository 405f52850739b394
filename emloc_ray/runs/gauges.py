"""Ray metrics of runs and batches: on every node's Prometheus endpoint, with Ray's prefix ``ray_``, and on Ray's dashboard.

Lost workers are counted where they are lost: :mod:`emloc_ray.stages.ray.losses`.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge

from emloc_ray.errors import EmlocError, Stopped
from emloc_ray.io.runs.cache import ArtifactCache
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.io.store.stored_files import shown
from emloc_ray.runs.batch.state import BatchState
from emloc_ray.runs.reporter import Reporter

_KEYS = ("run", "stage")
_LOOK_S = 5.0  # between two looks at the lease and the disk


class _CacheGauge:
    """Sets the gauge of a cache, if there is one, that a run or a batch shares: by its place, as several may."""

    def __init__(self, cache: ArtifactCache | None) -> None:
        self.cache = cache
        self._bytes = Gauge("emloc_ray_cache_bytes", "Bytes that a cache holds.", ("cache",))
        if cache is not None and cache.held_bytes is None:
            cache.weigh()

    def show(self) -> None:
        if self.cache is not None and (held := self.cache.held_bytes) is not None:
            self._bytes.set(held, {"cache": shown(self.cache.place)})


class RunGauges(Reporter):
    """Sets the gauges of one run, in the stage's own units; needs a connection to Ray. Gauges stay where a stage left them. As
    a context it says that the run has failed, and by which kind of error: ``NumericsError`` is a NaN or an Inf."""

    def __init__(self, run: RunDirectory, cache: ArtifactCache | None = None) -> None:
        self.run, self._looked_at = run, 0.0
        self._cache = _CacheGauge(cache)
        self._done = Gauge("emloc_ray_units_done", "Units of a stage that are done.", _KEYS)
        self._total = Gauge("emloc_ray_units_total", "Units of a stage in all.", _KEYS)
        self._seconds = Gauge("emloc_ray_stage_seconds", "Seconds that a stage has run.", _KEYS)
        self._tokens = Gauge("emloc_ray_tokens_per_second", "Tokens a second of a stage that has finished.", _KEYS)
        self._taken = Counter("emloc_ray_cache_hits", "Stages that were taken from the cache.", _KEYS)
        self._failed = Gauge("emloc_ray_failed", "1 where a run has failed, by the kind of error.", ("run", "kind"))
        self._lease = Gauge("emloc_ray_lease_age_seconds", "Seconds since the run's lease was renewed.", ("run",))
        self._free = Gauge("emloc_ray_bytes_free", "Free bytes where the driver reads and writes the run.", ("run",))

    def __enter__(self) -> RunGauges:
        return self

    def __exit__(self, kind: object, error: object, at: object) -> None:
        if isinstance(error, EmlocError) and not isinstance(error, Stopped):
            self._failed.set(1, {"run": self.run.name, "kind": type(error).__name__})

    def start(self, stage: str) -> Callable[[int, int], None]:
        """A stage begins."""
        tags, begun_at = {"run": self.run.name, "stage": stage}, time.monotonic()

        def progress(done: int, total: int) -> None:
            self._done.set(done, tags)
            self._total.set(total, tags)
            self._seconds.set(time.monotonic() - begun_at, tags)
            self._look()

        return progress

    def finish(self, stage: str, result: dict[str, Any], usage: dict[str, Any]) -> None:
        """A stage has finished."""
        tags, seconds = {"run": self.run.name, "stage": stage}, usage["wall_s"]
        self._seconds.set(seconds, tags)
        self._cache.show()
        if result.get("taken_from"):
            self._taken.inc(1, tags)
        elif seconds and (tokens := tokens_of(result)):
            self._tokens.set(tokens / seconds, tags)

    def _look(self) -> None:
        if time.monotonic() - self._looked_at < _LOOK_S:
            return
        self._looked_at, tags = time.monotonic(), {"run": self.run.name}
        self._cache.show()
        if (age := self.run.lease_age_s) is not None:
            self._lease.set(age, tags)
        with contextlib.suppress(OSError):  # nothing of an object store has been read here yet
            self._free.set(shutil.disk_usage(self.run.root).free, tags)


def tokens_of(result: Mapping[str, Any]) -> int:
    """The tokens that a stage's result says it read; 0 where it does not say."""
    counted = [result, *result.get("evaluation", {}).values()]
    return sum(part.get("num_tokens", 0) for part in counted)


class BatchGauges:
    """Sets the gauges of a batch; needs a connection to Ray."""

    def __init__(self, batch: str, cache: ArtifactCache | None) -> None:
        self.batch, self._cache = batch, _CacheGauge(cache)
        self._tasks = Gauge("emloc_ray_tasks", "Tasks of a batch by status.", ("batch", "status"))
        self._queue = Gauge("emloc_ray_stages_queued", "Stages of running tasks that wait for resources.", ("batch",))

    def show(self, state: BatchState) -> None:
        """Sets them to a batch's state."""
        for status in ("waiting", "running", "done", "failed", "cancelled"):
            self._tasks.set(state.count(status), {"batch": self.batch, "status": status})
        queued = sum(task.status == "running" and task.waits_for == "resources" for task in state.tasks)
        self._queue.set(queued, {"batch": self.batch})
        self._cache.show()
