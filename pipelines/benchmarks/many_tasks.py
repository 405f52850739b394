"""Many tasks: a batch against the same runs one after another, the scheduler alone, what one short training costs, and
hundreds on an S3 server."""

from __future__ import annotations

import filecmp
import functools
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import ray
from faulting.s3 import s3_server, uri
from faulting.task import make_config

import emloc_ray
from benchmarks.figures import Figures, figure
from emloc_ray.config.reading import load_config
from emloc_ray.config.steps import VERBS
from emloc_ray.io.formats.yaml_text import read_yaml, write_yaml
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.planning.prepared import prepare
from emloc_ray.runs.batch.admission import Amount
from emloc_ray.runs.batch.driver import prepare_batch, run_batch
from emloc_ray.runs.batch.runner import BatchRun
from emloc_ray.runs.batch.state import TaskReporter
from emloc_ray.runs.batch.tasks import Task, read_batch
from emloc_ray.runs.batch.work import TaskPlan, TaskTurns
from emloc_ray.stages.context import Context
from emloc_ray.stages.finetune.finetune import finetune, run_alone, run_group
from emloc_ray.stages.finetune.stage import finetune_job
from emloc_ray.stages.ray.losses import Losses, unheard
from emloc_ray.stages.ray.session import connection
from emloc_ray.stages.ray.tasks import Resources, bounded, silent
from emloc_ray.ui.page import PageReporter

_CPUS = 2
TASKS = 8
STEPS = 80  # fine-tuning is then about half of a lone task's time
SLEEPERS = (125, 250, 500)
_SLEEP_S = 0.05
SLEEPING_CPUS = 8
TRAININGS = 4
FEW_STORED = 4


def many_tasks(out: Path) -> Figures:
    """Eight tasks, warm cluster, two cores: tasks that share model and data, then tasks that share the model alone."""
    figures: Figures = {}
    with connection(num_cpus=_CPUS):
        base = make_config(out / "many-base")
        _warm(out, base)
        for what, data in (("data and model", None), ("the model alone", out)):
            batch_file = _write_batch(out, base, what.replace(" ", "-"), data)
            begin = time.perf_counter()
            batch = prepare_batch(read_batch(batch_file), reporter=PageReporter())
            state = run_batch(batch, accept_changes=True)
            ours = time.perf_counter() - begin
            assert state.count("done") == TASKS, state
            runs, shares = _one_by_one(batch_file, out / f"alone-{what.replace(' ', '-')}")
            alone = sum(runs)
            changed = _changed(batch_file, out / f"alone-{what.replace(' ', '-')}")
            print(f"{what}: fine-tuning took {shares:.0%} of lone tasks' time", file=sys.stderr)
            assert not changed, f"files that differ: {changed}"
            figures[f"{TASKS} tasks that share {what}"] = figure(ours, alone, "s (baseline: one after another)")
    return figures


def _warm(out: Path, base: Path) -> None:
    emloc_ray.run(load_config(base, [f"run_dir={out / 'many-warm'}", *_light(STEPS)]), fresh=True)


def _light(steps: int) -> list[str]:
    sections = ("calibration", "emulator", "finetune", "merge", "evaluation")
    return [*(f"{section}.num_workers=1" for section in sections), f"finetune.max_steps={steps}"]


def _write_batch(out: Path, base: Path, name: str, data: Path | None) -> Path:
    shutil.rmtree(out / f"many-{name}", ignore_errors=True)  # an earlier call's tasks would be done already
    tasks: list[dict[str, Any]] = []
    for number in range(TASKS):
        task: dict[str, Any] = {"name": f"task-{number}", "finetune.learning_rate": 1e-4 * (number + 1)}
        task["emulator.healing.learning_rate"] = 1e-4  # its default is the tuning's, and each would heal for itself
        if data is not None:
            rows = [{"prompt": f"take {i} from {i + number}: ", "completion": f"{number} is left"} for i in range(600)]
            path = data / f"rows-{number}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            task["data.train.path"] = str(path)
        for override in _light(STEPS):
            key, _, value = override.partition("=")
            task[key] = read_yaml(value)
        tasks.append(task)
    batch = {"base": str(base), "run_dir": str(out / f"many-{name}"), "tasks": tasks}
    path = out / f"many-{name}.yaml"
    path.write_text(write_yaml(batch))
    return path


def _one_by_one(batch_file: Path, folder: Path) -> tuple[list[float], float]:
    """Seconds of each task as a run of its own, and the share of fine-tuning in all of them."""
    runs, training, whole = [], 0.0, 0.0
    for task in read_batch(batch_file).tasks:
        begin = time.perf_counter()
        metrics = emloc_ray.run(task.config.model_copy(update={"run_dir": str(folder / task.name)}), fresh=True)
        runs.append(time.perf_counter() - begin)
        training += metrics["stages"]["finetune"]["wall_s"]
        whole += runs[-1]
    return runs, training / whole


def _changed(batch_file: Path, folder: Path) -> int:
    """How many weights' files of adapters and merged models differ between a batch and lone runs."""
    changed = 0
    for task in read_batch(batch_file).tasks:
        for part in ("adapter", "merged"):
            files = sorted((folder / task.name / part).glob("*.safetensors"))
            assert files, f"{task.name} has no weights in {part}"
            ours = [Path(task.config.run_dir) / file.relative_to(folder / task.name) for file in files]
            changed += sum(not filecmp.cmp(*pair, shallow=False) for pair in zip(files, ours, strict=True))
    return changed


class _Sleeps:
    """Work whose stages are Ray tasks that sleep."""

    def __init__(self) -> None:
        def sleep(seconds: float) -> None:  # sent to workers whole: they need not find this module
            time.sleep(seconds)

        self.sleep = sleep

    def planned(self, task: Task) -> TaskPlan:
        """A sleep a stage."""
        return TaskPlan(_SLEEP_S * len(VERBS))

    def do(self, task: Task, turns: TaskTurns, reporter: TaskReporter) -> None:
        """All stages, one after another."""
        for stage in VERBS:
            with turns.take(stage, Resources(), 1) as granted:
                progress = reporter.start(stage)
                submit = functools.partial(granted.task(self.sleep).remote, _SLEEP_S)
                bounded([(stage, submit)], 1, Losses(stage, unheard), progress)
            reporter.finish(stage, {}, {"wall_s": _SLEEP_S})

    def forget(self, task: Task) -> None:
        """Nothing is kept."""


def scheduling(out: Path) -> Figures:
    """A batch of up to 500 tasks whose stages sleep: what it takes beyond the sleeps, and what the driver holds."""
    config = load_config(make_config(out / "many-base"))
    walls, peaks = {}, {}
    with connection(num_cpus=SLEEPING_CPUS):
        sleep = Resources().task(_Sleeps().sleep)
        begun = [sleep.remote(1.0) for _ in range(2 * SLEEPING_CPUS)]  # starts the workers
        ray.get([given for task in begun for given in task])
        for count in SLEEPERS:
            run = RunDirectory(out / f"sleepers-{count}")
            run.create({}, fresh=True)
            tasks = [Task(f"task-{number}", config) for number in range(count)]
            watched = _Peak()
            begin = time.perf_counter()
            batch = BatchRun(run, tasks, _Sleeps(), lambda: Amount(cpus=SLEEPING_CPUS), show=watched)
            assert batch.run().count("done") == count
            walls[count] = time.perf_counter() - begin
            peaks[count] = watched.bytes / 2**20
    few, _, most = SLEEPERS
    ideal = most * len(VERBS) * _SLEEP_S / SLEEPING_CPUS
    overhead = (walls[most] - ideal) / most * 1000
    growth = (walls[most] - walls[few]) / (most - few) * few / walls[few]
    return {
        f"scheduling a task among {most}": figure(overhead, 50, "ms (baseline: what is allowed)"),
        f"driver's memory at {most} tasks": figure(peaks[most], peaks[few], f"MiB (baseline: at {few})"),
        f"time of a task more at {most}": figure(growth, 1, f"shares (baseline: one of the first {few})"),
    }


class _Peak:
    """The most memory and threads that this process was seen to hold."""

    def __init__(self) -> None:
        self.bytes = self.threads = 0

    def __call__(self, state: object) -> None:
        self.bytes = max(self.bytes, psutil.Process().memory_info().rss)
        self.threads = max(self.threads, threading.active_count())


def stored_tasks(out: Path, tasks: int) -> Figures:
    """A batch of short tasks with all their stages, on an S3 server: seconds of each, against a few of them on a disk."""
    seconds, (few, most) = [], (_Peak(), _Peak())
    os.environ |= {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark"}
    with s3_server() as port, connection(num_cpus=_CPUS):
        base = make_config(out / "stored-base", hidden_size=32)
        _warm(out, base)
        for place, count, watched in ((str(out / "kept"), FEW_STORED, few), (uri(port, "many"), tasks, most)):
            shutil.rmtree(out / "kept", ignore_errors=True)
            rates = [1e-4 * (number + 1) for number in range(count)]
            batch_file = out / "stored.yaml"
            grid = {"finetune.learning_rate": rates}
            batch_file.write_text(write_yaml({"base": str(base), "run_dir": place, "grid": grid}))
            begin = time.perf_counter()
            state = run_batch(prepare_batch(read_batch(batch_file, _SHORT), reporter=PageReporter()), watched)
            seconds.append((time.perf_counter() - begin) / count)
            assert state.count("done") == count, state
    print(f"the driver had {most.threads} threads at most", file=sys.stderr)
    return {
        f"a task among {tasks} on S3": figure(seconds[1], seconds[0], f"s (baseline: among {FEW_STORED} on a disk)"),
        f"driver's memory at {tasks} tasks on S3": figure(
            most.bytes / 2**20, few.bytes / 2**20, f"MiB (baseline: at {FEW_STORED} on a disk)"
        ),
    }


_SHORT = [
    *_light(1),
    "emulator.healing=null",
    "correction.method=projection",
    "calibration.num_calibration_samples=16",
    "evaluation.num_samples=8",
    "evaluation.num_exact_match=0",
    "evaluation.num_generations=0",
]


def short_training(out: Path) -> Figures:
    """A fine-tuning stage of one step: in a task whose process serves again, against a group that is made for it."""
    with connection(num_cpus=_CPUS):
        base = make_config(out / "many-base")
        config = load_config(base, [f"run_dir={out / 'short-training'}", "emulator.healing=null", *_light(1)])
        emloc_ray.run(config, until="factorize", fresh=True)
        prepared = prepare(config)
        context = Context(prepared, prepared.source.directory)
        seconds: dict[str, list[float]] = {"alone": [], "group": []}
        for number in range(TRAININGS):
            for name, train in (("alone", run_alone), ("group", run_group)):
                job = finetune_job(context, f"{name}-{number}")
                begin = time.perf_counter()
                finetune(job, Resources(), silent, unheard, train)
                seconds[name].append(time.perf_counter() - begin)
    # The first of each starts processes that the others find, and takes the longest.
    alone, group = (min(seconds[name]) for name in ("alone", "group"))
    return {"a fine-tuning stage of one step": figure(alone, group, "s (baseline: a Ray Train group of one)")}
