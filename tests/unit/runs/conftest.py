"""A run that has not begun."""

from __future__ import annotations

from pathlib import Path

import pytest

from emloc_ray.io.runs.directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """It."""
    directory = RunDirectory(tmp_path / "mine")
    directory.create({})
    return directory
