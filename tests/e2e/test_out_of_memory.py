"""Ray's memory monitor kills what takes too much: said as that, with what to change."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.deep

GIB = 2**30

_SCRIPT = """
import functools, os, sys, time
os.environ.update(RAY_memory_usage_threshold=sys.argv[1], RAY_memory_monitor_refresh_ms="100")
import ray
from emloc_ray.stages.ray.tasks import Resources, bounded
from emloc_ray.stages.ray.losses import Losses
from emloc_ray.stages.ray.slots import run_slots, start_slot

def eat():
    held = []
    while len(held) < 64:
        held.append(b"x" * 2**26)
    time.sleep(60)

class Slot:
    def __init__(self):
        eat()

def told(work):
    try:
        work()
    except Exception as error:
        print(error, flush=True)

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
task = Resources().task(eat)
told(lambda: bounded([("layer q", task.remote)], 1, Losses("factorize", bound=0)))
start = lambda slot: start_slot(Resources(), "calibrate: slot 0", [0], Slot)
told(lambda: run_slots(start, [[0]], "token shard", Losses("calibrate", bound=0)))
"""


def test_what_ray_kills_for_memory_is_said() -> None:
    memory = psutil.virtual_memory()
    if memory.available < 7 * GIB:
        pytest.skip("needs 7 GiB of free memory")
    threshold = (memory.total - memory.available + 3 * GIB) / memory.total
    command = [sys.executable, "-c", _SCRIPT, f"{threshold:.3f}"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, timeout=200)
    advice = "the last time because its node ran out of memory: set memory_budget to what it has, or lower its batch"
    first, second = [line for line in done.stdout.splitlines() if "lost its worker" in line]
    assert first.startswith(f"factorize: layer q lost its worker 1 times, {advice}")
    assert second.startswith(f"calibrate: slot 0 lost its worker 1 times, {advice}")
