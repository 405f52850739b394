"""``benchmark.py gpu`` at tiny shapes on the CPU: all of its parts, from a checkout, with what a GPU machine may lack."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from ablations.tables import render
from benchmarks.gpu import training
from benchmarks.gpu.session import Session
from benchmarks.gpu.shapes import SHAPES

pytestmark = pytest.mark.without_ray

SCRIPT = Path(__file__).parents[2] / "pipelines" / "benchmark.py"
# The process that runs the script finds none of these packages, whether it imports them or only asks for them.
HIDING = """
    import importlib.metadata, runpy, sys

    HIDDEN = {"ray", "pydantic", "typer", "rich", "bitsandbytes", "pyarrow", "obstore", "wrapt", "ruamel", "pandas", "scipy"}

    class Finder:
        def __init__(self, finders):
            self.finders = finders

        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in HIDDEN:
                return None
            return next(filter(None, (finder.find_spec(name, path, target) for finder in self.finders)), None)

        def find_distributions(self, context=importlib.metadata.DistributionFinder.Context()):
            return importlib.metadata.MetadataPathFinder.find_distributions(context)

    sys.meta_path[:] = [Finder(list(sys.meta_path))]
    sys.argv = sys.argv[1:]
    sys.path[0] = sys.argv[0].rpartition("/")[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
    assert not HIDDEN & {name.partition(".")[0] for name in sys.modules}
"""


def run(*arguments: str, hiding: bool) -> subprocess.CompletedProcess[str]:
    command = ["-c", textwrap.dedent(HIDING), str(SCRIPT)] if hiding else [str(SCRIPT)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(SCRIPT.parents[1]),
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.run(
        [sys.executable, *command, *arguments], capture_output=True, text=True, env=environment, timeout=500
    )


def test_every_part_measures_without_ray_and_pydantic(tmp_path: Path) -> None:
    done = run("gpu", "--device", "cpu", "--shapes", "tiny", "--out", str(tmp_path), hiding=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((tmp_path / "gpu.json").read_text())
    assert found["machine"]["torch"] == torch.__version__
    measured = found["measured"]
    assert list(measured) == ["training", "ranks", "blocks", "24 GiB", "factorization", "correction", "rounding"]
    quantized = measured["training"].pop("LoRA on the original in NF4")
    assert "bitsandbytes" in quantized["left_out"]
    for part, cases in measured.items():
        for case, result in cases.items():
            assert not {"failed", "left_out"} & result.keys(), (part, case, result)
    steps = measured["training"]
    assert steps.pop("inference of the original")["s"] > 0
    assert all(case["passed"] for case in measured["24 GiB"].values())
    assert all(step["tokens_per_s"] > 0 and step["planned_bytes"] > 0 for step in steps.values())
    assert [step["masked"] for step in steps.values()] == [False, False, False, True, False, False, False]
    errors = [case["error"] for case in measured["factorization"].values() if "error" in case]
    assert any(name.startswith("spectrum of") and case["s"] > 0 for name, case in measured["factorization"].items())
    assert all(0 < error < 1 for error in errors)
    assert all(0 < case["error"] < case["error_nearest"] < 1 for case in measured["rounding"].values())
    for case in measured["correction"].values():
        assert 0 < case["shortfalls"]["after"] < case["shortfalls"]["before"]
    table = render(found)
    assert all(what in table for lines in found["parts"].values() for what in lines)


def test_what_fails_or_lacks_time_is_told_and_the_next_goes_on(tmp_path: Path) -> None:
    session = Session("cpu", SHAPES["full"], tmp_path, minutes=0.5)

    def fail() -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")

    session.measure("part", "too large", 0, fail)
    session.measure("part", "too long", 60, dict)
    session.measure("part", "fits", 0, lambda: {"s": 1.0})
    found = json.loads((tmp_path / "gpu.json").read_text())["measured"]["part"]
    assert found["too large"]["failed"] == "OutOfMemoryError: CUDA out of memory."
    assert found["too long"]["left_out"].startswith("It takes about 60 s, and ")
    assert found["fits"]["s"] == 1.0


def test_the_plan_of_an_8b_emulator_is_between_its_weights_and_a_24_gb_card() -> None:
    shapes = SHAPES["full"]
    config = training.llama_config(shapes.model)
    ranks = training.uniform_ranks(training.linears_of(config), training.RATIO, shapes.multiple)
    assert set(ranks.values()) == {384, 1024, 1536}
    planned = training.planned_bytes(config, ranks, rows=1, length=shapes.length)
    original = training.planned_bytes(config, {}, rows=1, length=shapes.length)
    assert 8.5e9 < planned < 24 * 2**30
    assert original > 16e9


def test_a_gpu_that_is_asked_for_and_absent_is_one_sentence(tmp_path: Path) -> None:
    done = run("gpu", "--out", str(tmp_path), hiding=False)
    assert done.returncode == 2
    assert "--device cuda needs a GPU that torch sees" in done.stderr


def test_small_figures_are_not_published(tmp_path: Path) -> None:
    done = run("gpu", "--device", "cpu", "--publish", "--out", str(tmp_path), hiding=False)
    assert done.returncode == 2
    assert "--publish takes full shapes on a GPU" in done.stderr
