"""One run: import, calibrate, factorize, heal, finetune, correct, merge, evaluate; each is skipped where it is done."""

from __future__ import annotations

from typing import Any

from emloc_ray.config.schema import RunConfig
from emloc_ray.config.steps import VERBS
from emloc_ray.errors import DamagedArtifactError
from emloc_ray.io.runs.cache import ArtifactCache
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.planning.batches import keeps_small, shrink_batches
from emloc_ray.planning.budget import check_holding
from emloc_ray.planning.machine import check_disk, check_kernel, check_resources
from emloc_ray.planning.plan import Plan, make_plan, missing_disk
from emloc_ray.planning.prepared import Prepared, prepare
from emloc_ray.runs import remarks
from emloc_ray.runs.changes import Accept, check_accepted, find_changes
from emloc_ray.runs.gauges import RunGauges
from emloc_ray.runs.log import RunLog
from emloc_ray.runs.reporter import Reporter, Reporters
from emloc_ray.runs.steps import AtOnce, Dropped, Steps, Turns, resources_of
from emloc_ray.runs.trace import WorkerTrace
from emloc_ray.runs.versions import check_versions, redone_from
from emloc_ray.stages.context import Context
from emloc_ray.stages.importing import is_imported, original_dir
from emloc_ray.stages.order import STEPS
from emloc_ray.stages.ray.final_actor import FinalActorHandle
from emloc_ray.stages.ray.losses import explain
from emloc_ray.stages.ray.nodes import check_workers
from emloc_ray.stages.ray.session import check_visible, connection, gpus_within_reach, total


def run(
    config: RunConfig,
    *,
    begin: str | None = None,
    until: str = VERBS[-1],
    fresh: bool = False,
    reporter: Reporter | None = None,
    prepared: Prepared | None = None,
    turns: Turns | None = None,
    cache: ArtifactCache | None = None,
    accept_versions: bool = False,
    batch: RunDirectory | None = None,
    accept_changes: Accept = False,
) -> dict[str, Any]:
    """Runs the pipeline up to ``until``; skips finished stages with unchanged inputs, but redoes all from ``begin`` on.

    ``turns`` says when each stage may start, by default at once. Runs with one ``cache`` share what they make from equal
    inputs. ``accept_versions`` takes what was finished with other versions of emloc_ray or its libraries as it is. ``batch``
    is the locked directory of the batch whose task this is. ``accept_changes`` redoes and removes what is finished where the
    config or files have changed, or is asked, with a sentence. Returns the content of metrics.json.

    Raises:
        ConfigError: before any stage starts or anything is written; also where what is finished is of other versions, or would
            be redone or removed unasked.
        EmlocError: where a stage failed; finished stages stay, and the same call continues from them.
    """
    prepared = shrink_batches(prepared or prepare(config))
    plan = _checked_plan(prepared, begin, fresh, in_batch=turns is not None)
    reporter = reporter or Reporter()
    try:
        prepared.run.lock(reporter.note, under=batch)
        if not fresh:
            check_versions(prepared, redone_from(begin), until, accept_versions, in_batch=turns is not None)
        if not fresh and not config.ray.joins:
            _check_changes(prepared, begin, until, accept_changes)
        lean = keeps_small(prepared.config)
        with connection(config.ray.address, lean_memory=lean, **config.ray.init_options) as started:
            if turns is None and not started:
                prepared, plan = _within_reach(prepared, plan)
                config = prepared.config
            if not fresh and config.ray.joins:  # by the GPUs that its Ray has
                _check_changes(prepared, begin, until, accept_changes)
            if turns is None:  # again, by what Ray counts: in a container less than the machine has
                check_resources(config, total("CPU"), total("GPU"))
                if config.ray.joins:
                    check_kernel(config)
            steps = [stage.name for stage in STEPS if stage.wanted(prepared)]
            prepared.run.create((prepared.as_written or config).model_dump(mode="json"), fresh=fresh, steps=steps)
            linears = [spec.name for spec in prepared.layout.specs]
            with (
                RunLog(prepared.run, linears) as log,
                WorkerTrace(prepared.run) as trace,
                RunGauges(prepared.run) as gauges,
            ):
                check_visible(prepared)
                for remark in remarks.of_machines([config]) if turns is None else ():
                    reporter.note(remark)
                reporters = Reporters(reporter, log, trace, gauges)
                Pipeline(prepared, reporters, begin, turns, cache, plan, accept_versions).run(until)
        return prepared.run.metrics()
    except OSError as error:  # of the run's own small files: stages explain theirs
        raise explain(error, "the run") from error
    finally:
        prepared.run.unlock()


def _checked_plan(prepared: Prepared, begin: str | None, fresh: bool, in_batch: bool) -> Plan:
    """The plan, of a run that this machine's memory and disk have room for, as far as it takes part."""
    if not prepared.config.ray.joins:
        check_kernel(prepared.config)
    redone = fresh or begin == VERBS[0] or "gradients" not in prepared.run.stages()
    if not in_batch and redone:  # in a batch other runs hold memory now, and a stage waits until it is free
        check_holding(prepared)
    plan = make_plan(STEPS, prepared)
    if prepared.run.store is None:  # a store has room, and a node's cache makes its own
        check_disk(prepared.run, missing_disk(plan, prepared.run, fresh))
    return plan


def _within_reach(prepared: Prepared, plan: Plan) -> tuple[Prepared, Plan]:
    """The run and its plan by the GPUs of the Ray that was joined.

    Raises:
        ConfigError: where a stage's workers fit on no node that there is or may be added.
    """
    reached = prepared.with_gpus(gpus_within_reach())
    if reached is not prepared:
        reached = shrink_batches(reached)
        plan = make_plan(STEPS, reached)
    check_workers((stage.name, resources_of(stage, reached)) for stage in STEPS if stage.wanted(reached))
    return reached, plan


def _check_changes(prepared: Prepared, begin: str | None, until: str, accept: Accept) -> None:
    changes = None if accept is True else find_changes(prepared, redone_from(begin), until)
    check_accepted([] if changes is None else [f"run_dir {prepared.run.place}: {changes.sentence}"], accept)


class Pipeline:
    """One run's stages over one run directory; needs a connection to Ray."""

    def __init__(
        self,
        prepared: Prepared,
        reporter: Reporter,
        begin: str | None = None,
        turns: Turns | None = None,
        cache: ArtifactCache | None = None,
        plan: Plan | None = None,
        accept_versions: bool = False,
    ) -> None:
        self.prepared, self.reporter = prepared, reporter
        forced = redone_from(begin)
        self.steps = Steps(prepared, reporter, turns or AtOnce(), cache, forced, plan, accept_versions)

    def run(self, until: str = VERBS[-1]) -> None:
        """Runs every stage up to the last one of the verb ``until``, in order."""
        for remark in remarks.of_settings(self.prepared, self.steps.planned):
            self.reporter.note(remark)
        last = max(number for number, stage in enumerate(STEPS) if stage.verb == until)
        with FinalActorHandle(self.prepared.run.place) as final_actor:
            while True:
                try:
                    context = self._context(final_actor)
                    for stage in STEPS[: last + 1]:
                        self.steps.run(stage, context)
                    break
                except DamagedArtifactError as error:
                    self.steps.forget_damaged(error)
                except Dropped as error:
                    self.reporter.note(str(error))
        self.steps.write_results()  # again: a run may have been killed right after it recorded a stage

    def _context(self, final_actor: FinalActorHandle) -> Context:
        """The context of a pass over the stages; fetches a model of the hub first, where it is not cached."""
        prepared, source = self.prepared, self.prepared.source
        imported = is_imported(prepared)
        if source.hub_id is not None:
            self.reporter.note(f"The weights of {source.hub_id} come from the hub, unless they are cached.")
        source_dir = original_dir(prepared)
        if source.hub_id is not None and not imported:
            check_visible(prepared, source_dir)
        model_dir = prepared.run.path("model") if imported else source_dir
        return Context(prepared, model_dir, source_dir, self.reporter.note, final_actor, self.reporter.detail)
