"""Calls of the command line in the test's own process, on a config in which all is well until a test spoils it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner, Result

from emloc_ray.io.formats.yaml_text import write_yaml
from emloc_ray.ui.cli import app

ROWS = [{"prompt": f"add {i}: ", "completion": f"it is {i}"} for i in range(20)]
VERBS = ["run", "calibrate", "factorize", "heal", "finetune", "correct", "merge", "evaluate", "validate", "plan"]


class Call(NamedTuple):
    """A config on disk, the run directory that it names, and how to call a verb with it."""

    config: Path
    run_dir: Path
    values: dict[str, Any]

    def __call__(self, verb: str, *arguments: str) -> Result:
        self.config.write_text(write_yaml(self.values))
        return invoke(verb, str(self.config), *arguments)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})


def lines_of(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class Place:
    """A directory with a valid config, ``my.yaml``, and its rows."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root = root
        self.values: dict[str, Any] = {
            "run_dir": "runs/mine",
            "model": str(model),
            "data": {"train": "rows.jsonl", "max_seq_length": 64},
            "adapter": {"r": 4},
            "finetune": {"max_steps": 2},
        }
        self.write("rows.jsonl", lines_of(ROWS))

    def write(self, name: str, content: str | bytes) -> None:
        (self.root / name).write_bytes(content.encode() if isinstance(content, str) else content)

    def __call__(self, *arguments: str) -> Result:
        self.write("my.yaml", write_yaml(self.values))
        result = invoke(*arguments)
        assert not (self.root / "runs").exists()
        return result


def with_slow_hub(names: Iterable[str]) -> list[Any]:
    """Cases by their names, those of the hub's data (29) marked: they import its library."""
    return [pytest.param(name, marks=pytest.mark.slow) if name.startswith("29 ") else name for name in names]
