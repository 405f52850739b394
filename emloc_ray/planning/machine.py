"""What this machine has, as far as plans and remarks go by it; workers may be on others."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

_QUERY = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
# Of a control group: the files of its limit and of what it holds, and what memory.stat calls the inactive files in that.
_FIRST_VERSION = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_SECOND_VERSION = ("memory.max", "memory.current", "inactive_file")


@functools.cache
def gpu_bytes() -> float:
    """The memory of this machine's smallest GPU; infinite where it has none, or none that ``nvidia-smi`` tells of.

    torch would make a CUDA context to say so, which holds some of that memory for as long as its process lives.
    """
    try:
        told = subprocess.run(_QUERY, capture_output=True, text=True, timeout=30, check=True).stdout
        return min(float(line) for line in told.splitlines()) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return float("inf")


def available_bytes(root: Path = Path("/")) -> float:
    """The memory that this machine has left, or the control groups of this process: a container's, a batch system's job's.

    Of a group's usage, what it has of inactive files counts as left, as the kernel gives it back first: "working set" in
    https://kubernetes.io/docs/concepts/scheduling-eviction/node-pressure-eviction.
    """
    return min([float(psutil.virtual_memory().available), *_left_in_groups(root)])


def _left_in_groups(root: Path) -> Iterator[float]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers and "memory" not in controllers.split(","):
            continue
        # cgroups(7): the second version's line names no controllers. In a container the path may be the host's, and not
        # there: the group itself is at the top then.
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        limit, usage, inactive = _FIRST_VERSION if controllers else _SECOND_VERSION
        folder = top / path.lstrip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(top):
                with contextlib.suppress(OSError, ValueError):  # no limit, or "max"
                    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                    held = int((group / usage).read_text()) - int(stat.get(inactive, 0))
                    yield max(0.0, float(int((group / limit).read_text()) - held))


@functools.cache
def cpu_flops() -> float:
    """Floating-point operations a second of one thread in a matrix product like the model's, measured for a tenth of one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        left, right = torch.randn(512, 768), torch.randn(768, 768)
        left @ right
        count, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < 0.1:
            left @ right
            count += 1
        return count * 2 * 512 * 768 * 768 / (time.perf_counter() - begin)
    finally:
        torch.set_num_threads(threads)


def cpu_capabilities() -> dict[str, Any]:
    """What torch tells of this machine's CPU; nothing, where torch is older than that."""
    told: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return told


def has_bfloat16(capabilities: Mapping[str, Any]) -> bool:
    """Whether a CPU of these ``capabilities`` computes in bfloat16; True where it is of a kind that they say nothing of."""
    native = any(capabilities.get(key) for key in ("avx512_bf16", "amx_bf16", "avx10_2"))
    return native or capabilities.get("architecture") != "x86_64"
