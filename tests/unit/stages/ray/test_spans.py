"""What tasks tell of themselves."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
from emloc_ray.stages.ray.spans import timed

task = timed(lambda: None)
before = task().peak_bytes
blocks = [bytearray(b"x") * 100_000 for _ in range(2000)]
held = task().peak_bytes
last = blocks.pop()  # on top of what is freed now
blocks.clear()
print(before, held, task().peak_bytes)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other C libraries keep and give back memory in their ways"
)
def test_what_an_earlier_task_freed_is_not_this_one_s() -> None:
    told = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    before, held, after = map(int, told.stdout.split())
    assert held - before > 150 * 2**20
    assert after - before < 50 * 2**20
