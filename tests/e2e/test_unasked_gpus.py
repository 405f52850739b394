"""Workers see the GPUs that they were given, and no others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


def test_a_worker_that_asked_for_no_gpu_sees_none(tmp_path: Path) -> None:
    """Ray is told that the machine has two: it hides or gives them by their numbers; a worker that cannot open the one it
    was given says so."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2.0", "''", "'0'", "''"]
