"""What the integration tests share: a small task, configs of two workers a stage, and runs that remember what happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from emloc_ray import pipeline
from emloc_ray.config import parse_config

TWO = {"num_workers": 2}
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
        "model": {"source": str(model_dir)},
        "data": {"train": {"path": str(data)}, "format": "prompt_completion", "max_seq_length": LENGTH},
        "calibration": {**TWO, "num_calibration_samples": 32, "rows_per_shard": 8},
        "emulator": {**TWO, "compression_ratio": 0.5},
        "adapter": {"r": 4, "lora_alpha": 16},
        "finetune": {
            **TWO,
            "max_steps": 8,
            "per_device_train_batch_size": 4,
            "learning_rate": 5e-3,
            "logging_steps": 1,
        },
        "correction": {"num_selection_samples": 8},
        "merge": dict(TWO),
        "evaluation": {**TWO, "num_exact_match": 2, "num_generations": 2, "max_new_tokens": 4},
    }
    for section, keys in changes.items():
        values[section] = {**values.get(section, {}), **keys}
    return values


class RecordingReporter(pipeline.SilentReporter):
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


class KillingReporter(RecordingReporter):
    """Kills one worker, by a part of its process's name, once a stage says that it has come so far."""

    def __init__(self, stage: str, process_name: str, at: int) -> None:
        super().__init__()
        self.stage, self.process_name, self.at = stage, process_name, at
        self.killed: list[int] = []
        self.killed_at = 0

    def start(self, stage: str) -> Callable[[int, int], None]:
        super().start(stage)
        return self._progress if stage == self.stage else lambda done, total: None

    def _progress(self, done: int, total: int) -> None:
        if done >= self.at and not self.killed:
            found = sorted(p.pid for p in worker_processes() if self.process_name in p.name() + "".join(p.cmdline()))
            os.kill(found[0], signal.SIGKILL)
            self.killed.append(found[0])
            self.killed_at = done


def worker_processes() -> list[psutil.Process]:
    """The Ray workers of this test session."""
    return [p for p in psutil.Process().children(recursive=True) if p.is_running() and p.name().startswith("ray::")]


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
    """Runs the pipeline on a config's nested values; gives what the reporter heard."""
    reporter = reporter or RecordingReporter()
    pipeline.run(parse_config(values), reporter=reporter, **options)
    return reporter
