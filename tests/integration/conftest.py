"""Fixtures of the integration tests: finished runs that several tests read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import FinishedRun, make_values, run_values


@pytest.fixture(scope="session")
def make_run(
    ray_session: None, tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Callable[..., Path]
) -> Callable[..., FinishedRun]:
    """``make_run(data, family=…, dtype=…, **changes)``: a run from end to end."""

    def make(data: Path, family: str = "llama", dtype: str = "float32", /, **changes: Any) -> FinishedRun:
        model_dir = tiny_model_dir(family, dtype=dtype)
        root = tmp_path_factory.mktemp("runs") / f"{family}-{dtype}"
        values = make_values(root, model_dir, data, **changes)
        reporter = run_values(values)
        return FinishedRun(root, values, model_dir, reporter)

    return make


@pytest.fixture(scope="session")
def llama_run(make_run: Callable[..., FinishedRun], task_file: Path) -> FinishedRun:
    """A tiny Llama's run in float32; read it, or spoil a copy."""
    return make_run(task_file)
