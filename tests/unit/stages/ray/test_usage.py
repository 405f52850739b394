"""Processes by the names that people know them by."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from emloc_ray.stages.ray import usage as monitor
from emloc_ray.stages.ray.spans import Span, Timed, listening, tell_span, timed
from emloc_ray.stages.ray.usage import kind_of, measured


@pytest.mark.parametrize(
    ("title", "kind"),
    [
        ("ray::PlacementGroupCleaner.clean", "PlacementGroupCleaner"),
        ("ray::calibrate: slot 0", "calibrate"),
        ("ray::factorize: model.layers.3.mlp.gate_proj and model.layers.3.mlp.up_proj", "factorize"),
        ("ray::merge: model-00001-of-00004.safetensors", "merge"),
        ("ray::_add_task()", "_add_task"),
        ("ray::IDLE", "IDLE"),
    ],
)
def test_a_worker_is_known_by_its_actor_or_its_tasks_stage(title: str, kind: str) -> None:
    worker: Any = SimpleNamespace(pid=-1, cmdline=lambda: [title], name=lambda: "python")
    assert kind_of(worker) == kind
    assert kind_of(SimpleNamespace(pid=-1, cmdline=lambda: ["raylet"], name=lambda: "raylet")) == "raylet"


def test_a_workers_peak_is_that_of_its_own_task() -> None:
    def hold(size: int) -> int:
        return len(bytearray(size))  # zeros are written, so that the pages are there

    large: Timed = timed(hold)(2**28)
    small: Timed = timed(hold)(2**10)
    assert large.result == 2**28
    assert large.peak_bytes - small.peak_bytes == pytest.approx(2**28, rel=0.2)


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

    def look() -> list[tuple[str, int, int]]:
        clock[0] += 0.1
        looks.append(clock[0])
        return [("driver", len(looks), 0)]

    monkeypatch.setattr(monitor.time, "monotonic", lambda: clock[0])
    sampler = monitor.Sampler(look)
    assert sampler.latest(100.0) == sampler.latest(100.0) == [("driver", 1, 0)]
    clock[0] += 2.9  # a thirtieth of the time is spent on looks
    assert sampler.latest(100.0) == [("driver", 1, 0)]
    clock[0] += 0.2
    assert sampler.latest(100.0) == [("driver", 2, 0)]
    begun = clock[0]
    assert sampler.latest(begun) == [("driver", 3, 0)]
    assert sampler.latest(begun) == [("driver", 3, 0)]
