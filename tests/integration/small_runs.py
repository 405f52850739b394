"""What the integration tests share: a small task, configs of two workers a stage, and runs that remember what happened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


class FinishedRun:
    """A run's directory with what its reporter heard; :meth:`copy` gives one that a test may spoil."""

    def __init__(self, root: Path, values: dict[str, Any], model_dir: Path, reporter: RecordingReporter) -> None:
        self.root, self.values, self.model_dir, self.reporter = root, values, model_dir, reporter
        self.metrics: dict[str, Any] = json.loads((root / "metrics.json").read_text())

    def copy(self, parent: Path) -> FinishedRun:
        """The same run, name and all, at another place."""
        root = parent / self.root.name
        shutil.copytree(self.root, root)
        return FinishedRun(root, {**self.values, "run_dir": str(root)}, self.model_dir, self.reporter)


def run_values(values: dict[str, Any], **options: Any) -> RecordingReporter:
    """Runs the pipeline on a config's nested values; gives what the reporter heard."""
    reporter = RecordingReporter()
    pipeline.run(parse_config(values), reporter=reporter, **options)
    return reporter
