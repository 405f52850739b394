"""What this machine has, as far as plans and remarks go by it; workers may be on others."""

from __future__ import annotations

import functools
import subprocess
import time
from collections.abc import Mapping
from typing import Any

import torch

_QUERY = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")


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
