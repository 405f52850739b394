"""What the steps of calibration are planned to take of disks and workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bare_runs import tiny_run

from emloc_ray.planning.costs import StageCost
from emloc_ray.planning.machine import Speeds
from emloc_ray.planning.memory import MemoryModel
from emloc_ray.planning.plan import make_plan
from emloc_ray.planning.prepared import Prepared
from emloc_ray.planning.sizes import gradient_bytes, gram_bytes
from emloc_ray.runs.remarks import idle_calibrators, of_settings
from emloc_ray.runs.steps import resources_of
from emloc_ray.stages.calibrate.stage import CALIBRATE, GRADIENTS, MAX_LEAD
from emloc_ray.stages.order import STEPS
from emloc_ray.stages.stage import Stage

SECTIONS = {"num_calibration_samples": 8, "rows_per_shard": 4}  # two shards


@pytest.fixture
def prepared(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> Callable[..., Prepared]:
    """``prepared(num_workers=…, hold=…)``: a tiny Llama's run whose sums are in the metric of predictions."""

    def make(hold: str = "resident", **calibration: Any) -> Prepared:
        return tiny_run(
            tmp_path,
            tiny_model_dir("llama"),
            memory_budget=None,
            model={"hold": hold},
            emulator={"objective": "predictions"},
            calibration={**SECTIONS, **calibration},
        )

    return make


def cost(stage: Stage, prepared: Prepared) -> StageCost:
    assert stage.cost is not None
    return stage.cost(MemoryModel(prepared))


def in_three(parts: Any) -> list[Any]:
    return [parts[:1], parts[1:3], parts[3:]]


def peak(waves: list[int], slots: int) -> int:
    """A wave's slots, twice as they commit, beside the packed sums of those before."""
    return max(sum(waves[:number]) // 2 + 2 * slots * wave for number, wave in enumerate(waves))


@pytest.mark.parametrize(("num_workers", "slots"), [(1, 1), (2, 2), (8, 2)])
def test_the_disk_holds_the_slots_of_one_wave(
    num_workers: int, slots: int, prepared: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(num_workers=num_workers)
    memory = MemoryModel(run)
    groups, plan = in_three([group for wave in memory.waves() for group in wave]), memory.gradient_plan()
    specs = tuple(in_three(tuple(spec for wave in plan.waves for spec in wave)))
    monkeypatch.setattr(MemoryModel, "waves", lambda self: groups)
    monkeypatch.setattr(MemoryModel, "gradient_plan", lambda self: replace(plan, waves=specs))
    assert cost(CALIBRATE, run).disk_bytes == peak([sum(map(gram_bytes, wave)) for wave in groups], slots)
    assert cost(GRADIENTS, run).disk_bytes == peak([sum(map(gradient_bytes, wave)) for wave in specs], slots)


def test_every_wave_is_written(prepared: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the disk holds the slots of one at a time."""
    run, costs = prepared(num_workers=2), []
    groups = [group for wave in MemoryModel(run).waves() for group in wave]
    for waves in ([groups], in_three(groups)):
        monkeypatch.setattr(MemoryModel, "waves", lambda self, waves=waves: waves)
        costs.append(cost(CALIBRATE, run))
    assert costs[1].disk_bytes < costs[0].disk_bytes
    assert costs[1].written_bytes == costs[0].written_bytes == 2.5 * sum(map(gram_bytes, groups))


@pytest.mark.parametrize(("num_workers", "slots"), [(1, 0), (8, 2)])
def test_block_by_block_the_disk_holds_what_slots_are_ahead(
    num_workers: int, slots: int, prepared: Callable[..., Prepared]
) -> None:
    memory = MemoryModel(run := prepared("block_by_block", num_workers=num_workers))
    grams = sum(gram_bytes(group) for wave in memory.waves() for group in wave)
    waiting = min((MAX_LEAD + 1) * slots * memory.calibration_parts_by_block()["grams"], slots * grams)
    assert cost(CALIBRATE, run).disk_bytes == grams // 2 + memory.hidden_state_disk_bytes() + waiting


def test_workers_without_a_shard_are_not_asked_for_and_take_no_time_off(prepared: Callable[..., Prepared]) -> None:
    two, eight = prepared(num_workers=2), prepared(num_workers=8)
    speeds = Speeds(cpu_flops=1e6)
    plans = [{entry.name: entry for entry in make_plan(STEPS, run, speeds).stages} for run in (two, eight)]
    for stage in (CALIBRATE, GRADIENTS):
        assert resources_of(stage, eight).num_workers == plans[1][stage.name].num_workers == 2
        assert plans[1][stage.name].seconds == plans[0][stage.name].seconds
    assert idle_calibrators(two) is None
    unread = replace(prepared(num_workers=8, num_calibration_samples=None), files={})
    assert idle_calibrators(unread) is None  # how many rows there are is not known yet
    assert str(idle_calibrators(eight)).startswith(
        "calibration.num_workers is 8, and 2 of them have a shard of rows: the others are not asked for; lower"
    )
    assert idle_calibrators(eight) in of_settings(eight, {})
