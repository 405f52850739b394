"""Calls of the command line that start no Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from cli_calls import ROWS, Call, Place, lines_of


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting Ray is a failure."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


@pytest.fixture
def call(tmp_path: Path, tiny_model_dir: Callable[..., Path], no_ray: None) -> Call:
    """A config in which all is well."""
    data = tmp_path / "rows.jsonl"
    data.write_text(lines_of(ROWS))
    values = {
        "run_dir": str(tmp_path / "runs" / "mine"),
        "model": {"source": str(tiny_model_dir("llama"))},
        "data": {"train": {"path": str(data)}, "format": "prompt_completion", "max_seq_length": 64},
        "adapter": {"r": 4},
        "finetune": {"max_steps": 2},
    }
    return Call(tmp_path / "config.yaml", tmp_path / "runs" / "mine", values)


@pytest.fixture
def place(tmp_path: Path, tiny_model_dir: Callable[..., Path], no_ray: None, monkeypatch: pytest.MonkeyPatch) -> Place:
    """The working directory, with a config in which all is well."""
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, tiny_model_dir("llama"))
