"""Begins a batch, goes on with it, or hands its new tasks to whoever runs it already."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from emloc_ray.runs.batch.admission import Admission
from emloc_ray.runs.batch.board import Board
from emloc_ray.runs.batch.capacity import cluster_capacity, unfit
from emloc_ray.runs.batch.config import deadline_text
from emloc_ray.ui.batch_page import write_batch_report
from emloc_ray.runs.batch.runner import BatchRun
from emloc_ray.runs.batch.state import BatchState, TaskState, ask, check_names, read_state, write_state
from emloc_ray.runs.batch.summary import write_summary
from emloc_ray.runs.batch.tasks import Batch, Task
from emloc_ray.runs.batch.work import PipelineWork
from emloc_ray.errors import ConfigError
from emloc_ray.io.runs.cache import ArtifactCache
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.runs.remarks import of_machines

_LEAST_CONCURRENT, _MOST_CONCURRENT = 4, 64
_POLL_S = 0.5

Show = Callable[[BatchState], None]
Tell = Callable[[str], None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Prepared:
    """A batch that has been checked whole; nothing was started."""

    batch: Batch
    run: RunDirectory
    cache: ArtifactCache
    work: PipelineWork


@dataclass(frozen=True)
class Handed:
    """What the process ``holder`` took of a batch: the ``new`` tasks; not those ``changed`` since it was given them."""

    holder: str
    new: tuple[str, ...]
    changed: tuple[str, ...]


def prepare_batch(batch: Batch, progress: Progress = lambda done, total: None) -> Prepared:
    """Checks every task against its model and data.

    Raises:
        ConfigError: with every error of every task at once.
    """
    run = RunDirectory(batch.config.run_dir)
    run.check("batch")
    cache = ArtifactCache(batch.config.cache.path, batch.config.cache.max_size)
    cache.check()
    work = PipelineWork(cache)
    lines = _passed(batch.tasks, read_state(run))
    try:
        work.prepare(batch.tasks, progress)
    except ConfigError as error:
        lines.append(str(error))
    if lines:
        raise ConfigError("\n".join(lines))
    return Prepared(batch, run, cache, work)


def _passed(tasks: Sequence[Task], state: BatchState | None) -> list[str]:
    """Says whose deadline passed before they were in the batch: of those that were, what is done is to stay good."""
    known = {task.name for task in state.tasks} if state else set()
    return [
        f"task {task.name}: its deadline {deadline_text(task.deadline)} has passed: give a later one, or take it out."
        for task in tasks
        if isinstance(task.deadline, datetime) and task.deadline.timestamp() <= time.time() and task.name not in known
    ]


def run_batch(prepared: Prepared, show: Show = lambda state: None, tell: Tell = lambda text: None) -> BatchState:
    """Runs every task that is not cancelled, those that are done to see that they still are; returns how all ended.

    Raises:
        ConfigError: where a task asks for what the cluster does not have; nothing was begun.
    """
    from emloc_ray.stages.ray.tasks import connection

    batch, run = prepared.batch, prepared.run
    try:
        run.lock(tell)
        run.create(batch.config.model_dump(mode="json"), kind="batch")
        board = begin_board(prepared)
        lean = any(task.config.memory_budget is not None for task in batch.tasks)
        with connection(batch.ray.address, lean_memory=lean, **batch.ray.init_options):
            check_fit(prepared)
            for remark in of_machines(task.config for task in batch.tasks):
                tell(remark)
            return _run(prepared, board, show, tell)
    finally:
        run.unlock()


def check_fit(prepared: Prepared) -> None:
    """Raises ConfigError naming every task that could never run on the cluster."""
    problems: dict[str, list[str]] = {}
    for task in prepared.batch.tasks:
        for problem in unfit(prepared.work.stages(task), prepared.batch.config.limits):
            problems.setdefault(problem, []).append(task.name)
    if problems:
        lines = (
            f"task {', '.join(names[:3])}{f' and {len(names) - 3} others' if len(names) > 3 else ''}: {problem}"
            for problem, names in problems.items()
        )
        raise ConfigError("\n".join(lines))


def begin_board(prepared: Prepared) -> Board:
    """The board as an earlier run left it, written at once: from now on tasks can be handed over, cancelled and looked at."""
    before = read_state(prepared.run)
    known = {task.name: task for task in before.tasks} if before else {}
    board = Board(before.started_at if before else time.time())
    for task in prepared.batch.tasks:
        state = known.get(task.name, TaskState(task.name))
        if state.status not in ("done", "cancelled"):  # it is begun (again)
            state = TaskState(task.name, to_cancel=state.to_cancel)
        board.put(replace(state, digest=task.digest))
    write_state(prepared.run, board.state())
    return board


def _run(prepared: Prepared, board: Board, show: Show, tell: Tell) -> BatchState:
    batch, run, limits = prepared.batch, prepared.run, prepared.batch.config.limits
    admission = Admission(lambda: cluster_capacity(limits))

    def concurrent() -> int:
        """Of the cluster as it is now, which may have grown: two tasks a GPU, or a CPU up to a bound."""
        whole = cluster_capacity(limits)
        on_cpus = min(max(2 * int(whole.cpus), _LEAST_CONCURRENT), _MOST_CONCURRENT)
        return batch.config.max_concurrent or max(on_cpus, 2 * int(whole.gpus))

    begun = BatchRun(
        run,
        board,
        prepared.work,
        admission,
        concurrent,
        show,
        tell,
        ray=batch.ray,
        unfit=lambda task: unfit(prepared.work.stages(task), limits),
    )
    for task in batch.tasks:
        cancelled = board[task.name].is_cancelled
        begun.add(task)
        if cancelled:
            begun.cancel(task.name, "by an earlier request")
    while True:
        state = begun.run()
        write_summary(run, state)
        write_batch_report(run, state)
        if not begun.hear():  # what was asked while those were written
            return state


def hand_over(prepared: Prepared) -> Handed | None:
    """Gives the tasks that are new, that did not end well or that changed since they ended to the process that runs the
    batch, and waits until it has taken them; None where nobody runs it (any more): then it is to be run."""
    run = prepared.run
    state, holder = _held_state(run)
    if state is None:
        return None
    there = {task.name: task for task in state.tasks}
    new: list[Task] = []
    changed: list[Task] = []
    for task in prepared.batch.tasks:
        state_there = there.get(task.name)
        if state_there is None or state_there.status in ("failed", "late"):
            new.append(task)
        elif state_there.digest != task.digest:
            (new if state_there.is_over else changed).append(task)
    if new and not _taken(run, ask(run, {"add": [task.as_dict() for task in new]})):
        return None
    return Handed(holder, tuple(task.name for task in new), tuple(task.name for task in changed))


def _held_state(run: RunDirectory) -> tuple[BatchState | None, str]:
    """The batch's state and who runs it, once that has written it; no state where nobody runs it."""
    while (holder := run.holder()) is not None:
        state = read_state(run)
        if state is not None:
            return state, holder
        time.sleep(_POLL_S)
    return None, ""


def _taken(run: RunDirectory, request: str) -> bool:
    """Waits for who runs the batch to take a request; whether it did, before it was gone."""
    while request in run.names():
        if run.holder() is None:
            return request not in run.names()
        time.sleep(_POLL_S)
    return True


def cancel(run: RunDirectory, names: list[str], restore: bool = False) -> bool:
    """Asks for tasks to be ended, or where they were cancelled to be run again; whether somebody runs the batch now.

    Raises:
        ConfigError: where it is no batch, or has no such task.
    """
    state = read_state(run)
    if state is None:
        raise ConfigError(f"{run.place} is no batch's directory: name the run_dir of one.")
    check_names(state, names, run.place)
    ask(run, {"restore" if restore else "cancel": names})
    return run.holder() is not None
