"""What is told of this machine, by a stand-in for the tool that knows its GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from emloc_ray.machine import cpu_flops, gpu_bytes


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    gpu_bytes.cache_clear()
    yield
    gpu_bytes.cache_clear()


@pytest.mark.parametrize(
    ("script", "mib"),
    [
        ("printf '81559\\n24564\\n'", 24564),
        ("echo '[N/A]'", float("inf")),  # memory that CPU and GPU share
        ("echo no driver; exit 9", float("inf")),
        ("true", float("inf")),
        (None, float("inf")),
    ],
)
def test_the_smallest_gpu_s_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, mib: float
) -> None:
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_bytes() == mib * 2**20


def test_a_thread_s_speed_is_that_of_a_processor() -> None:
    assert 1e8 < cpu_flops() < 1e13
