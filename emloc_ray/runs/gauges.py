"""How far each stage is, as Ray metrics: on every node's Prometheus endpoint and Ray's dashboard."""

from __future__ import annotations

from collections.abc import Callable

from ray.util.metrics import Gauge

from emloc_ray.runs.reporter import Reporter


class StageGauges(Reporter):
    """Sets the gauges ``emloc_ray_units_done`` and ``emloc_ray_units_total``; needs a connection to Ray.

    Units are the stage's own: shards, linears, steps, modules. The gauges stay where the stage left them.
    """

    def __init__(self, run: str) -> None:
        self.run = run
        keys = ("run", "stage")
        self._done = Gauge("emloc_ray_units_done", description="Units of a stage that are done.", tag_keys=keys)
        self._total = Gauge("emloc_ray_units_total", description="Units of a stage in all.", tag_keys=keys)

    def start(self, stage: str) -> Callable[[int, int], None]:
        """A stage begins."""
        tags = {"run": self.run, "stage": stage}

        def progress(done: int, total: int) -> None:
            self._done.set(done, tags)
            self._total.set(total, tags)

        return progress
