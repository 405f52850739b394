"""A batch's tasks as runs of the pipeline, checked and planned before the first begins."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from emloc_ray.config.schema import RunConfig
from emloc_ray.config.steps import STEP_NAMES
from emloc_ray.errors import ConfigError, EmlocError
from emloc_ray.io.runs.cache import ArtifactCache
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.planning.batches import shrink_batches
from emloc_ray.planning.budget import check_gpus, check_holding
from emloc_ray.planning.first_rows import check_first_rows
from emloc_ray.planning.machine import check_kernel, check_num_gpus
from emloc_ray.planning.plan import Plan, StagePlan, check_stages, make_plan, missing_disk
from emloc_ray.planning.prepared import Lookups, Prepared, Submit, prepare, start_lookups
from emloc_ray.runs.batch.admission import Admission, Amount, Need, Ticket
from emloc_ray.runs.batch.begun import Begun, Tries
from emloc_ray.runs.batch.state import TaskReporter
from emloc_ray.runs.batch.tasks import Task
from emloc_ray.runs.changes import changed_keys, find_changes, is_finished, unfinished
from emloc_ray.runs.remarks import of_settings
from emloc_ray.runs.reporter import Reporter, Reporters
from emloc_ray.runs.versions import check_versions
from emloc_ray.stages.order import STEPS
from emloc_ray.stages.ray.final_actor import FinalActors
from emloc_ray.stages.ray.tasks import Resources
from emloc_ray.stages.tokens.stage import DATA
from emloc_ray.text import listed

_WAITING = 8  # threads that wait for stores and the hub
_SHARED = frozenset(stage.name for stage in STEPS if stage.is_shared is not None)


@dataclass(frozen=True)
class TaskPlan:
    """The plan of a task: seconds in all, and by stage the bytes of its node that one worker holds; the shared stages that it
    has begun; whether it was ``edited``, so that a finished stage is redone or removed."""

    seconds: float = 0.0
    worker_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    begun: Tries = dataclasses.field(default_factory=dict)
    edited: bool = False

    @property
    def peak_bytes(self) -> int:
        """The largest of these."""
        return max(self.worker_bytes.values(), default=0)


class TaskTurns:
    """The turns of one task of a batch: each stage waits for its resources."""

    def __init__(
        self,
        task: str,
        order: int,
        admission: Admission,
        plan: TaskPlan,
        stopped: Callable[[], bool],
        on_wait: Callable[[str], None] = lambda stage: None,
        begun: Begun | None = None,
    ) -> None:
        """``on_wait`` is called with a stage that begins to wait for resources."""
        self.task, self.order, self.admission, self.plan = task, order, admission, plan
        self.stopped, self.on_wait, self.begun = stopped, on_wait, begun or Begun()

    @contextlib.contextmanager
    def take(self, stage: str, asked: Resources, least: int) -> Iterator[Resources]:
        """Waits for the resources; a bag of tasks may get fewer workers than it asked for."""
        each = Amount(asked.cpus_per_worker, asked.gpus_per_worker, self.plan.worker_bytes.get(stage, 0))
        need = Need(each, asked.num_workers, least)
        self.begun.pass_on(self.task, stage)
        self.on_wait(stage)
        with self.admission.admitted(Ticket(self.task, stage, self.order, need), self.stopped) as workers:
            yield dataclasses.replace(asked, num_workers=workers)

    def first(self, stage: str, inputs: str) -> contextlib.AbstractContextManager[None]:
        """Waits while a task that has begun the stage has not had its turn: :class:`Begun`."""
        return self.begun.turn(self.task, stage, inputs, self.stopped)


class PipelineWork:
    """Runs of the pipeline that share one cache."""

    def __init__(
        self,
        cache: ArtifactCache | None,
        reporter: Reporter | None = None,
        accept_versions: bool = False,
        batch: RunDirectory | None = None,
    ) -> None:
        """``reporter`` hears how every task's run goes; ``accept_versions`` and ``batch``: as for
        :func:`emloc_ray.runs.run.run`."""
        self.accept_versions, self.batch = accept_versions, batch
        self.cache, self.reporter = cache, reporter or Reporter()
        self._ready: dict[str, tuple[Prepared, Plan, set[str]]] = {}  # with the stages that are left to make
        self._begun: dict[str, Tries] = {}
        self._edited: set[str] = set()
        self._gpus: tuple[float, float | None] | None = None  # of a Ray that was there already
        self.actors = FinalActors("a batch" if batch is None else batch.place)

    def with_gpus(self, available: float, gpu_bytes: float | None = None) -> None:
        """Plans with the GPUs that Ray has or can add, the smallest of ``gpu_bytes``, None where that is not known: anew where a
        task's workers use another number, and later tasks. Raises ConfigError where tasks name an attention that these GPUs do
        not compute, or have stages that they cannot hold."""
        self._gpus = available, gpu_bytes
        problems: dict[str, list[str]] = {}
        for name, (prepared, _, left) in [*self._ready.items()]:
            changed = prepared.with_gpus(available, gpu_bytes)
            with _collected(problems, name):
                check_kernel(changed.config)
                if changed is not prepared:
                    changed = shrink_batches(changed)
                    self._ready[name] = changed, (plan := make_plan(STEPS, changed)), left
                    check_stages(plan, left)
        raise_problems(problems)

    def prepare(self, tasks: Sequence[Task], progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Checks every task against its model and data, and plans it; threads ask for all that tasks wait for meanwhile. What
        computes stays in this one: Python computes in one thread at a time.

        Raises:
            ConfigError: with every error of every task, each once, with its tasks.
        """
        problems: dict[str, list[str]] = {}
        with _submit_in_threads() as submit:
            lookups = [start_lookups(task.config, submit=submit) for task in tasks]
            for number, task in enumerate(tasks):
                with _collected(problems, task.name):
                    self._prepare(task, lookups[number])
                progress(number + 1, len(tasks))
        raise_problems(problems)

    def _prepare(self, task: Task, lookups: Lookups | None = None) -> tuple[Prepared, Plan, set[str]]:
        ready = self._ready.get(task.name)
        if ready is None or (ready[0].written_config or ready[0].config) != task.config:
            lookups = lookups or start_lookups(task.config)
            prepared, manifest = shrink_batches(prepare(task.config, lookups=lookups)), lookups.manifest()
            check_versions(prepared, accept=self.accept_versions, in_batch=True, manifest=manifest)
            prepared = prepared if self._gpus is None else shrink_batches(prepared.with_gpus(*self._gpus))
            is_written = not task.config.budget_is_default and task.config.memory_budget is not None
            if self._gpus is not None or not task.config.ray.joins:  # else its GPUs are not known yet
                check_kernel(prepared.config)
            left = {*STEP_NAMES} - {*manifest["stages"]}
            if manifest["stages"] and changed_keys(prepared, manifest):  # else no files are looked at, of many tasks
                left = unfinished(prepared)
                if not is_finished(prepared, left):
                    self._edited.add(task.name)
            if "gradients" in left:  # as a run does: what is finished may have run elsewhere
                check_gpus(prepared)
            if is_written:  # else it depends on free memory, and running tasks hold some
                check_holding(prepared)
            plan = make_plan(STEPS, prepared)
            check_stages(plan, left)
            ready = self._ready[task.name] = prepared, plan, left
            tries = manifest.get("tries", {}).items()
            self._begun[task.name] = {
                name: (tried["inputs"], tried["seconds"]) for name, tried in tries if name in _SHARED
            }
        return ready

    def check_num_gpus(self) -> None:
        """Raises ConfigError where tasks have stages left for GPUs that this machine, as far as it takes part, lacks."""
        problems: dict[str, list[str]] = {}
        for name, (prepared, plan, left) in self._ready.items():
            with _collected(problems, name):
                if plan.takes_gpus(left):
                    check_num_gpus(prepared.config)
        raise_problems(problems)

    def check_rows(self) -> None:
        """Raises ConfigError where the first rows of a task whose data are left are bad, or none keeps a completion."""
        problems: dict[str, list[str]] = {}
        for name, (prepared, _, left) in self._ready.items():
            with _collected(problems, name):
                if DATA.name in left:
                    check_first_rows(prepared)
        raise_problems(problems)

    def changes(self, tasks: Sequence[Task]) -> list[str]:
        """What the tasks would redo or remove of their finished stages: one sentence for all tasks with the same answer."""
        sentences: dict[str, list[str]] = {}
        with ThreadPoolExecutor(_WAITING) as pool:
            answers = pool.map(find_changes, [self._prepare(task)[0] for task in tasks])
            for task, changes in zip(tasks, answers, strict=True):
                if changes is not None:
                    sentences.setdefault(changes, []).append(task.name)
                    self._edited.add(task.name)
        return [f"task {listed(names)}: {sentence}" for sentence, names in sentences.items()]

    def remarks(self, tasks: Sequence[Task]) -> list[str]:
        """What the runs would remark on their settings: each sentence once, with its tasks."""
        sentences: dict[str, list[str]] = {}
        for task in tasks:
            prepared, plan, _ = self._prepare(task)
            for remark in of_settings(prepared, plan.worker_bytes):
                sentences.setdefault(remark, []).append(task.name)
        return [f"task {listed(names)}: {remark}" for remark, names in sentences.items()]

    def config(self, task: Task) -> RunConfig:
        """The task's config, with the GPUs of its workers decided."""
        return self._prepare(task)[0].config

    def stages(self, task: Task) -> tuple[StagePlan, ...]:
        """The plans of the task's stages."""
        return self._prepare(task)[1].stages

    def shared_bytes(self, task: Task) -> int:
        """What other tasks may share of all that the task is planned to have: links on a disk, copies in a bucket."""
        return sum(stage.disk_bytes for stage in self.stages(task) if stage.name in _SHARED)

    def own_disk(self, task: Task) -> int:
        """The bytes that the task's run directory still grows by at most, but for what other tasks may share."""
        prepared, plan, left = self._prepare(task)
        return missing_disk(plan, prepared.run, left - _SHARED)

    def planned(self, task: Task) -> TaskPlan:
        """The task's plan."""
        plan = self._prepare(task)[1]
        return TaskPlan(plan.seconds, plan.host_bytes, self._begun[task.name], task.name in self._edited)

    def do(self, task: Task, turns: TaskTurns, reporter: TaskReporter) -> None:
        """Runs the whole pipeline, and raises its errors."""
        from emloc_ray.runs import run as pipeline

        prepared = self._prepare(task)[0]
        both = Reporters(reporter, self.reporter)
        pipeline.run(
            task.config,
            reporter=both,
            prepared=prepared,
            cache=self.cache,
            accept_versions=self.accept_versions,
            accept_changes=True,  # by whoever began the batch
            in_batch=pipeline.InBatch(turns, self.batch, self.actors),
        )

    def forget(self, task: Task) -> None:
        """Forgets a task that is over: a later try prepares it again."""
        self._ready.pop(task.name, None)
        self._begun.pop(task.name, None)
        self._edited.discard(task.name)


@contextlib.contextmanager
def _submit_in_threads() -> Iterator[Submit]:
    """Runs calls in a few threads, in the order submitted, and those with the same arguments once."""
    pool, begun = ThreadPoolExecutor(_WAITING), dict[Any, Future[Any]]()

    def submit(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Callable[[], Any]:
        key = function, args, *kwargs.items()
        if key not in begun:
            begun[key] = pool.submit(function, *args, **kwargs)
        return begun[key].result

    try:
        yield submit
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _collected(problems: dict[str, list[str]], task: str) -> Iterator[None]:
    """Keeps each sentence of an error with the task."""
    try:
        yield
    except EmlocError as error:
        for line in str(error).split("\n"):
            problems.setdefault(line, []).append(task)


def raise_problems(problems: Mapping[str, Sequence[str]]) -> None:
    """Raises ConfigError with each problem once and the tasks that have it; nothing where there is none."""
    if problems:
        raise ConfigError("\n".join(f"task {listed(names)}: {line}" for line, names in problems.items()))
