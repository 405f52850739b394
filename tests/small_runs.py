"""What the integration tests share: a small task, configs of two workers a stage, and runs that remember what happened."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from emloc_ray.config.reading import parse_config
from emloc_ray.errors import Stopped
from emloc_ray.planning.prepared import prepare
from emloc_ray.runs.reporter import Reporter
from emloc_ray.runs.run import run_stages
from emloc_ray.runs.steps import Steps
from emloc_ray.runs.turns import AtOnce
from emloc_ray.runs.versions import redone_from
from emloc_ray.stages.context import Context, Inputs, Result
from emloc_ray.stages.finetune.job import FinetuneJob
from emloc_ray.stages.finetune.stage import finetune_job
from emloc_ray.stages.stage import Stage
from emloc_ray.ui import api

TWO = {"num_workers": 2}
# The same rows a step as one worker's eight. Starting a group takes ten times as long as training: for tests of groups.
GROUP = {**TWO, "per_device_train_batch_size": 4}
WEIGHED = {"allocation": "sensitivity", "objective": "predictions"}
HEALING = {"steps": 24, "r": 4, "learning_rate": 3e-3}
NUM_ROWS = 120
LENGTH = 64


def task_rows(count: int = NUM_ROWS) -> list[dict[str, str]]:
    """Prompts and completions that a few steps of training can tell from noise."""
    return [{"prompt": f"add {i} and {i % 7}: ", "completion": f"the sum is {i + i % 7}"} for i in range(count)]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_values(run_dir: Path, model_dir: Path, data: Path, /, **changes: dict[str, Any]) -> dict[str, Any]:
    """A config's nested values; ``changes`` are merged into its sections."""
    values: dict[str, Any] = {
        "run_dir": str(run_dir),
        "memory_budget": None,  # inference of a tiny model takes less than a batch's activations
        "model": {"source": str(model_dir)},
        "data": {"train": {"path": str(data)}, "format": "prompt_completion", "max_seq_length": LENGTH},
        "calibration": {**TWO, "num_calibration_samples": 32, "rows_per_shard": 8},
        "emulator": {**TWO, "compression_ratio": 0.5},
        "adapter": {"r": 4, "lora_alpha": 16},
        "finetune": {
            "num_workers": 1,
            "max_steps": 8,
            "per_device_train_batch_size": 8,
            "learning_rate": 5e-3,
            "logging_steps": 1,
        },
        "correction": {"num_selection_samples": 8, "max_share": None},
        "merge": dict(TWO),
        "evaluation": {**TWO, "num_exact_match": 2, "num_generations": 2, "max_new_tokens": 24},
    }
    for section, keys in changes.items():
        values[section] = {**values.get(section, {}), **keys}
    return values


class RecordingReporter(Reporter):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.skipped: list[str] = []
        self.notes: list[str] = []

    def start(self, stage: str) -> Callable[[int, int], None]:
        self.started.append(stage)
        return super().start(stage)

    def skip(self, stage: str) -> None:
        self.skipped.append(stage)

    def note(self, text: str) -> None:
        self.notes.append(text)


class Stopping(RecordingReporter):
    """Breaks a stage off once it is so far."""

    def __init__(self, stage: str, when: int) -> None:
        super().__init__()
        self.stage, self.when = stage, when

    def start(self, stage: str) -> Callable[[int, int], None]:
        super().start(stage)
        return self._progress if stage == self.stage else lambda done, total: None

    def _progress(self, done: int, total: int) -> None:
        if done >= self.when:
            raise Stopped(f"stopped at {done} of {total}")


class KillingReporter(RecordingReporter):
    """Kills a worker of the calibration once a shard is counted."""

    victim = "slot"  # of its task's name: a process that served the stage before may still be there

    def __init__(self) -> None:
        super().__init__()
        self.killed: list[int] = []

    def start(self, stage: str) -> Callable[[int, int], None]:
        super().start(stage)
        return self._progress if stage == "calibrate" else lambda done, total: None

    def _progress(self, done: int, total: int) -> None:
        if done >= 1 and not self.killed:
            self.killed.append(kill_worker(self.victim))


def acting(job: FinetuneJob, step: int, mark: Path, act: Callable[[FinetuneJob], object]) -> FinetuneJob:
    """The same, of which a rank calls ``act(job)`` in its process once so many steps are logged, unless ``mark`` exists, which
    it makes before. One that looked from outside could come too late."""
    driver = os.getpid()

    class Acting(type(job)):  # type: ignore[misc]
        @property
        def log_path(self) -> Path:  # asked for by the first rank before each line, and by all with each checkpoint
            path: Path = super().log_path
            if os.getpid() != driver and path.is_file() and path.read_bytes().count(b"\n") >= step:
                with contextlib.suppress(FileExistsError):
                    mark.touch(exist_ok=False)
                    act(self)
            return path

    return Acting(**{field.name: getattr(job, field.name) for field in dataclasses.fields(job)})


def act_in_training(
    patched: pytest.MonkeyPatch,
    stage: str,
    step: int,
    mark: Path,
    act: Callable[[FinetuneJob], object] = lambda job: os.kill(os.getpid(), signal.SIGKILL),
) -> None:
    """Has the first training of a stage that comes so far be :func:`acting`, which by default kills its process."""
    patched.setattr(
        f"emloc_ray.stages.{stage}.stage.finetune_job", lambda *args: acting(finetune_job(*args), step, mark, act)
    )


def kill_worker(name: str) -> int:
    """Kills a worker of this session whose command line holds the name; gives its process id."""
    pid = min(p.pid for p in worker_processes() if name in p.name() + "".join(p.cmdline()))
    os.kill(pid, signal.SIGKILL)
    return pid


def worker_processes() -> list[psutil.Process]:
    """The Ray workers of this test session."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            found += [process] if process.name().startswith("ray::") else []
    return found


class FinishedRun:
    """A run's directory with what its reporter heard; :meth:`copy` gives one that a test may spoil."""

    def __init__(self, root: Path, values: dict[str, Any], model_dir: Path, reporter: RecordingReporter) -> None:
        self.root, self.values, self.model_dir, self.reporter = root, values, model_dir, reporter
        self.metrics: dict[str, Any] = json.loads((root / "metrics.json").read_text())

    def changed(self, **changes: dict[str, Any]) -> dict[str, Any]:
        """Its config's values with keys of some sections changed."""
        return self.values | {section: {**self.values[section], **keys} for section, keys in changes.items()}

    def copy(self, parent: Path) -> FinishedRun:
        """The same run, name and all, at another place."""
        root = parent / self.root.name
        shutil.copytree(self.root, root)
        return FinishedRun(root, {**self.values, "run_dir": str(root)}, self.model_dir, self.reporter)


def run_values(values: dict[str, Any], reporter: RecordingReporter | None = None, **options: Any) -> RecordingReporter:
    """Runs the pipeline on a config's nested values, whatever that redoes; gives what the reporter heard."""
    reporter = reporter or RecordingReporter()
    api.run(parse_config(values), reporter=reporter, **{"accept_changes": True, **options})
    return reporter


class DrySteps(Steps):
    """Notes of every stage only whether it would be redone; needs no Ray."""

    redone: list[str]

    def make(self, stage: Stage, context: Context, inputs: Inputs) -> Result:
        self.redone.append(stage.name)
        return self.directory.manifest()["stages"][stage.name]["result"]


def redone(
    values: dict[str, Any],
    begin: str | None = None,
    reporter: RecordingReporter | None = None,
    accept_versions: bool = False,
) -> list[str]:
    """The stages that a run of this config would do again; the reporter hears what it would say of that."""
    prepared, reporter, forced = prepare(parse_config(values)), reporter or RecordingReporter(), redone_from(begin)
    steps = DrySteps(prepared, reporter, AtOnce(), forced=forced, accept_versions=accept_versions)
    steps.redone = []
    run_stages(steps)
    return steps.redone
