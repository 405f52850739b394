"""What every stage needs of Ray: a connection, resources, bounded tasks, and errors in their own words."""

from __future__ import annotations

import collections
import contextlib
import errno
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
import torch

from emloc_ray.errors import EmlocError, StageError

Progress = Callable[[int, int], None]
MAX_RESTARTS = 3
_LEAN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # mallopt(3)


def silent(done: int, total: int) -> None:
    """The progress callback that shows nothing."""


@dataclass(frozen=True)
class Resources:
    """What one worker of a stage asks of Ray."""

    num_workers: int = 1
    cpus_per_worker: float = 1
    gpus_per_worker: float = 0

    def options(self) -> dict[str, float]:
        """As Ray's ``.options()`` takes them."""
        return {"num_cpus": self.cpus_per_worker, "num_gpus": self.gpus_per_worker}

    @property
    def threads(self) -> int:
        """Torch threads of one worker; more than its CPUs would fight with the other workers."""
        return max(1, int(self.cpus_per_worker))


@contextlib.contextmanager
def connection(address: str | None = None, lean_memory: bool = False, **options: Any) -> Iterator[None]:
    """Connects to Ray, or starts it here; what was started here is shut down again, what was found is left alone.

    With ``lean_memory``, workers give large freed blocks back to the system at once, where glibc would keep them in a
    heap that grows by fragments: what they hold is then what a stage needs. Measured on a CPU, a training step at 4 rows
    of 512 tokens peaked at 0.65 GiB for 1.70, at half as much time again for clearing fresh pages.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # The future default, and without a GPU there is nothing to hide.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    settings = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False, **options}
    if lean_memory:
        settings["runtime_env"] = _with_variables(settings.get("runtime_env"), _LEAN_MEMORY)
    if address is not None:
        settings.pop("include_dashboard")
    try:
        ray.init(address=address, **settings)
    except (ConnectionError, ValueError, RuntimeError) as error:
        detail = " ".join(str(error).split())[:200]
        raise StageError(f"Ray could not be started or reached ({detail}): check the ray section.") from error
    quiet_ray_data()
    try:
        yield
    finally:
        ray.shutdown()


def quiet_ray_data() -> None:
    """Our own progress speaks for Ray Data's."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    logging.getLogger("ray.train").setLevel(logging.ERROR)


def set_threads(count: int) -> None:
    """Fixes torch's threads in this worker, which also fixes the order of its sums."""
    torch.set_num_threads(count)


def _with_variables(runtime_env: Any, variables: dict[str, str]) -> dict[str, Any]:
    """A runtime environment with environment variables of ours, unless it sets them itself."""
    given = dict(runtime_env or {})
    return {**given, "env_vars": {**variables, **given.get("env_vars", {})}}


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and all that it was raised from, on this process or on a worker."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        held = (getattr(current, name, None) for name in ("cause", "_base_exc"))  # of Ray's tasks, and of Ray Train's
        pending += [*(e for e in held if isinstance(e, BaseException)), current.__cause__, current.__context__]
        pending += list(getattr(current, "worker_failures", {}).values())


def own_error(error: BaseException) -> EmlocError | None:
    """The EmlocError at the bottom of what Ray raised, as it was raised on the worker; None where there is none."""
    own = (e for e in causes(error) if isinstance(e, EmlocError) and not isinstance(e, ray.exceptions.RayError))
    return next(own, None)


def explain(error: BaseException, stage: str) -> EmlocError:
    """Any error of a stage as one of ours: the worker's own sentence, or what Ray lost and what to do."""
    own = own_error(error)
    if own is not None:
        return own
    if any(_is_out_of_memory(cause) for cause in causes(error)):
        return StageError(
            f"{stage}: a worker ran out of memory: set memory_budget to what it has, or lower its batch size or num_workers."
        )
    full = next((e for e in causes(error) if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT)), None)
    if full is not None:
        where = f" at {full.filename}" if full.filename else ""
        return StageError(f"{stage}: the disk is full{where}: free some and run the same command again.")
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    detail = (lines[-1] if lines else type(error).__name__).strip()[:300]
    return StageError(f"{stage}: {type(error).__name__}: {detail}")


class Flight:
    """Ray tasks that start in the order they are added, at most ``limit`` of them in flight."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.results: dict[int, Any] = {}
        self._waiting: collections.deque[tuple[int, Callable[[], Any]]] = collections.deque()
        self._flying: dict[Any, int] = {}
        self._added = 0

    @property
    def left(self) -> int:
        """How many are not done."""
        return len(self._waiting) + len(self._flying)

    def add(self, submit: Callable[[], Any]) -> None:
        """Queues a task; ``submit`` starts it and gives its reference."""
        self._waiting.append((self._added, submit))
        self._added += 1

    def pump(self, timeout: float | None = 0) -> bool:
        """Starts what may start and collects what has ended, waiting for one up to ``timeout`` seconds (None: as long as
        it takes); whether anything is left. Raises what a task raised."""
        while self._waiting and len(self._flying) < self.limit:
            number, submit = self._waiting.popleft()
            self._flying[submit()] = number
        if self._flying:
            ready, _ = ray.wait(list(self._flying), num_returns=1, timeout=timeout)
            for reference in ready:
                self.results[self._flying.pop(reference)] = ray.get(reference)
        return bool(self._waiting or self._flying)


def _is_out_of_memory(error: BaseException) -> bool:
    """Killed by Ray's memory monitor, refused by the operating system, or by torch's allocator, which on a CPU raises no
    kind of its own."""
    kinds = (ray.exceptions.OutOfMemoryError, MemoryError, torch.OutOfMemoryError)
    refused = isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    return refused or isinstance(error, kinds) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)


def bounded(tasks: Iterable[Callable[[], Any]], limit: int, progress: Progress, total: int) -> list[Any]:
    """Submits Ray tasks in order, at most ``limit`` in flight; their results in the order submitted."""
    flight = Flight(limit)
    for submit in tasks:
        flight.add(submit)
    left = flight.pump(None)
    while left:
        progress(len(flight.results), total)
        left = flight.pump(None)
    progress(len(flight.results), total)
    return [flight.results[number] for number in sorted(flight.results)]
