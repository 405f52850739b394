"""Workers see the GPUs that they were given, and no others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os
import ray
from emloc_ray.errors import StageError
from emloc_ray.stages.ray.tasks import Resources
from emloc_ray.stages.ray.session import connection, total

def seen():
    return os.environ.get("CUDA_VISIBLE_DEVICES")

def found(gpus):
    try:
        return repr(ray.get([*Resources(1, 1, gpus).task(seen).remote()])[-1].result)
    except StageError as error:
        return "'0'" if "GPU 0, which torch" in str(error) else str(error)

with connection(num_cpus=1, num_gpus=2):
    print(total("GPU"), *map(found, (0, 1, 0)))
"""


@pytest.mark.parametrize("hides_none", ["0", "1"])
def test_a_worker_that_asked_for_no_gpu_sees_none(hides_none: str, tmp_path: Path) -> None:
    """Ray is told that the machine has two: it hides or gives them by their numbers, and where it is asked to hide none, the
    workers do; one that cannot open the GPU that it was given says so."""
    environment = {
        **os.environ,
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": hides_none,
        "CUDA_VISIBLE_DEVICES": "0,1",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2.0", "''", "'0'", "''"]
