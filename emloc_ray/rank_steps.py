"""What goes before a factorization that follows from more than Grams: sums of gradients, and ranks by what they gain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from emloc_ray.io.fingerprint import fingerprint
from emloc_ray.io.grams import INDEX
from emloc_ray.io.node_cache import exists
from emloc_ray.layout import Layout
from emloc_ray.steps import Inputs, Steps

if TYPE_CHECKING:
    from emloc_ray.jobs import Jobs
    from emloc_ray.stages.cluster import Progress, Resources


class RankSteps:
    """The two steps of one run; without a use for them they leave nothing behind."""

    def __init__(self, steps: Steps, jobs: Jobs, content: Callable[[], Inputs]) -> None:
        """``content`` gives what tells the original from others where runs share what they make of it."""
        self.steps, self.directory, self.jobs, self.content = steps, steps.directory, jobs, content
        self.prepared = steps.prepared
        self.config, self.layout = self.prepared.config, self.prepared.layout
        self._keeps = self.config.calibration.keep == "grams"

    def gradient_inputs(self) -> Inputs:
        """What the sums of gradients are made of."""
        return {
            "model": self.steps.inputs["import"],
            "options": self.jobs.model_options,
            "data": self.steps.inputs["data/calibration"],
            "tokens": self.config.calibration.tokens,
            "linears": self.layout.weighed,
            "loss_on": self.jobs.loss_on(),
            "seed": self.config.seed,
        }

    def allocation_inputs(self) -> Inputs:
        """What ranks follow from, but for Grams; empty where they are uniform."""
        if not self.layout.allocated:
            return {}
        by_gradients = self.layout.allocation == "sensitivity"
        return {
            "allocation": self.layout.allocation,
            "budget": {name: self.layout.ranks[name] for name in self.layout.allocated},
            "dampening_frac": self.config.emulator.dampening_frac,
            "dense": [name for name in self.layout.allocated if self.layout.may_be_dense(name)],
            **(self._weighing() if by_gradients else {}),
        }

    def objective_inputs(self) -> Inputs:
        """What factors follow from beside Grams: what emulators have to share for one to be cut from the other."""
        predicts = self.layout.objective == "predictions"
        return {"objective": self.layout.objective, **(self._weighing() if predicts else {})}

    def _weighing(self) -> Inputs:
        # Of which linears there are sums does not enter: those of one are what they are whatever the others.
        inputs = {key: value for key, value in self.gradient_inputs().items() if key != "linears"}
        return {"weighing": fingerprint([inputs, self.config.emulator.gradient_dampening_frac])}

    def gradients(self) -> None:
        """The sums of gradients of what linears give, where allocation or factors need them."""
        out_dir = self.directory.path("gradients")
        if not self.layout.weighed:
            self.steps.leave_out("gradients", "none needed", out_dir)
            return
        from emloc_ray.jobs import resources
        from emloc_ray.stages.calibrate import calibrate
        from emloc_ray.stages.calibration_job import go_on

        inputs, section = self.gradient_inputs(), self.config.calibration
        if not exists(out_dir / INDEX) and self.directory.stage("gradients") is not None:
            self.steps.forced.add("gradients")  # they were not kept, and are of use again

        def execute(progress: Progress, granted: Resources) -> dict[str, Any]:
            job = go_on(self.jobs.gradients(), out_dir, inputs, section.num_workers, False)
            return calibrate(job, out_dir, granted, progress, tell=self.steps.reporter.note)

        self.steps.run(
            "gradients",
            inputs,
            [out_dir],
            execute,
            resources(section),
            resumes=True,
            recorded=[out_dir] if self._keeps else [],
            shared=self.content() if self._keeps else None,
        )

    def allocate(self) -> None:
        """The ranks that gain most of the parameters that uniform ones would take."""
        out_dir = self.directory.path("allocation")
        if not self.layout.allocated:
            self.steps.leave_out("allocate", "uniform", out_dir)
            return
        from emloc_ray.io.resume import discard_unless
        from emloc_ray.jobs import resources
        from emloc_ray.stages.allocate import allocate_ranks

        inputs = {"calibrate": self.steps.inputs["calibrate"], **self.allocation_inputs()}

        def execute(progress: Progress, granted: Resources) -> dict[str, Any]:
            discard_unless(out_dir, inputs)
            return allocate_ranks(self.jobs.allocation(), out_dir, granted, progress, self.steps.reporter.note)

        asked = resources(self.config.emulator)
        self.steps.run("allocate", inputs, [out_dir], execute, asked, resumes=True, shared=self.content())

    def allocated(self) -> Layout:
        """The layout with the ranks that were found."""
        from emloc_ray.stages.allocate import read_ranks

        if not self.layout.allocated:
            return self.layout
        found = {**self.layout.ranks, **read_ranks(self.directory.path("allocation"))}
        return replace(self.layout, ranks={name: rank for name, rank in found.items() if rank is not None})
