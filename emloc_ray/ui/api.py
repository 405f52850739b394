"""The Python interface: a run that keeps its page."""

from __future__ import annotations

from typing import Any

from emloc_ray.config.schema import RunConfig
from emloc_ray.io.runs.cache import ArtifactCache
from emloc_ray.planning.prepared import Prepared
from emloc_ray.runs import run as pipeline
from emloc_ray.runs.reporter import Reporter, Reporters
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
) -> dict[str, Any]:
    """Runs the pipeline up to ``until`` and keeps ``report.html``; skips finished stages whose inputs are unchanged.

    ``begin`` redoes all from this stage on; ``fresh`` deletes what an earlier run left. ``reporter`` hears how the run goes.
    ``prepared`` is the checked config, where there is one. Runs with one ``cache`` share what they make from equal inputs.
    Returns the content of metrics.json.

    Raises:
        ConfigError: before any stage starts or anything is written.
        EmlocError: where a stage failed; finished stages stay, and the same call continues from them.
    """
    both = Reporters(reporter or Reporter(), PageReporter())
    return pipeline.run(config, begin=begin, until=until, fresh=fresh, reporter=both, prepared=prepared, cache=cache)
