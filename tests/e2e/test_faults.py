"""A few cells of the kill matrix, of which pipelines/faults.py runs all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.deep

ROOT = Path(__file__).parents[2]


def test_killed_nodes_and_drivers_change_nothing(tmp_path: Path) -> None:
    cells = ["--stages", "calibrate", "factorize", "--kinds", "node", "driver", "--moments", "1"]
    command = [sys.executable, str(ROOT / "pipelines" / "faults.py"), "--out", str(tmp_path), *cells]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "faults.json").read_text())
    assert [(cell["stage"], cell["kind"], cell["outcome"]) for cell in found] == [
        (stage, kind, "survived") for stage in ("calibrate", "factorize") for kind in ("node", "driver")
    ]
    assert "4 of 4 survived with the same files, 0 ended with others." in (tmp_path / "faults.md").read_text()
