"""One run: import, calibrate, factorize, heal, finetune, correct, merge, evaluate; each is skipped where it is done."""

import contextlib
from collections.abc import Collection, Container, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from emloc_ray.config.schema import RunConfig
from emloc_ray.config.steps import VERBS
from emloc_ray.errors import ConfigError, DamagedArtifactError
from emloc_ray.io.runs.cache import ArtifactCache
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.planning.batches import keeps_small, shrink_batches
from emloc_ray.planning.budget import check_holding
from emloc_ray.planning.first_rows import check_first_rows
from emloc_ray.planning.machine import check_disk, check_kernel, check_num_gpus, check_resources
from emloc_ray.planning.plan import Plan, check_stages, make_plan, missing_disk
from emloc_ray.planning.prepared import Prepared, prepare
from emloc_ray.runs import remarks
from emloc_ray.runs.changes import Accept, check_accepted, find_changes, is_finished, outdated_stage, unfinished
from emloc_ray.runs.gauges import RunGauges
from emloc_ray.runs.log import RunLog
from emloc_ray.runs.reporter import Reporter, Reporters
from emloc_ray.runs.steps import Dropped, Steps, resources_of
from emloc_ray.runs.trace import WorkerTrace
from emloc_ray.runs.turns import AtOnce, Turns
from emloc_ray.runs.versions import check_versions, redone_from
from emloc_ray.stages.context import Context
from emloc_ray.stages.importing import original_dir
from emloc_ray.stages.order import STEPS, up_to
from emloc_ray.stages.ray.final_actor import FinalActorHandle, FinalActors
from emloc_ray.stages.ray.losses import explain
from emloc_ray.stages.ray.nodes import check_workers, unseen_gpus
from emloc_ray.stages.ray.session import (
    check_nodes,
    check_visible,
    connection,
    gpus_within_reach,
    smallest_gpu_bytes,
    total,
)
from emloc_ray.stages.tokens.stage import DATA

_GATHERED = "gradients"  # with it, what the original is held for before the emulator is there


@dataclass(frozen=True)
class InBatch:
    """What a task shares with its batch: when each of its stages may start, the batch's locked directory, its final actors."""

    turns: Turns
    directory: RunDirectory | None
    actors: FinalActors | None


def run(
    config: RunConfig,
    *,
    begin: str | None = None,
    until: str = VERBS[-1],
    fresh: bool = False,
    reporter: Reporter | None = None,
    prepared: Prepared | None = None,
    cache: ArtifactCache | None = None,
    accept_versions: bool = False,
    accept_changes: Accept = False,
    in_batch: InBatch | None = None,
) -> dict[str, Any]:
    """Runs the pipeline up to ``until``; skips finished stages with unchanged inputs, but redoes all from ``begin`` on, and what
    an earlier try was asked to redo and has not. What is raised, and the arguments not named here, are those of
    :func:`emloc_ray.ui.api.run`.

    ``accept_changes``: whether finished stages may be redone or removed where config or files have changed, or a function that
    is asked. ``in_batch``: the batch whose task this is; the stages of a run alone start at once. Returns the content of
    metrics.json.
    """
    _check_order(begin or until, until)
    if fresh and begin not in (None, VERBS[0]):
        raise ConfigError(f"--fresh deletes what --from {begin} builds on: leave one of them out.")
    prepared, reporter = shrink_batches(prepared or prepare(config)), reporter or Reporter()
    redo = [stage.name for stage in up_to(until) if stage.name in redone_from(begin) and stage.wanted(prepared)]
    plan, left = _planned(prepared), {stage.name for stage in up_to(until)}
    if fresh or not prepared.run.stages():  # what is refused makes no directory
        _check_left(prepared, plan, left, in_batch is not None, cache)
    with _locked(prepared, reporter, in_batch):
        forced = [*redo, *prepared.run.to_redo()]
        if not fresh:
            check_versions(prepared, forced, until, accept_versions, in_batch is not None)
            left = unfinished(prepared, forced, until)
            _check_left(prepared, plan, left, in_batch is not None, cache)
        if not fresh and not config.ray.joins:
            _check_changes(prepared, forced, until, accept_changes)
            if in_batch is None and is_finished(prepared, left, until):
                _check_again(prepared, reporter, cache, plan, until, accept_versions)
                return prepared.run.metrics()
        ray, lean = config.ray, keeps_small(prepared.config)
        connected = connection(ray.address, lean, reporter.note, **ray.init_options)
        with connected if in_batch is None else contextlib.nullcontext() as started:  # a task is within its batch's
            if in_batch is None and not started:
                prepared, plan = _within_reach(prepared, plan, left)
                if remark := unseen_gpus((prepared.written_config or prepared.config).undecided_gpus):
                    reporter.note(remark)
            if not fresh and config.ray.joins:  # by the GPUs that its Ray has
                _check_changes(prepared, forced, until, accept_changes)
            if in_batch is None:
                _check_ray(prepared.config)
            _create(prepared, fresh, redo)
            with _recorded(prepared, reporter, cache) as reporters:
                check_visible(prepared)
                for remark in remarks.said_once([prepared.config], total("CPU")) if in_batch is None else ():
                    reporter.note(remark)
                turns, actors = (in_batch.turns, in_batch.actors) if in_batch is not None else (AtOnce(), None)
                steps = Steps(prepared, reporters, turns, cache, prepared.run.to_redo(), plan, accept_versions)
                run_stages(steps, until, actors)
        return prepared.run.metrics()


@contextlib.contextmanager
def _locked(prepared: Prepared, reporter: Reporter, in_batch: InBatch | None) -> Iterator[None]:
    """The run is this process's while the block lasts. Raises StageError for an OSError of the run's own small files; stages
    explain theirs."""
    try:
        prepared.run.lock(reporter.note, under=None if in_batch is None else in_batch.directory)
        yield
    except OSError as error:
        raise explain(error, "the run") from error
    finally:
        prepared.run.unlock()


def _check_again(
    prepared: Prepared, reporter: Reporter, cache: ArtifactCache | None, plan: Plan, until: str, accept_versions: bool
) -> None:
    """Goes through a finished run without Ray: its files are checked, and its results written where they are missing."""
    _create(prepared, fresh=False)
    with _recorded(prepared, reporter, cache) as reporters:
        steps = Steps(prepared, reporters, AtOnce(), cache, (), plan, accept_versions)
        run_stages(steps, until)
        if not prepared.run.metrics():  # who reads a damaged one is told to remove it
            steps.write_results()


def _check_order(begin: str, until: str) -> None:
    if not {begin, until} <= {*VERBS} or VERBS.index(begin) > VERBS.index(until):
        raise ConfigError(f"There is no stage from {begin} until {until}: name them in order, {', '.join(VERBS)}.")


def _create(prepared: Prepared, fresh: bool, redo: Sequence[str] = ()) -> None:
    config = (prepared.written_config or prepared.config).model_dump(mode="json")
    steps = [stage.name for stage in STEPS if stage.wanted(prepared)]
    outdated = None if fresh else outdated_stage(prepared)  # before the manifest has the config
    prepared.run.create(config, fresh=fresh, steps=steps, redo=redo, outdated=outdated)


@contextlib.contextmanager
def _recorded(prepared: Prepared, reporter: Reporter, cache: ArtifactCache | None) -> Iterator[Reporters]:
    """The reporter, with those that write the run's log, trace and gauges."""
    with RunLog(prepared.run) as log, WorkerTrace(prepared.run) as trace, RunGauges(prepared.run, cache) as gauges:
        yield Reporters(reporter, log, trace, gauges)


def _planned(prepared: Prepared) -> Plan:
    """The run's plan. Raises ConfigError where this machine, as far as it takes part, lacks the attention's kernel."""
    if not prepared.config.ray.joins:
        check_kernel(prepared.config)
    return make_plan(STEPS, prepared)


def _check_left(
    prepared: Prepared, plan: Plan, left: Set[str], in_batch: bool, cache: ArtifactCache | None = None
) -> None:
    """Raises ConfigError where this machine, as far as it takes part, lacks GPUs, memory or disk for the stages that are
    ``left``. Those of which a batch's own cache holds an entry take no disk: most tasks link that."""
    if not in_batch and _GATHERED in left:  # in a batch a stage waits until others have freed memory
        check_holding(prepared)
    if not in_batch:  # which has checked its tasks
        check_stages(plan, left)
        if plan.takes_gpus(left):
            check_num_gpus(prepared.config)
        if DATA.name in left:
            check_first_rows(prepared)
    if prepared.run.store is None:  # a store has room, and a node's cache makes its own
        linked = cache.stages() if cache is not None and cache.is_own else set()
        check_disk(prepared.run, missing_disk(plan, prepared.run, left - linked))


def _within_reach(prepared: Prepared, plan: Plan, left: Container[str]) -> tuple[Prepared, Plan]:
    """The run and its plan by the GPUs of the Ray that was joined. Raises ConfigError where these hold too little for the stages
    that are ``left``, or a stage's workers do not fit on the nodes that there are or may be added."""
    reached = prepared.with_gpus(gpus_within_reach(), smallest_gpu_bytes())
    if reached is not prepared:
        if _GATHERED in left:
            check_holding(reached)
        reached = shrink_batches(reached)
        plan = make_plan(STEPS, reached)
        check_stages(plan, left)
    holding = plan.host_bytes
    asked = [(stage, resources_of(stage, reached)) for stage in STEPS if stage.wanted(reached)]
    check_workers(
        (
            stage.name,
            replace(each, memory_per_worker=holding.get(stage.name, 0)),
            stage.workers(reached.config).together,
        )
        for stage, each in asked
    )
    return reached, plan


def _check_ray(config: RunConfig) -> None:
    """Raises ConfigError where Ray has too little, by its own count: in a container less than the machine has."""
    check_resources(config, total("CPU"), total("GPU"))
    if config.ray.joins:
        check_kernel(config)
        check_nodes([config])


def _check_changes(prepared: Prepared, forced: Collection[str], until: str, accept: Accept) -> None:
    changes = None if accept is True else find_changes(prepared, forced, until)
    check_accepted([] if changes is None else [f"run_dir {prepared.run.place}: {changes}"], accept)


def run_stages(steps: Steps, until: str = VERBS[-1], actors: FinalActors | None = None) -> None:
    """Runs every stage up to the last one of the verb ``until``, in order; needs a connection to Ray where one is left to make.
    ``actors``: its batch's."""
    prepared, reporter = steps.prepared, steps.reporter
    for remark in remarks.of_settings(prepared, steps.planned):
        reporter.note(remark)
    with FinalActorHandle(prepared.run.place, actors) as final_actor:
        while True:
            try:
                context = Context(prepared, original_dir(prepared), reporter.note, final_actor, reporter.detail)
                for stage in up_to(until):
                    steps.run(stage, context)
                break
            except DamagedArtifactError as error:
                steps.forget_damaged(error)
            except Dropped as error:
                reporter.note(str(error))
    steps.write_results()  # again: a run may have been killed right after it recorded a stage
