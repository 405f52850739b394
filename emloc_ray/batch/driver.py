"""Begins a batch, goes on with it, or hands its new tasks to whoever runs it already."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from emloc_ray.batch.admission import Admission
from emloc_ray.batch.board import Board, ended
from emloc_ray.batch.capacity import cluster_capacity, unfit
from emloc_ray.batch.report import write_batch_report
from emloc_ray.batch.runner import BatchRun
from emloc_ray.batch.state import BatchState, TaskState, ask, check_names, read_state, requests
from emloc_ray.batch.summary import write_summary
from emloc_ray.batch.tasks import Batch, Task
from emloc_ray.batch.work import PipelineWork
from emloc_ray.errors import ConfigError
from emloc_ray.io.artifact_cache import ArtifactCache
from emloc_ray.io.run_directory import RunDirectory

_LEAST_CONCURRENT, _MOST_CONCURRENT = 4, 64

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
    work.prepare(batch.tasks, progress)
    return Prepared(batch, run, cache, work)


def run_batch(prepared: Prepared, show: Show = lambda state: None, tell: Tell = lambda text: None) -> BatchState:
    """Runs every task that is not cancelled, those that are done to see that they still are; returns how all ended.

    Raises:
        ConfigError: where a task asks for what the cluster does not have; nothing was begun.
    """
    from emloc_ray.stages.cluster import connection

    batch, run = prepared.batch, prepared.run
    try:
        run.lock(tell)
        run.create(batch.config.model_dump(mode="json"), kind="batch")
        lean = any(task.config.memory_budget is not None for task in batch.tasks)
        with connection(batch.ray.address, lean_memory=lean, **batch.ray.init_options):
            check_fit(prepared)
            state = _run(prepared, show, tell)
        write_summary(run, state)
        write_batch_report(run, state)
        return state
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
            f"task {', '.join(names[:3])}{f' and {len(names) - 3} others' if len(names) > 3 else ''}: {problem}: lower what"
            " it asks for, or name in the batch's limits what the cluster grows to."
            for problem, names in problems.items()
        )
        raise ConfigError("\n".join(lines))


def _run(prepared: Prepared, show: Show, tell: Tell) -> BatchState:
    batch, run = prepared.batch, prepared.run
    before = read_state(run)
    board = Board(before.started_at if before else time.time())
    cancelled = {task.name for task in before.tasks if task.status == "cancelled"} if before else set()
    cancelled = _asked_before(run, cancelled)
    limits = batch.config.limits
    admission = Admission(lambda: cluster_capacity(limits))
    whole = cluster_capacity(limits)
    concurrent = batch.config.max_concurrent or min(max(2 * int(whole.cpus), _LEAST_CONCURRENT), _MOST_CONCURRENT)
    begun = BatchRun(run, board, prepared.work, admission, concurrent, show, tell, ray=batch.ray)
    for task in batch.tasks:
        if task.name in cancelled:
            board.put(TaskState(task.name))
            ended(board, task.name, "cancelled", "by an earlier request")
        else:
            begun.add(task)
    return begun.run()


def _asked_before(run: RunDirectory, cancelled: set[str]) -> set[str]:
    """The tasks that are cancelled after what was asked for while nobody ran the batch; tasks are added by its config."""
    for request in requests(run):
        cancelled = (cancelled | set(request.get("cancel", []))) - set(request.get("restore", []))
    return cancelled


def hand_over(prepared: Prepared) -> list[Task]:
    """Gives the tasks that are new, or that failed, to the process that runs the batch; returns them.

    Raises:
        ConfigError: where the batch is not run by anybody.
    """
    run = prepared.run
    state = read_state(run)
    if run.holder() is None or state is None:
        raise ConfigError(f"{run.place} is run by nobody: emloc-ray batch begins it.")
    busy = {task.name for task in state.tasks if task.status not in ("failed", "late")}
    new = [task for task in prepared.batch.tasks if task.name not in busy]
    if new:
        ask(run, {"add": [task.as_dict() for task in new]})
    return new


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
