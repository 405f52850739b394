"""A few cells of the kill matrix, of which pipelines/faults.py runs all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.deep

ROOT = Path(__file__).parents[2]


def faults(out: Path, *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(ROOT / "pipelines" / "faults.py"), "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: list[dict[str, Any]] = json.loads((out / "faults.json").read_text())
    return found


def test_killed_nodes_and_drivers_change_nothing(tmp_path: Path) -> None:
    found = faults(tmp_path, "--stages", "calibrate", "factorize", "--kinds", "node", "driver", "--moments", "1")
    assert [(cell["stage"], cell["kind"], cell["outcome"]) for cell in found] == [
        (stage, kind, "survived") for stage in ("calibrate", "factorize") for kind in ("node", "driver")
    ]
    assert "4 of 4 survived with the same files, 0 ended with others." in (tmp_path / "faults.md").read_text()


def test_a_node_that_is_stopped_until_it_counts_as_dead_changes_nothing(tmp_path: Path) -> None:
    found = faults(tmp_path, "--stages", "factorize", "--kinds", "pause-node", "--moments", "1", "--seed", "5")
    assert [(cell["kind"], cell["outcome"]) for cell in found] == [("pause-node", "survived")]
