"""Ray tasks: each kind made once, a bounded number in flight, restarted where their worker is lost."""

from __future__ import annotations

import contextlib
import functools
import heapq
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import ray
import torch

from emloc_ray.errors import ArtifactError, StageError
from emloc_ray.io.store.node_cache import existing
from emloc_ray.stages.ray.losses import Losses
from emloc_ray.stages.ray.pace import Pace
from emloc_ray.stages.ray.spans import Timed, tell_span, timed

Progress = Callable[[int, int], None]
Look = Callable[[int, int], object]
"""A progress callback that may return what tasks have left so far; another value than before says that they go on."""
Work = TypeVar("Work")
Value = TypeVar("Value")
Next = Literal["more", "over", "again"]  # after what a task gave
_TASKS_A_WORKER = 16
LOOK_S = 1.0  # between two looks at tasks in flight
_HIDES_NONE = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"


def silent(done: int, total: int) -> None:
    """The progress callback that shows nothing."""


def newest(ask: Callable[[], Value], first: Value, clock: Callable[[], float] = time.monotonic) -> Callable[[], Value]:
    """``ask`` for looks that end nothing: where a store or a file system does not answer, what it said last, ``first`` before.

    It is asked for at most a twentieth of the time: a list of 50,000 files takes about a second of the driver.
    """
    last, due = first, clock()

    def said() -> Value:
        nonlocal last, due
        begin = clock()
        if begin >= due:
            with contextlib.suppress(ArtifactError, OSError):
                last = ask()
            due = clock() + 19 * (clock() - begin)
        return last

    return said


# Workers that asked Ray for no GPU see none: torch would take the first, whoever else was given it.
NO_GPU_UNASKED = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}


def _gpus_are_hidden() -> bool:
    """Whether workers without a GPU of their own see none anyway: as where we started or joined Ray, not our caller."""
    if not ray.is_initialized():
        return True
    variables = ray.get_runtime_context().runtime_env.get("env_vars") or {}
    return NO_GPU_UNASKED.items() <= variables.items() or not ray.cluster_resources().get("GPU")


@functools.cache
def _on_worker(function: Callable[..., Any], threads: int) -> Callable[..., Iterator[Timed | None]]:
    """The function as a worker runs it: it gives None once it has begun, for until then it may wait for a worker, then the
    result, timed; with so many torch threads, which also fixes the order of its sums."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Iterator[Timed | None]:
        yield None
        set_threads(threads)
        yield timed(function)(*arguments)

    return run


def remote_task(function: Callable[..., Any], **options: Any) -> Any:
    """A function as a Ray task with these options, one for each function and choice of options.

    Ray takes whatever ``ray.remote`` makes for a kind of task of its own, with leases, queues and an exported function that are
    kept as long as the driver lives: some 10 KB and 2 ms a call, of the ten thousand in a batch of 500 tasks.
    """
    return _remote_task(function, not options.get("num_gpus") and not _gpus_are_hidden(), **options)


@functools.cache
def _remote_task(function: Callable[..., Any], hides_gpus: bool, **options: Any) -> Any:
    if hides_gpus:
        options["runtime_env"] = {"env_vars": NO_GPU_UNASKED}
    made: Any = ray.remote(**options)
    return made(function)


@dataclass(frozen=True)
class Resources:
    """What one worker of a stage asks of Ray."""

    num_workers: int = 1
    cpus_per_worker: float = 1
    gpus_per_worker: float = 0
    memory_per_worker: int = 0  # bytes; 0 asks for none
    planned_s: float = 0.0  # what the stage was planned to take; 0 where that is not known

    def options(self) -> dict[str, float]:
        """Arguments of Ray's ``.options()``."""
        memory = {"memory": self.memory_per_worker} if self.memory_per_worker else {}
        return {"num_cpus": self.cpus_per_worker, "num_gpus": self.gpus_per_worker, **memory}

    def task_options(self) -> dict[str, float]:
        """Those of a task that :class:`Flight` begins again where its worker is lost: Ray itself would do so without a
        word, and where memory runs out, for ever."""
        return {**self.options(), "max_retries": 0}

    def task(self, function: Callable[..., Any], alone: bool = False) -> Any:
        """A function as a Ray task with :meth:`task_options` and :attr:`threads`, whose result a :class:`Flight` takes;
        ``alone``: in a process that ends with it.

        The task is made with its options, not given them later. Only then does Ray end the process of a task that had a GPU. A
        process that stays would keep torch's memory, and its GPU, where the next task is given another.
        """
        more = {"max_calls": 1} if alone else {}
        options: dict[str, Any] = {**self.task_options(), "num_returns": "streaming", **more}
        return remote_task(_on_worker(function, self.threads), **options)

    @property
    def threads(self) -> int:
        """Torch threads of one worker; more than its CPUs would fight with the other workers."""
        return max(1, int(self.cpus_per_worker))

    @property
    def device(self) -> str:
        """Where a worker computes: on a GPU only where Ray was asked for one."""
        return "cuda" if self.gpus_per_worker else "cpu"


def set_threads(count: int, in_group: bool = False) -> None:
    """Fixes torch's threads in this worker, which also fixes the order of its sums. Raises StageError where Ray granted it a
    GPU that torch cannot open; it would compute on the CPU without a word.

    Where a node asks Ray to hide no GPU (https://docs.ray.io/en/latest/ray-core/scheduling/accelerators.html), this worker sees
    none but those that it was granted; one ``in_group`` is told its own by Ray Train.
    """
    torch.set_num_threads(count)
    granted = ray.get_gpu_ids() if ray.is_initialized() else []
    if os.environ.get(_HIDES_NONE, "").lower() in ("1", "true") and ray.is_initialized() and not in_group:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, granted))
    if granted and not torch.cuda.is_available():
        raise StageError(
            f"Ray granted a worker on {socket.gethostname()} GPU {', '.join(map(str, granted))}, which torch {torch.__version__}"
            " cannot open: install a torch for its driver there, or set gpus_per_worker to 0."
        )


@dataclass(eq=False)
class FlightTask:
    """A task of a :class:`Flight`: its name, the function that starts it, the earliest start (monotonic clock), its progress
    and its result. ``submit`` starts one of :meth:`Resources.task`, so that its begin, its time and its memory are known.
    ``opens``: what it does first is no piece of work yet, as to open a model."""

    name: str
    submit: Callable[[], Any]
    begin: float = 0.0
    reached: int | None = None
    result: Any = None
    opens: bool = False

    def waits(self) -> bool:
        """Whether what it gives is not taken yet: a generator goes on once that is."""
        return False

    def take(self, given: Timed, losses: Losses) -> Next:
        """Keeps what the task gave."""
        tell_span(replace(given.span, stage=losses.stage, unit=self.name))
        self.result = given.result
        return "over"


class Flight:
    """Ray tasks that start in the order they are added, at most ``limit`` of them in flight; lost ones, and those that take much
    longer than others, start again.

    As a context it ends what is in flight where the block raises: nobody waits for it any more; what was written whole stays.
    With ``force`` their processes end with them.
    """

    def __init__(self, limit: int, losses: Losses, planned_s: float = 0.0, force: bool = False) -> None:
        """``planned_s``: as for :class:`Pace`."""
        self.limit, self.losses, self.force = limit, losses, force
        self._waiting: list[FlightTask] = []
        self._flying: dict[Any, FlightTask] = {}
        self._pace = Pace(planned_s)

    @property
    def left(self) -> int:
        """How many are not done."""
        return len(self._waiting) + len(self._flying)

    @property
    def held(self) -> bool:
        """Whether all that fly wait."""
        return bool(self._flying) and all(piece.waits() for piece in self._flying.values())

    def add(self, piece: FlightTask) -> None:
        """Queues a task."""
        self._waiting.append(piece)

    def pump(self, timeout: float = 0) -> bool:
        """Starts what may start and takes what a task gives, waiting for one up to ``timeout`` seconds; whether anything is
        left. Raises what a task raised."""
        self.losses.look()
        for task, why in self._pace.end_overdue():
            piece = self._flying.pop(task)
            self._again(piece, self.losses.give_up_waiting(piece.name, why, at=piece.reached))
        now = time.monotonic()
        ready = [piece for piece in self._waiting if piece.begin <= now]
        for piece in ready[: self.limit - len(self._flying)]:
            self._waiting.remove(piece)
            self._flying[piece.submit()] = piece
        timeout = min([timeout, *(piece.begin - now for piece in self._waiting if piece.begin > now)])
        if going := [task for task, piece in self._flying.items() if not piece.waits()]:
            for task in ray.wait(going, num_returns=1, timeout=timeout)[0]:
                self._take(task)
        else:
            time.sleep(timeout)
        return self.left > 0

    def see(self, left: object) -> None:
        """As :meth:`Pace.see`."""
        self._pace.see(left)

    def __enter__(self) -> Flight:
        return self

    def __exit__(self, kind: object, error: object, at: object) -> None:
        if kind is not None:
            for task in self._flying:
                ray.cancel(task, force=self.force)

    def _again(self, piece: FlightTask, delay: float) -> None:
        piece.begin = time.monotonic() + delay
        self._waiting.insert(0, piece)

    def _over(self, task: Any) -> None:
        del self._flying[task]
        self._pace.over(task)

    def _take(self, task: Any) -> None:
        piece = self._flying[task]
        try:
            given: Timed | None = ray.get(next(task))
        except ray.exceptions.RayError as error:
            self._over(task)  # its worker may be at another's work, which a cancel would kill
            self._again(piece, self.losses.record_lost_worker(piece.name, error, piece.reached))
            return
        self._pace.gave(task, starts=given is None and piece.opens)
        if given is None or (follows := piece.take(given, self.losses)) == "more":  # it has begun, or goes on
            return
        self._over(task)
        if follows == "again":
            self._again(piece, 0.0)


def bounded(
    tasks: Iterable[tuple[str, Callable[[], Any]]],
    limit: int,
    losses: Losses,
    progress: Look = silent,
    look_s: float = LOOK_S,
    planned_s: float = 0.0,
) -> list[Any]:
    """Submits named Ray tasks in order, at most ``limit`` in flight; their results in the order submitted. ``progress`` hears
    how many have ended, or of how many ``losses.files`` they have written, at least every ``look_s`` seconds. ``planned_s``: as
    for :class:`Pace`."""
    pieces = [FlightTask(name, submit) for name, submit in tasks]
    progress = _by_files(losses, progress) if losses.files else progress
    with Flight(limit, losses, planned_s) as flight:
        for piece in pieces:
            flight.add(piece)
        while flight.pump(look_s):  # one that waits for a worker, or works for hours, is asked after all the same
            flight.see(progress(len(pieces) - flight.left, len(pieces)))
        progress(len(pieces), len(pieces))
    return [piece.result for piece in pieces]


def _by_files(losses: Losses, progress: Look) -> Look:
    """The callback, which hears of the files that tasks write one after another: some take all their work as one piece."""
    files = [file for of_piece in losses.files.values() for file in of_piece]
    written = newest(lambda: len(existing(files)), 0)

    def look(done: int, total: int) -> int | None:
        count = len(files) if done == total else written()
        progress(count, len(files))
        return count if len(files) > total else None  # what writes one file goes on until it ends

    return look


def run_tasks(
    function: Callable[..., Any],
    shared: Any,
    pieces: Sequence[tuple[str, tuple[Any, ...]]],
    resources: Resources,
    losses: Losses,
    progress: Look = silent,
) -> list[Any]:
    """:func:`bounded` of a task ``function(shared, *arguments)`` for each of the ``pieces``, a name and arguments; ``shared``
    is sent once, and not held here meanwhile."""
    if not pieces:
        return []
    task, reference = resources.task(function), ray.put(shared)
    del shared

    def submit(name: str, arguments: tuple[Any, ...]) -> Any:
        return task.options(name=f"{losses.stage}: {name}").remote(reference, *arguments)

    named = [(name, functools.partial(submit, name, arguments)) for name, arguments in pieces]
    return bounded(named, resources.num_workers, losses, progress, planned_s=resources.planned_s)


def bundles(pieces: Sequence[Work], cost: Callable[[Work], float], resources: Resources) -> list[list[Work]]:
    """Groups pieces into tasks of about equal cost, because each task reads anew what all share: at most :data:`_TASKS_A_WORKER`
    tasks a worker, each piece alone where there are no more. One task a worker with a GPU: Ray ends such a task's process, and
    a new one takes seconds to import torch and to open the card."""
    tasks = resources.num_workers * (1 if resources.gpus_per_worker else _TASKS_A_WORKER)
    if len(pieces) <= tasks:
        return [[piece] for piece in pieces]
    made: list[list[Work]] = [[] for _ in range(tasks)]
    costs = [(0.0, number) for number in range(tasks)]
    for piece in sorted(pieces, key=cost, reverse=True):
        least, number = heapq.heappop(costs)
        made[number].append(piece)
        heapq.heappush(costs, (least + cost(piece), number))
    return made
