"""Gauges of runs and batches, without Ray: the values set are those of stages; dashboard and alerts name no other."""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.metrics import Counter, Gauge

from emloc_ray.errors import NumericsError, Stopped
from emloc_ray.io.runs.cache import ArtifactCache
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.runs.batch.state import BatchState, TaskState
from emloc_ray.runs.gauges import BatchGauges, RunGauges
from emloc_ray.stages.ray.losses import Losses

ROOT = Path(__file__).parents[3]
Values = dict[str, float]


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch) -> Values:
    """What is set, as Prometheus names it."""
    values: Values = {}

    def named(metric: Any, tags: dict[str, str], suffix: str = "") -> str:
        assert set(tags) == set(metric.info["tag_keys"])
        return f"ray_{metric.info['name']}{suffix} {' '.join(tags.values())}"

    def put(metric: Any, value: float, tags: dict[str, str]) -> None:
        values[named(metric, tags)] = value

    def add(metric: Any, value: float, tags: dict[str, str]) -> None:
        key = named(metric, tags, "_total")
        values[key] = values.get(key, 0) + value

    monkeypatch.setattr(Gauge, "set", put)
    monkeypatch.setattr(Counter, "inc", add)
    return values


def use_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that runs, one from the cache, a lost worker, a failed run, a batch."""
    run = RunDirectory(folder / "mine")
    run.root.mkdir()
    monkeypatch.setattr(RunDirectory, "lease_age_s", property(lambda run: 7.0))
    gauges = RunGauges(run, ArtifactCache(str(folder / "shared")))
    with contextlib.suppress(NumericsError), gauges:
        gauges.start("calibrate")(3, 5)
        gauges.finish("calibrate", {"num_tokens": 80}, {"wall_s": 4.0})
        gauges.finish("evaluate", {"evaluation": {"a": {"num_tokens": 6}, "b": {"num_tokens": 4}}}, {"wall_s": 2.0})
        gauges.finish("factorize", {"taken_from": "other"}, {"wall_s": 1.0})
        raise NumericsError("A NaN.")
    with monkeypatch.context() as patched:
        patched.setattr(ray, "is_initialized", lambda: True)
        Losses("calibrate").record_lost_worker("slot 0", ray.exceptions.WorkerCrashedError())
    cache = ArtifactCache(str(folder / "cache"))
    tasks = (
        TaskState("a", "running", "calibrate", active=True),
        TaskState("b", "running", "merge", waits_for="resources"),
        TaskState("c", "running", "calibrate", waits_for="another"),
        TaskState("d", "running", "data"),
        TaskState("e", "done"),
    )
    BatchGauges("many", cache).show(BatchState(0.0, tasks))


def test_what_is_set(values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_all(tmp_path, monkeypatch)
    free, seconds = values.pop("ray_emloc_ray_bytes_free mine"), values["ray_emloc_ray_stage_seconds mine calibrate"]
    assert 0 < free <= shutil.disk_usage(tmp_path).total
    assert seconds == 4.0
    assert values["ray_emloc_ray_units_done mine calibrate"] == 3
    assert values["ray_emloc_ray_units_total mine calibrate"] == 5
    assert values["ray_emloc_ray_tokens_per_second mine calibrate"] == 20
    assert values["ray_emloc_ray_tokens_per_second mine evaluate"] == 5
    assert "ray_emloc_ray_tokens_per_second mine factorize" not in values
    assert values["ray_emloc_ray_cache_hits_total mine factorize"] == 1
    assert values["ray_emloc_ray_failed mine NumericsError"] == 1
    assert values["ray_emloc_ray_lost_workers_total calibrate its process crashed or was killed"] == 1
    assert values["ray_emloc_ray_lease_age_seconds mine"] == 7
    assert values["ray_emloc_ray_tasks many running"] == 4
    assert values["ray_emloc_ray_stages_queued many"] == 1
    for owner in ("shared", "cache"):  # of a run by itself, of a batch
        assert values[f"ray_emloc_ray_cache_bytes {tmp_path / owner}"] == 0


@pytest.mark.parametrize("name", ["dashboard.json", "alerts.yaml"])
def test_dashboard_and_alerts_name_what_is_exported(
    name: str, values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_all(tmp_path, monkeypatch)
    exported = {key.split(" ")[0] for key in values}
    named = set(re.findall(r"\bray_emloc_ray_\w+", (ROOT / "cluster" / "monitoring" / name).read_text()))
    assert named <= exported
    if name == "dashboard.json":
        assert named == exported


def test_a_task_that_was_cancelled_has_not_failed(values: Values, tmp_path: Path) -> None:
    with contextlib.suppress(Stopped), RunGauges(RunDirectory(tmp_path)):
        raise Stopped("finetune was stopped at 3 of 50.")
    assert values == {}
