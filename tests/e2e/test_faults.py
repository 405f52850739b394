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


def test_killed_and_stopped_nodes_and_drivers_change_nothing(tmp_path: Path) -> None:
    kinds = ("node", "driver", "pause-node")
    command = [sys.executable, str(ROOT / "pipelines" / "faults.py"), "--out", str(tmp_path), "--moments", "1"]
    done = subprocess.run(
        [*command, "--stages", "factorize", "--seed", "5", "--kinds", *kinds],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cells: list[dict[str, Any]] = json.loads((tmp_path / "faults.json").read_text())
    assert [(cell["kind"], cell["outcome"]) for cell in cells] == [(kind, "survived") for kind in kinds]
    assert "3 of 3 survived with the same files, 0 ended with others." in (tmp_path / "faults.md").read_text()
