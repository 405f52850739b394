"""Slots and their sums as the driver sees them: what memory runs out for, what an earlier try has left, what is checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import WorkerCrashedError
from stage_artifacts import Artifacts

from emloc_ray.core.gram import Gram
from emloc_ray.errors import ArtifactError, Stopped
from emloc_ray.io.formats.grams import GramStore, write_gram_shard
from emloc_ray.io.store.atomic import write_json
from emloc_ray.stages.calibrate import calibrate as calibrating
from emloc_ray.stages.calibrate.calibrate import calibrate, gather_or_go_by_block
from emloc_ray.stages.calibrate.job import BLOCKS, CalibrationJob, resume_job
from emloc_ray.stages.calibrate.resident_slot import ResidentSlot
from emloc_ray.stages.calibrate.thin_experts import FOLDER, Gathered
from emloc_ray.stages.ray.losses import MAX_RESTARTS, Losses
from emloc_ray.stages.ray.tasks import Resources


@pytest.mark.parametrize(("may_stream", "hold"), [(True, "resident"), (False, "resident"), (True, BLOCKS)])
def test_out_of_memory_goes_on_block_by_block_where_it_may(
    artifacts: Artifacts, tmp_path: Path, may_stream: bool, hold: str
) -> None:
    job = resume_job(
        replace(artifacts.calibration_job, may_stream=may_stream, hold=hold), tmp_path, "inputs", 2, auto=True
    )
    notes: list[str] = []

    def gather(job: CalibrationJob, out_dir: Path) -> Gathered:
        if job.hold == hold:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return {"layer": 7}, {"layer": "file"}

    if may_stream and hold == "resident":
        found, gathered = gather_or_go_by_block(job, tmp_path, gather, notes.append)
        assert (found.hold, found.waves, gathered) == (BLOCKS, None, ({"layer": 7}, {"layer": "file"}))
        assert found.batch_size == 1
        assert notes == [
            "calibrate: a worker ran out of memory with the model held resident; it continues block by block,"
            " a row at a time."
        ]
        return
    with pytest.raises(torch.OutOfMemoryError):
        gather_or_go_by_block(job, tmp_path, gather, notes.append)
    assert notes == []


def test_a_second_pass_over_thin_experts_goes_on_block_by_block_too(
    artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [name, *_], *_ = artifacts.calibration_job.groups
    experts = ((name, artifacts.specs[0].in_features),)
    job = replace(artifacts.calibration_job, may_stream=True, experts=experts, min_expert_tokens=5)
    job = resume_job(job, tmp_path, "inputs", 1, auto=True)
    ways: list[tuple[bool, str]] = []

    def gather(job: CalibrationJob, out_dir: Path, *_: Any) -> Gathered:
        ways.append((out_dir.name == FOLDER, job.hold))
        if job.reread and job.hold != BLOCKS:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        file = f"{job.hold}.safetensors"
        counts = {group[0]: 2 if group[0] == name and not job.reread else 9 for group in job.groups}
        write_gram_shard(out_dir / file, {each: Gram(torch.eye(4), count) for each, count in counts.items()})
        return counts, dict.fromkeys(counts, file)

    for way in ("_gather_whole_model", "_gather_block_by_block"):
        monkeypatch.setattr(calibrating, way, gather)
    calibrate(job, tmp_path, Resources())
    assert ways == [(False, "resident"), (True, "resident"), (True, BLOCKS)]
    assert GramStore(tmp_path).num_tokens(name) == 9


class OneProcess:
    """Slots and sums in this process: ``passes`` are the folders of the slots that were begun; ``lost`` is called before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes: list[str] = []
        self.lost: Any = lambda losses: None
        for name in ("start_slot", "run_slots", "run_tasks"):
            monkeypatch.setattr(calibrating, name, getattr(self, name))

    def start_slot(
        self, resources: Resources, name: str, units: Sequence[int], make: type[ResidentSlot], *arguments: Any
    ) -> None:
        self.passes.append(arguments[1].parent.name)
        slot = make(*arguments)
        for unit in units:
            if unit > slot.position():
                slot.accumulate(unit)
        slot.commit()

    def run_slots(self, start: Any, work: Any, unit_name: str, losses: Losses, *rest: Any, **more: Any) -> None:
        self.lost(losses)
        for slot in range(len(work)):
            start(slot)

    def run_tasks(
        self, function: Any, shared: Any, pieces: Any, resources: Resources, losses: Losses, progress: Any
    ) -> list[Any]:
        progress(0, len(pieces))
        return [function(shared, *arguments) for _, arguments in pieces]


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> OneProcess:
    return OneProcess(monkeypatch)


@pytest.fixture
def in_waves(artifacts: Artifacts) -> CalibrationJob:
    """Two of them."""
    job = artifacts.calibration_job
    return replace(job, waves=(job.groups[:2], job.groups[2:]))


def test_workers_lost_in_one_wave_do_not_count_in_the_next(
    in_waves: CalibrationJob, tmp_path: Path, one_process: OneProcess
) -> None:
    def lost(losses: Losses) -> None:
        for _ in range(MAX_RESTARTS):
            losses.record_lost_worker("slot 0 at token shard 0", WorkerCrashedError())

    one_process.lost = lost
    told: list[str] = []
    assert calibrate(in_waves, tmp_path / "grams", Resources(), tell=told.append)["waves"] == 2
    assert len(told) == 2 * MAX_RESTARTS


def test_a_sum_hears_that_the_run_is_stopped(in_waves: CalibrationJob, tmp_path: Path, one_process: OneProcess) -> None:
    heard: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        heard.append((done, total))
        raise Stopped("The run was stopped.")

    with pytest.raises(Stopped):
        calibrate(in_waves, tmp_path, Resources(), stop)
    assert heard == [(4, 8)]  # token shards of both waves
    assert len(one_process.passes) == 1


def test_a_wave_that_was_summed_is_not_gathered_again_and_its_slots_are_gone(
    in_waves: CalibrationJob, tmp_path: Path, one_process: OneProcess
) -> None:
    calibrate(in_waves, tmp_path / "calm", Resources(num_workers=2))
    first, second = "wave-0000-of-0002", "wave-0001-of-0002"
    assert one_process.passes == [first, first, second, second]

    def stop(losses: Losses) -> None:
        if one_process.passes:
            raise Stopped("The run was stopped.")

    one_process.passes.clear()
    one_process.lost = stop
    with pytest.raises(Stopped):
        calibrate(in_waves, tmp_path / "stopped", Resources(num_workers=2))
    assert one_process.passes == [first, first]
    assert not list((tmp_path / "stopped" / "slots").iterdir())

    one_process.passes.clear()
    calibrate(in_waves, tmp_path / "stopped", Resources())
    assert one_process.passes == [second]
    found, expected = GramStore(tmp_path / "stopped"), GramStore(tmp_path / "calm")
    assert found.index == expected.index
    for name in expected.index["groups"]:
        torch.testing.assert_close(found.read(name), expected.read(name), rtol=1e-5, atol=1e-4)


def test_a_slot_that_was_written_over_once_it_was_whole_is_not_summed(
    artifacts: Artifacts, tmp_path: Path, one_process: OneProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a task that counted as lost, after its successor."""
    job = artifacts.calibration_job
    late = tmp_path / "slots" / "wave-0000-of-0001" / "slot-0000-of-0001.safetensors"
    slot = ResidentSlot(job, late, 1)
    slot.accumulate(0)
    slot.commit()
    with monkeypatch.context() as patch:
        patch.setattr(calibrating, "last_shard", lambda file: 3)  # as it was when it was looked at
        with pytest.raises(ArtifactError, match="holds the sums to 0, not to 3"):
            calibrate(job, tmp_path, Resources())
    calibrate(job, tmp_path, Resources())
    assert GramStore(tmp_path).index["num_tokens"] == GramStore(artifacts.calibration_dir).index["num_tokens"]


def test_the_next_try_goes_on_with_the_batch_that_fitted(
    artifacts: Artifacts, tmp_path: Path, one_process: OneProcess
) -> None:
    folder = tmp_path / "slots" / "wave-0000-of-0001"
    for of, rows in ((1, 2), (2, 1)):  # the other was of two slots
        write_json(folder / f"slot-0000-of-{of:04d}.batch.json", {"rows": rows})
    left: list[str] = []
    one_process.lost = lambda losses: left.extend(path.name for path in folder.iterdir())
    told: list[str] = []
    calibrate(artifacts.calibration_job, tmp_path, Resources(), tell=told.append)
    assert left == ["slot-0000-of-0001.batch.json"]
    assert told == ["calibrate: slot 0 ran out of memory with 3 rows a batch and went on with 2."]


@pytest.mark.parametrize("num_slots", [1, 2])
def test_an_index_without_all_of_its_sums_does_not_stand_for_them(
    in_waves: CalibrationJob, tmp_path: Path, one_process: OneProcess, num_slots: int
) -> None:
    grams, resources = tmp_path / "grams", Resources(num_workers=num_slots)
    calibrate(in_waves, grams, resources)
    before = {path.name: path.read_bytes() for path in grams.iterdir()}
    (grams / next(name for name in before if name.startswith("grams-00002"))).unlink()
    one_process.passes.clear()
    calibrate(in_waves, grams, resources)
    assert one_process.passes == ["wave-0001-of-0002"] * num_slots
    assert {path.name: path.read_bytes() for path in grams.iterdir()} == before
