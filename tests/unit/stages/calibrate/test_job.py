"""What a killed calibration began is gone on with in its own way, unless it would hold more than is allowed now."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from emloc_ray.io.runs.resume import discard_unless
from emloc_ray.stages.calibrate.job import BLOCKS, CalibrationJob, by_blocks, resume_job

A, B, C = ("a", "a2"), ("b",), ("c",)
INPUTS = {"model": "m", "data": "d"}


def job_of(hold: str, *waves: tuple[tuple[str, ...], ...]) -> CalibrationJob:
    return CalibrationJob(Path("m"), Path("t"), (A, B, C), (0, 4), hold=hold, waves=waves or None)


def went_on(job: CalibrationJob, out_dir: Path, inputs: dict[str, str], num_slots: int = 2) -> CalibrationJob:
    return dataclasses.replace(resume_job(job, out_dir, inputs, num_slots, auto=True), inputs="")


def begin(out_dir: Path, job: CalibrationJob, num_slots: int = 2) -> Path:
    """A first try, and a file that it left."""
    assert went_on(job, out_dir, INPUTS, num_slots) == job
    left = out_dir / "slots" / "part"
    left.parent.mkdir()
    left.write_text("x")
    return left


def test_waves_that_were_begun_are_gone_on_with_where_fewer_would_fit(tmp_path: Path) -> None:
    first = job_of("resident", (A, B), (C,))
    left = begin(tmp_path / "c", first)
    for other in (job_of("resident", (A, B, C)), job_of("resident", (A,), (B, C))):
        assert went_on(other, tmp_path / "c", INPUTS) == dataclasses.replace(other, waves=first.waves)
        assert left.exists()


def test_what_would_hold_more_than_is_allowed_now_is_begun_again(tmp_path: Path) -> None:
    left = begin(tmp_path / "c", job_of("resident", (A, B, C)))
    smaller = job_of("resident", (A,), (B,), (C,))
    assert went_on(smaller, tmp_path / "c", INPUTS) == smaller
    assert not left.exists()


@pytest.mark.parametrize("hold", ["offloaded", "all_offloaded"])
def test_a_model_is_held_as_is_allowed_now_and_its_sums_are_kept(tmp_path: Path, hold: str) -> None:
    left = begin(tmp_path / "c", job_of("resident", (A, B, C)))
    assert went_on(job_of(hold, (A, B, C)), tmp_path / "c", INPUTS).hold == hold
    assert left.exists()


@pytest.mark.parametrize(
    ("num_slots", "auto", "hold", "kept"),
    [(2, True, "resident", True), (3, True, "block_by_block", False), (2, False, "resident", False)],
)
def test_a_try_block_by_block(tmp_path: Path, num_slots: int, auto: bool, hold: str, kept: bool) -> None:
    left = begin(tmp_path / "c", job_of("block_by_block"))
    found = resume_job(job_of(hold, (A, B, C)), tmp_path / "c", INPUTS, num_slots, auto)
    assert found.hold == ("block_by_block" if kept or hold == "block_by_block" else "resident")
    assert left.exists() == kept


def test_other_inputs_leave_nothing(tmp_path: Path) -> None:
    left = begin(tmp_path / "c", job_of("resident", (A, B), (C,)))
    discard_unless(tmp_path / "c", INPUTS)
    assert left.exists()
    whole = job_of("resident", (A, B, C))
    assert went_on(whole, tmp_path / "c", {**INPUTS, "data": "other"}) == whole
    assert not left.exists()


def test_what_memory_ran_out_for_is_gone_on_with_block_by_block(tmp_path: Path) -> None:
    out_dir, resident = tmp_path / "c", job_of("resident", (A, B), (C,))
    left = begin(out_dir, resident)
    assert went_on(resident, out_dir, INPUTS, 3) == resident
    sums = out_dir / "grams-00001-of-00002.safetensors"  # of a wave; a block's may have the same name
    sums.write_text("x")
    begun = resume_job(resident, out_dir, INPUTS, 3, auto=True)
    by_rows = by_blocks(begun, out_dir)
    assert dataclasses.replace(by_rows, inputs="") == dataclasses.replace(job_of(BLOCKS), batch_size=1)
    assert by_rows.inputs != begun.inputs  # whose hidden states are of larger batches
    assert not left.exists()
    assert not sums.exists()
    sums.write_text("of a block")
    for _ in range(2):  # the second of what the first has noted
        assert resume_job(resident, out_dir, INPUTS, 3, auto=True) == by_rows
    assert sums.exists()
    assert went_on(resident, out_dir, {**INPUTS, "data": "other"}, 3) == resident
    assert went_on(job_of(BLOCKS), out_dir, {**INPUTS, "data": "other"}, 3) == job_of(BLOCKS)
