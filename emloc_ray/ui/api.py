"""The Python interface: a run that keeps its page, and its plan."""

from __future__ import annotations

import dataclasses
from typing import Any

from emloc_ray.config.reading import parse_config
from emloc_ray.config.schema import RunConfig
from emloc_ray.io.runs.cache import ArtifactCache
from emloc_ray.planning.batches import shrink_batches, without_budget
from emloc_ray.planning.machine import measured_speeds, with_disk_of
from emloc_ray.planning.memory import MemoryModel
from emloc_ray.planning.plan import Plan, make_plan, within_budget
from emloc_ray.planning.prepared import Prepared, prepare
from emloc_ray.runs import run as pipeline
from emloc_ray.runs.changes import Accept
from emloc_ray.runs.reporter import Reporter, Reporters
from emloc_ray.stages.order import STEPS
from emloc_ray.ui.page import PageReporter


def run(
    config: RunConfig,
    *,
    begin: str | None = None,
    until: str = "evaluate",
    fresh: bool = False,
    reporter: Reporter | None = None,
    prepared: Prepared | None = None,
    cache: ArtifactCache | None = None,
    accept_versions: bool = False,
    accept_changes: Accept = False,
) -> dict[str, Any]:
    """Runs the pipeline up to ``until`` and keeps ``report.html``; skips finished stages whose inputs are unchanged.

    ``begin`` redoes all from this stage on; ``fresh`` deletes what an earlier run left. ``reporter`` hears how the run goes.
    ``prepared`` is the checked config, where there is one. Runs with one ``cache`` share what they make from equal inputs.
    ``accept_versions`` takes what was finished with other versions of emloc_ray or its libraries as it is.
    ``accept_changes`` redoes and removes what is finished where the config or files have changed. Returns the content of
    metrics.json.

    Raises:
        ConfigError: before any stage starts or anything is written; also where what is finished is of other versions, or would
            be redone or removed unasked.
        EmlocError: where a stage failed; finished stages stay, and the same call continues from them.
    """
    both = Reporters(reporter or Reporter(), PageReporter())
    return pipeline.run(
        config,
        begin=begin,
        until=until,
        fresh=fresh,
        reporter=both,
        prepared=prepared,
        cache=cache,
        accept_versions=accept_versions,
        accept_changes=accept_changes,
    )


def plan(config: RunConfig, *, memory_budget: str | int | None = None) -> Plan:
    """Plans a run without its weights: a directory with a config.json and an index is enough.

    Within a ``memory_budget`` that the config names its ``choice`` has what else can be trained on, and which of it is
    recommended. With a ``memory_budget`` given here, such as ``"24GiB"``, the plan is that of the recommended settings
    (``choice.overrides``).

    Raises:
        ConfigError: with every error of the config at once; or where nothing fits.
    """
    if memory_budget is not None:
        config = parse_config({**config.model_dump(mode="json"), "memory_budget": memory_budget})
    prepared, choice = shrink_batches(prepare(config, needs_weights=False)), None
    files = sorted(prepared.source.directory.glob("*.safetensors"))
    speeds = with_disk_of(measured_speeds(), files, MemoryModel(prepared).weights)
    if config.memory_budget is not None and not config.budget_is_default:
        choice = within_budget(STEPS, prepared, speeds)
        prepared = prepared if memory_budget is None else choice.solution.prepared
    return dataclasses.replace(make_plan(STEPS, prepared, speeds), choice=choice)


def plan_without_budget(planned: Plan) -> Plan:
    """The plan of the same run if no ``memory_budget`` bounded its workers."""
    return make_plan(STEPS, without_budget(planned.prepared), planned.speeds)
