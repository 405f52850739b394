"""What a stage used: peaks of its own workers, and of all processes in shared samples."""

from __future__ import annotations

import mmap
import time
from pathlib import Path

import pytest

from emloc_ray.stages.ray import usage as monitor
from emloc_ray.stages.ray.spans import Span, listening, tell_span, timed
from emloc_ray.stages.ray.usage import measured


@pytest.mark.slow
def test_a_workers_peak_is_that_of_its_own_task() -> None:
    def hold(size: int) -> int:
        held = bytearray(size)  # zeros are written, so that the pages are there
        time.sleep(0.3)  # while they are looked at
        return len(held)

    done = timed(hold)(2**28)
    large, small = done.span, timed(hold)(2**10).span
    assert done.result == 2**28
    assert large.peak_bytes - small.peak_bytes == pytest.approx(2**28, rel=0.2)
    assert large.peak_bytes - large.idle_bytes == pytest.approx(2**28, rel=0.2)
    kept: list[bytearray] = []
    first = timed(kept.append)(bytearray(2**10)).span
    kept.append(bytearray(2**27))
    assert timed(kept.clear, goes_on=True)().span.idle_bytes == first.idle_bytes


def test_pages_of_mapped_models_do_not_count(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(2**27))

    def read() -> int:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return sum(mapped[at] for at in range(0, 2**27, 4096))

    held = timed(read)().span
    assert held.peak_bytes - held.idle_bytes < 2**25


def test_a_stage_tells_what_its_worker_held_above_its_imports() -> None:
    with measured("finetune") as usage:
        for peak, idle in ((700, 500), (900, 600), (950, 0)):
            tell_span(Span("finetune", "process 7", "a step", 1.0, 2.0, peak_bytes=peak, idle_bytes=idle))
    assert usage.as_dict()["peak_above_imports_bytes"] == 300


def test_a_stage_took_what_its_largest_worker_held_on_whichever_node() -> None:
    heard: list[Span] = []
    with listening(heard.append), measured("merge") as usage:
        for stage, peak in (("merge", 2**50), ("factorize", 2**52), ("merge", 2**49)):
            tell_span(Span(stage, "process 7 on a node", "a shard", 1.0, 2.0, peak_bytes=peak))
    assert usage.as_dict()["peak_rss_bytes"] == 2**50
    assert usage.peak_pss_bytes < 2**49
    assert "peak_gpu_bytes" not in usage.as_dict()
    usage.hear(Span("merge", "process 7 on a node", "a shard", 1.0, 2.0, gpu_peak_bytes=2**33))
    assert usage.as_dict()["peak_gpu_bytes"] == 2**33
    assert len(heard) == 3
    with measured("merge") as usage:
        pass
    assert 2**20 < usage.peak_rss_bytes == usage.as_dict()["peak_rss_bytes"]


def test_slow_looks_are_shared_by_stages_side_by_side_and_no_stage_is_told_of_those_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, looks = [100.0], []

    def look() -> list[tuple[int, int]]:
        clock[0] += 0.1
        looks.append(clock[0])
        return [(len(looks), 0)]

    monkeypatch.setattr(monitor.time, "monotonic", lambda: clock[0])
    sampler = monitor.Sampler(look)
    assert sampler.latest(100.0) == sampler.latest(100.0) == [(1, 0)]
    clock[0] += 2.9  # a thirtieth of the time is spent on looks
    assert sampler.latest(100.0) == [(1, 0)]
    clock[0] += 0.2
    assert sampler.latest(100.0) == [(2, 0)]
    begun = clock[0]
    assert sampler.latest(begun) == [(3, 0)]
    assert sampler.latest(begun) == [(3, 0)]
