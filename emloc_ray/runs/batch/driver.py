"""Checks a batch against its models, its data and the cluster, and runs it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from emloc_ray.errors import ConfigError
from emloc_ray.io.runs.cache import ArtifactCache
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.planning.batches import keeps_small
from emloc_ray.planning.machine import free_disk
from emloc_ray.planning.plan import StagePlan
from emloc_ray.runs.batch.admission import Amount
from emloc_ray.runs.batch.config import LimitsConfig
from emloc_ray.runs.batch.runner import BatchRun
from emloc_ray.runs.batch.state import BatchState
from emloc_ray.runs.batch.tasks import Batch
from emloc_ray.runs.batch.work import PipelineWork, raise_problems
from emloc_ray.runs.changes import Accept, check_accepted
from emloc_ray.runs.gauges import BatchGauges
from emloc_ray.runs.remarks import said_once
from emloc_ray.runs.reporter import Reporter
from emloc_ray.stages.ray.nodes import grown_cluster, has_unknown_autoscaler, unseen_gpus, worker_problems
from emloc_ray.stages.ray.session import check_nodes, connection, gpus_within_reach, smallest_gpu_bytes, total
from emloc_ray.stages.ray.tasks import Resources
from emloc_ray.text import size, size_up

Show = Callable[[BatchState], None]
Tell = Callable[[str], None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PreparedBatch:
    """A checked batch; nothing was started."""

    batch: Batch
    run: RunDirectory
    work: PipelineWork


def prepare_batch(
    batch: Batch,
    progress: Progress = lambda done, total: None,
    reporter: Reporter | None = None,
    accept_versions: bool = False,
) -> PreparedBatch:
    """Checks every task against its model and data; ``reporter`` hears how the run of each task goes.

    ``accept_versions``: as for :func:`emloc_ray.runs.run.run`.

    Raises:
        ConfigError: with every error of every task at once.
    """
    run = RunDirectory(batch.config.run_dir)
    run.check("batch")
    cache = ArtifactCache(batch.config.cache.path, batch.config.cache.max_size, batch.config.has_own_cache)
    cache.check()
    work = PipelineWork(cache, reporter, accept_versions, run)
    work.prepare(batch.tasks, progress)
    return PreparedBatch(batch, run, work)


def check_free(run: RunDirectory) -> None:
    """Raises ConfigError where a process runs the batch now. On an object store :meth:`RunDirectory.lock` alone tells, by the
    store's clock: by this machine's a holder may seem to be alive, or dead."""
    holder = run.holder() if run.store is None else None
    if holder is not None:
        raise ConfigError(
            f"{run.place} is run by {holder}: stop that with Ctrl-C, then give this command again: it continues from there."
        )


def lacking_disk(prepared: PreparedBatch) -> str | None:
    """A remark where the disk has less free than all tasks will write that they do not share: each of them alone may fit."""
    run = prepared.run
    if run.store is not None:  # which has room
        return None
    needed, free = sum(map(prepared.work.own_disk, prepared.batch.tasks)), free_disk(run)
    if needed <= free:
        return None
    return (
        f"All tasks together write about {size_up(needed)} besides what they share, and the disk of {run.place} has {size(free)}"
        " free: make room, or name another place."
    )


def lacking_cache(prepared: PreparedBatch) -> str | None:
    """A remark where a task alone makes more to share than the cache may hold: each artifact would drive out the one before."""
    cache, shared = prepared.work.cache, map(prepared.work.shared_bytes, prepared.batch.tasks)
    if cache is None or cache.max_bytes is None or (needed := max(shared, default=0)) <= cache.max_bytes:
        return None
    return (
        f"cache.max_size {size(cache.max_bytes)} is less than the {size_up(needed)} that one task shares with others: what it"
        " puts there first would be removed before others take it, and made again. Raise it, or leave it out."
    )


def run_batch(
    prepared: PreparedBatch,
    show: Show = lambda state: None,
    tell: Tell = lambda text: None,
    accept_changes: Accept = False,
) -> BatchState:
    """Runs every task that is not cancelled, and checks those that are done; returns how all ended.

    ``accept_changes``: as for :func:`emloc_ray.runs.run.run`.

    Raises:
        ConfigError: where a task asks for what the cluster does not have, or would redo or remove unasked what is finished;
            nothing was begun.
    """
    batch, run = prepared.batch, prepared.run
    try:
        run.lock(tell)
        prepared.work.check_num_gpus()
        prepared.work.check_rows()
        check_accepted([] if accept_changes is True else prepared.work.changes(batch.tasks), accept_changes)
        run.create(batch.config.model_dump(mode="json"), kind="batch")
        lean = any(keeps_small(prepared.work.config(task)) for task in batch.tasks)
        with connection(batch.ray.address, lean, tell, **batch.ray.init_options) as started, prepared.work.actors:
            if not started:
                prepared.work.with_gpus(gpus_within_reach(), smallest_gpu_bytes())
                check_nodes([prepared.work.config(task) for task in batch.tasks])
                if remark := unseen_gpus(sorted({key for task in batch.tasks for key in task.config.undecided_gpus})):
                    tell(remark)
            check_fit(prepared)
            capacity = functools.partial(cluster_capacity, batch.config.limits, largest_stage(prepared))
            for remark in said_once((prepared.work.config(task) for task in batch.tasks), total("CPU")):
                tell(remark)
            gauges = BatchGauges(run.name, prepared.work.cache)

            def show_all(state: BatchState) -> None:
                gauges.show(state)
                show(state)

            return BatchRun(
                run, batch.tasks, prepared.work, capacity, batch.config.max_concurrent, show_all, tell
            ).run()
    finally:
        run.unlock()


def check_fit(prepared: PreparedBatch) -> None:
    """Raises ConfigError naming every task that can never run on the cluster, which may grow as far as its autoscaler says, or to
    the batch's limits."""
    problems: dict[str, list[str]] = {}
    for task in prepared.batch.tasks:
        for problem in _unfit(prepared.work.stages(task), prepared.batch.config.limits):
            problems.setdefault(problem, []).append(task.name)
    raise_problems(problems)


def largest_stage(prepared: PreparedBatch) -> Amount:
    """The most of each resource that a stage of a task needs at once."""
    needs = (_needed(stage) for task in prepared.batch.tasks for stage in prepared.work.stages(task))
    return functools.reduce(Amount.larger, needs, Amount())


def cluster_capacity(limits: LimitsConfig, least: Amount) -> Amount:
    """The batch's ``limits`` of CPUs, GPUs and memory; without a limit the cluster's, with all that an autoscaler may
    add. Where that does not say, twice what is up, and the ``least``: so that stages wait in Ray, for which it adds nodes, of a
    kind too of which none is up."""
    whole = _amount(grown_cluster())
    if has_unknown_autoscaler():
        whole = (whole * 2).larger(least)
    return Amount(
        whole.cpus if limits.cpus is None else limits.cpus,
        whole.gpus if limits.gpus is None else limits.gpus,
        whole.memory if limits.memory is None else float(limits.memory),
    )


def _unfit(stages: Sequence[StagePlan], limits: LimitsConfig) -> list[str]:
    """A sentence for each stage that can never run: its workers do not fit on the nodes, or exceed the limits."""
    asked = [
        (s.name, Resources(s.num_workers, s.cpus_per_worker, s.gpus_per_worker, s.host_bytes), s.together)
        for s in stages
    ]
    named = {"CPU": limits.cpus, "GPU": limits.gpus, "memory": limits.memory}
    grown = {kind: float(amount) for kind, amount in named.items() if amount is not None}
    problems = [
        f"{problem.removesuffix('.')}; if the cluster is to grow, name how far in the batch's limits."
        for problem in worker_problems(asked, grown)
    ]
    most = _amount({**dict.fromkeys(("CPU", "GPU", "memory"), math.inf), **grown})
    for stage in stages:
        together = _needed(stage)
        if not together.fits_in(most):
            problems.append(f"{stage.name} needs {_text(together)} at once: ask for less, or raise the batch's limits.")
    return problems


def _needed(stage: StagePlan) -> Amount:
    """What it needs at once: of a bag of tasks one worker."""
    worker = Amount(stage.cpus_per_worker, stage.gpus_per_worker, stage.host_bytes)
    return worker if stage.divisible else worker * stage.num_workers


def _amount(resources: Mapping[str, float]) -> Amount:
    """Ray's resources; the memory includes Ray's object store."""
    memory = resources.get("memory", 0.0) + resources.get("object_store_memory", 0.0)
    return Amount(resources.get("CPU", 0.0), resources.get("GPU", 0.0), memory)


def _text(amount: Amount) -> str:
    gpus = f", {amount.gpus:g} GPUs" if amount.gpus else ""
    return f"{amount.cpus:g} CPUs{gpus} and {size(amount.memory)}"
