"""Calibration on Ray in every mode: block by block, in waves, with a worker killed; always the same Grams."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import FinishedRun, KillingReporter, RecordingReporter, Stopping, redone, run_values

from emloc_ray.config.reading import parse_config
from emloc_ray.errors import Stopped
from emloc_ray.io.formats.grams import INDEX, GramStore
from emloc_ray.planning.costs import with_base
from emloc_ray.planning.memory import MemoryModel, total
from emloc_ray.planning.prepared import prepare
from emloc_ray.planning.sizes import gram_bytes
from emloc_ray.stages.calibrate.calibrate import calibrate
from emloc_ray.stages.calibrate.stage import calibration_job
from emloc_ray.stages.context import Context
from emloc_ray.stages.ray.spans import Span, listening
from emloc_ray.stages.ray.tasks import Resources


@pytest.fixture
def calibrated(llama_run: FinishedRun, tmp_path: Path) -> Callable[..., Path]:
    """``calibrated(reporter, key=value, calibration={…})``: a new run on the same data, up to its Grams."""

    def make(reporter: RecordingReporter | None = None, **changes: Any) -> Path:
        sections = {key: value for key, value in changes.items() if isinstance(value, dict)}
        values = llama_run.changed(**sections) | {k: v for k, v in changes.items() if k not in sections}
        values["run_dir"] = str(tmp_path / "run")
        run_values(values, reporter, until="calibrate")
        return tmp_path / "run"

    return make


def assert_same_grams(found: Path, expected: Path) -> None:
    ours, theirs = GramStore(found / "calibration"), GramStore(expected / "calibration")
    assert ours.index["groups"] == theirs.index["groups"]
    assert ours.index["num_tokens"] == theirs.index["num_tokens"]
    for name in theirs.index["groups"]:
        torch.testing.assert_close(ours.read(name), theirs.read(name), rtol=1e-5, atol=1e-4)
    assert not list((found / "calibration").glob("slots"))
    assert not list((found / "calibration").glob("hidden"))


def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "manifest.json").read_text())["stages"]["calibrate"]["result"]


def test_auto_goes_block_by_block_under_a_budget_and_a_killed_worker_leaves_no_trace(
    calibrated: Callable[..., Path], llama_run: FinishedRun
) -> None:
    prepared = prepare(parse_config(llama_run.values))
    needed = total(with_base(MemoryModel(prepared).calibration_parts()))
    reporter = KillingReporter()
    run = calibrated(reporter, memory_budget=needed - 1)
    assert reporter.killed
    assert (result(run)["hold"], result(llama_run.root)["hold"]) == ("block_by_block", "resident")
    assert result(run)["num_workers"] == 2
    assert_same_grams(run, llama_run.root)


def test_waves_under_a_memory_budget_give_the_same_grams(
    calibrated: Callable[..., Path], llama_run: FinishedRun
) -> None:
    values = llama_run.changed(model={"hold": "resident"})
    prepared = prepare(parse_config(values))
    memory = MemoryModel(prepared)
    parts = with_base(memory.calibration_parts())
    largest = max(gram_bytes(group) for group in prepared.layout.groups)
    assert parts["grams"] > 2 * largest
    budget = total(parts) - int(parts["grams"]) + 2 * largest
    run = calibrated(memory_budget=budget, model={"hold": "resident"})
    assert result(run)["hold"] == "resident"
    assert result(run)["waves"] >= 2
    assert_same_grams(run, llama_run.root)


def test_sums_run_as_many_at_once_as_the_stage_has_workers(llama_run: FinishedRun, tmp_path: Path) -> None:
    job = calibration_job(Context(prepare(parse_config(llama_run.values)), llama_run.model_dir))
    spans: list[Span] = []
    with listening(spans.append):
        calibrate(job, tmp_path, Resources(num_workers=1))
    sums = sorted((span for span in spans if span.unit.startswith("the sum")), key=lambda span: span.begun_at)
    assert len(sums) > 1
    assert all(first.finished_at <= then.begun_at for first, then in itertools.pairwise(sums))


def test_grams_that_are_not_kept_are_gone_once_the_adapter_is_corrected_and_gathered_again_where_needed(
    llama_run: FinishedRun, tmp_path: Path
) -> None:
    copied = llama_run.copy(tmp_path)
    place = copied.root / "calibration"
    values = copied.changed(calibration={"keep": "none"})
    assert run_values(values, until="factorize").started == []
    assert place.exists()  # the correction may read them
    assert run_values(values).started == []
    assert not place.exists()
    before = (copied.root / "metrics.json").read_text()
    assert run_values(values).started == []
    assert json.loads((copied.root / "metrics.json").read_text())["stages"] == json.loads(before)["stages"]
    scored = {**values, "evaluation": {**values["evaluation"], "num_generations": 0}}
    assert redone(scored) == ["evaluate"]

    smaller = {**values, "emulator": {**values["emulator"], "compression_ratio": 0.25}}
    place.mkdir()
    (place / INDEX).write_text("{}")  # as where a kill came between the manifest and the files
    stopping = Stopping("calibrate", 1)
    with pytest.raises(Stopped):
        run_values(smaller, stopping, until="factorize")
    assert "factorize needs the result of calibrate, which was deleted: it is made again." in stopping.notes
    assert run_values(smaller, until="factorize").started == ["calibrate", "factorize"]
    assert_same_grams(copied.root, llama_run.root)
    assert run_values(smaller, until="correct").started == ["finetune", "correct"]
    assert not place.exists()

    correction = {**smaller["correction"], "method": "covariance", "strength": 0.3}
    stronger = {**smaller, "correction": correction}
    assert run_values(stronger, until="correct").started == ["calibrate", "correct"]
    assert not place.exists()
    assert run_values(stronger, until="correct").started == []
