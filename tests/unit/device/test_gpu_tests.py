"""The tests of ``tests/gpu`` have run somewhere: on the CPU, but for those that ask CUDA itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.deep
def test_what_a_gpu_is_asked_the_cpu_answers() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", "--confcutdir", "tests/gpu"],
        cwd=ROOT,
        env={**os.environ, "GPU_TESTS_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout
