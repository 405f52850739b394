"""The tests of ``tests/gpu`` have run somewhere: on the CPU, but for those that ask CUDA itself, by the README's command."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from gpu import test_gpu_runs

ROOT = Path(__file__).parents[3]


def run(*options: str, tests: str = "tests/gpu", path: Path | None = None) -> str:
    """What the README's command prints where pytest has no plugin beside it, ``path`` first on Python's; it ends well."""
    [command] = re.findall(r"^python (-m pytest .*tests/gpu.*?) +#", (ROOT / "pipelines/README.md").read_text(), re.M)
    words = shlex.split(command)
    words[words.index("tests/gpu")] = tests
    paths = (path, os.environ.get("PYTHONPATH"))
    done = subprocess.run(
        [sys.executable, *words, "-p", "no:timeout", "-p", "no:xdist", "-p", "no:cacheprovider", *options],
        cwd=ROOT,
        env={**os.environ, "GPU_TESTS_DEVICE": "cpu", "PYTHONPATH": os.pathsep.join(map(str, filter(None, paths)))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.deep
@pytest.mark.parametrize("missing", [("ray",), ("ray", "bitsandbytes", "obstore", "pydantic", "ruamel")])
def test_what_a_gpu_is_asked_the_cpu_answers(missing: tuple[str, ...], tmp_path: Path) -> None:
    """Whole runs too where Ray is missing, and what needs no more than the README says where more is."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys\n\nsys.modules.update(dict.fromkeys({missing}))\n")
    printed = run(path=tmp_path)
    assert "passed" in printed
    assert ("stages need" in printed) == ("pydantic" in missing)


def test_a_run_s_own_process_looks_for_packages_where_this_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_gpu_runs, "RUN", "import json, sys; print(json.dumps(sys.path))")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    assert str(tmp_path / "packages") in test_gpu_runs.run_on("", tmp_path / "run")


def test_a_library_on_a_gpu_may_warn(tmp_path: Path) -> None:
    """As torch does once, when it is told to find waits."""
    (tmp_path / "test_warns.py").write_text("import warnings\n\ndef test_warns():\n    warnings.warn('a prototype')\n")
    assert "1 passed" in run("-c", str(ROOT / "pyproject.toml"), tests=str(tmp_path / "test_warns.py"))
