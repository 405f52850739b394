"""What a batch does with its tasks: each is a run of the pipeline, prepared and planned before the first begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from emloc_ray.runs.batch.board import TaskReporter
from emloc_ray.runs.batch.tasks import Task
from emloc_ray.runs.batch.turns import Expected, TaskTurns
from emloc_ray.planning.budget import check_gradients
from emloc_ray.stages.order import STEPS
from emloc_ray.errors import ConfigError, EmlocError
from emloc_ray.io.runs.cache import ArtifactCache
from emloc_ray.planning.plan import Plan, StagePlan, make_plan
from emloc_ray.planning.work import row_lengths
from emloc_ray.planning.prepared import Prepared, prepare

_FIRST = ("import", "data")


class PipelineWork:
    """Runs of the pipeline that share one cache."""

    def __init__(self, cache: ArtifactCache | None) -> None:
        self.cache = cache
        self._ready: dict[str, tuple[Prepared, Plan]] = {}

    def prepare(self, tasks: Sequence[Task], progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Checks every task against its model and data, and plans it.

        Raises:
            ConfigError: with every error of every task, each once, with the tasks that it concerns.
        """
        problems: dict[str, list[str]] = {}
        for number, task in enumerate(tasks):
            try:
                self._prepare(task)
            except EmlocError as error:
                for line in str(error).split("\n"):
                    problems.setdefault(line, []).append(task.name)
            progress(number + 1, len(tasks))
        if problems:
            raise ConfigError("\n".join(f"{_named(names)}: {line}" for line, names in problems.items()))

    def _prepare(self, task: Task) -> tuple[Prepared, Plan]:
        ready = self._ready.get(task.name)
        if ready is None or ready[0].config != task.config:
            prepared = prepare(task.config)
            if task.config.memory_budget is not None:  # else it goes by what is free, of which running tasks hold some
                check_gradients(prepared, row_lengths(prepared))
            ready = self._ready[task.name] = prepared, make_plan(STEPS, prepared)
        return ready

    def stages(self, task: Task) -> tuple[StagePlan, ...]:
        """What the planner says of the task's stages."""
        return self._prepare(task)[1].stages

    def expected(self, task: Task) -> Mapping[str, Expected]:
        """The task's stages in order, and what each is expected to take."""
        plan = self._prepare(task)[1]
        before = {name: Expected(plan.seconds_before / len(_FIRST)) for name in _FIRST}
        return {**before, **{stage.name: Expected(stage.seconds, stage.host_bytes) for stage in plan.stages}}

    def do(self, task: Task, turns: TaskTurns, reporter: TaskReporter) -> None:
        """The whole pipeline; raises what it raises."""
        from emloc_ray.runs import run as pipeline

        prepared = self._prepare(task)[0]
        metrics = pipeline.run(task.config, reporter=reporter, prepared=prepared, turns=turns, cache=self.cache)
        reporter.results(metrics)

    def forget(self, task: Task) -> None:
        """The task is over: a later try of it prepares it anew."""
        self._ready.pop(task.name, None)


def _named(names: Sequence[str]) -> str:
    others = "" if len(names) == 1 else f" and {len(names) - 1} other{'s' if len(names) > 2 else ''}"
    return f"task {names[0]}{others}"
