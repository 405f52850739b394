"""What an emulator follows from, and what is made before it where that is more than Grams: sums of gradients, and ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from emloc_ray.config.steps import SUMS
from emloc_ray.io.runs.fingerprint import fingerprint
from emloc_ray.planning.budget import check_gradients
from emloc_ray.planning.layout import Layout
from emloc_ray.planning.plan import row_lengths
from emloc_ray.planning.training import factor_ranks, packs_late
from emloc_ray.runs.steps import Inputs, Steps

if TYPE_CHECKING:
    from emloc_ray.stages.jobs import Jobs
    from emloc_ray.stages.ray.tasks import Progress, Resources


class RankSteps:
    """The two steps of one run, without a use for which they leave nothing behind; and what its emulator follows from."""

    def __init__(self, steps: Steps, jobs: Jobs, content: Callable[[], Inputs]) -> None:
        """``content`` gives what tells the original from others where runs share what they make of it."""
        self.steps, self.directory, self.jobs, self.content = steps, steps.directory, jobs, content
        self.prepared = steps.prepared
        self.config, self.layout = self.prepared.config, self.prepared.layout

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
        return {
            **self._storing(),
            "allocation": self.layout.allocation,
            "budget": {name: self.layout.ranks[name] for name in self.layout.allocated},
            "dampening_frac": self.config.emulator.dampening_frac,
            "dense": [name for name in self.layout.allocated if self.layout.may_be_dense(name)],
            "objective": self.layout.objective,
            **self._weighing(),
        }

    def _objective(self) -> Inputs:
        """What factors follow from beside Grams."""
        predicts = self.layout.objective == "predictions"
        return {"objective": self.layout.objective, **(self._weighing() if predicts else {})}

    def _weighing(self) -> Inputs:
        # Of which linears there are sums does not enter: those of one are what they are whatever the others.
        inputs = {key: value for key, value in self.gradient_inputs().items() if key != "linears"}
        return {"weighing": fingerprint([inputs, self.config.emulator.gradient_dampening_frac])}

    def factorize_inputs(self) -> Inputs:
        """What the emulator follows from. Not the ranks that follow from the data: from what these do is among it instead."""
        allocation, heals = self.allocation_inputs(), self.config.emulator.heals
        return {
            **({"allocation": allocation} if allocation else {}),
            # Of ranks that are found, healing takes its own: those below need not show it.
            **({"healing": heals.r} if allocation and heals is not None else {}),
            **(self._objective() if self.layout.objective != "activations" else {}),
            **({"quantization": self.config.emulator.quantization} if self.packs_early else {}),
            **self._storing(),
            "calibrate": self.steps.inputs["calibrate"],
            "model": self.steps.inputs["import"],
            "ranks": factor_ranks(self.prepared),
            "dampening_frac": self.config.emulator.dampening_frac,
            "seed": self.config.seed,
        }

    def _storing(self) -> Inputs:
        return {"storage": self.layout.storage} if self.layout.storage != "factors" else {}

    @property
    def packs_early(self) -> bool:
        """Whether the factorization itself puts linears into 4 bits."""
        return self.layout.quantized and not packs_late(self.prepared)

    def gradients(self) -> None:
        """The sums of gradients of what linears give, where allocation or factors need them."""
        out_dir = self.directory.path("gradients")
        if not self.layout.weighed:
            self.steps.leave_out("gradients", "none needed", out_dir)
            return
        from emloc_ray.stages.calibrate.calibrate import calibrate
        from emloc_ray.stages.calibrate.job import go_on
        from emloc_ray.stages.jobs import resources

        inputs, section = self.gradient_inputs(), self.config.calibration
        if self.config.memory_budget is not None and not self.steps.is_done("gradients", inputs):
            check_gradients(self.prepared, row_lengths(self.prepared))  # of a run whose config has changed since

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
            shared=self.content(),
        )

    def allocate(self) -> None:
        """The ranks that gain most of the parameters that uniform ones would take."""
        out_dir = self.directory.path("allocation")
        if not self.layout.allocated:
            self.steps.leave_out("allocate", "uniform", out_dir)
            return
        inputs = {"calibrate": self.steps.inputs["calibrate"], **self.allocation_inputs()}
        from emloc_ray.io.runs.resume import discard_unless
        from emloc_ray.stages.factorize.allocate import allocate_ranks
        from emloc_ray.stages.jobs import resources

        def execute(progress: Progress, granted: Resources) -> dict[str, Any]:
            discard_unless(out_dir, inputs)
            return allocate_ranks(self.jobs.allocation(), out_dir, granted, progress, self.steps.reporter.note)

        asked = resources(self.config.emulator)
        self.steps.run("allocate", inputs, [out_dir], execute, asked, resumes=True, read=SUMS, shared=self.content())

    def sums_of_factors(self) -> Sequence[str]:
        """The stages whose sums the factorization reads."""
        by_gradients = self.layout.objective == "predictions" and self.layout.ranks
        return SUMS if by_gradients else SUMS[:1]

    def allocated(self) -> Layout:
        """The layout with the ranks that were found."""
        from emloc_ray.stages.factorize.allocate import read_ranks

        if not self.layout.allocated:
            return self.layout
        found = {**self.layout.ranks, **read_ranks(self.directory.path("allocation"))}
        return replace(self.layout, ranks={name: rank for name, rank in found.items() if rank is not None})

    def found(self) -> Inputs:
        """What a healing has to know of an emulator beside its config, be it taken from another run: its allocated ranks."""
        heals = self.config.emulator.heals is not None
        return {"ranks": self.allocated().ranks} if heals and self.layout.allocated else {}
