"""What tasks tell of themselves."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from emloc_ray.stages.ray.spans import timed

SCRIPT = """
from emloc_ray.stages.ray.spans import timed

task = timed(lambda: None)
before = task().span.peak_bytes
blocks = [bytearray(b"x") * 100_000 for _ in range(2000)]
held = task().span.peak_bytes
last = blocks.pop()  # on top of what is freed now
blocks.clear()
print(before, held, task().span.peak_bytes)
"""


GROWING = """
import os
from emloc_ray.stages.ray.spans import timed

names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
print(timed(lambda: [os.environ[name] for name in names if name in os.environ])().result)
"""


@pytest.mark.parametrize("own", [None, "max_split_size_mb:64"])
def test_a_worker_s_allocator_grows_its_segments_unless_the_node_says_otherwise(own: str | None) -> None:
    """In a Ray that the caller started too, which sets no variables."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    environment |= {} if own is None else {names[1]: own}
    told = subprocess.run([sys.executable, "-c", GROWING], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == str([own or "expandable_segments:True"])


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other C libraries keep and give back memory in their ways"
)
def test_what_an_earlier_task_freed_is_not_this_one_s() -> None:
    told = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    before, held, after = map(int, told.stdout.split())
    assert held - before > 150 * 2**20
    assert after - before < 50 * 2**20


LEFT = """
import gc, weakref
from emloc_ray.stages.ray.spans import timed

class Node:
    pass

def work():
    node = Node()
    node.itself = node
    return weakref.ref(node)

left = timed(work)().result
frozen = gc.get_freeze_count()
gc.collect()
print(frozen, left() is None)
import asyncio.events, email.parser, http.client, sqlite3, unittest.mock, xml.dom.minidom  # some more modules
left = timed(work)().result
gc.collect()
print(gc.get_freeze_count(), left() is None)
"""


def test_the_collector_passes_over_what_was_imported_and_not_over_what_work_left() -> None:
    told = subprocess.run([sys.executable, "-c", LEFT], capture_output=True, text=True, check=True)
    (first, gone), (second, gone_too) = (line.split() for line in told.stdout.splitlines())
    assert 10_000 < int(first) < int(second)
    assert (gone, gone_too) == ("True", "True")


def test_a_span_has_the_peak_of_its_own_gpu_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process held on its GPU before is forgotten first; a stand-in for torch.cuda keeps the count."""
    held = [2**30]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: held.append(0))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: held[-1])
    assert timed(lambda: held.append(held[-1] + 2**20))().span.gpu_peak_bytes == 2**20


def test_without_a_gpu_a_span_has_no_peak_there() -> None:
    assert not torch.cuda.is_initialized()
    assert timed(int)().span.gpu_peak_bytes == 0
