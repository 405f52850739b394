"""The tests of ``tests/gpu`` have run somewhere: on the CPU, but for those that ask CUDA itself, by the README's command."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def run(*options: str, tests: str = "tests/gpu") -> str:
    """What the README's command prints where pytest has no plugin beside it; it ends well."""
    [command] = re.findall(r"^python (-m pytest .*tests/gpu.*?) +#", (ROOT / "pipelines/README.md").read_text(), re.M)
    words = shlex.split(command)
    words[words.index("tests/gpu")] = tests
    done = subprocess.run(
        [sys.executable, *words, "-p", "no:timeout", "-p", "no:xdist", "-p", "no:cacheprovider", *options],
        cwd=ROOT,
        env={**os.environ, "GPU_TESTS_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.deep
def test_what_a_gpu_is_asked_the_cpu_answers() -> None:
    assert "passed" in run()


def test_a_library_on_a_gpu_may_warn(tmp_path: Path) -> None:
    """As torch does once, when it is told to find waits."""
    (tmp_path / "test_warns.py").write_text("import warnings\n\ndef test_warns():\n    warnings.warn('a prototype')\n")
    assert "1 passed" in run("-c", str(ROOT / "pyproject.toml"), tests=str(tmp_path / "test_warns.py"))
