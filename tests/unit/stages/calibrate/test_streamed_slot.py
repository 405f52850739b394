"""Streamed slots: the same Grams as resident ones, whoever is interrupted, with little left on disk."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from faulting.s3 import uri
from stage_artifacts import Artifacts

from emloc_ray.io.formats.grams import reduce_slots, write_gram_shard
from emloc_ray.io.store.node_cache import local_only, mirror
from emloc_ray.stages.calibrate import streamed_slot
from emloc_ray.stages.calibrate.job import CalibrationJob, resume_job
from emloc_ray.stages.calibrate.resident_slot import ResidentSlot
from emloc_ray.stages.calibrate.streamed_slot import StreamedSlot, grams_file, outputs_file, part_file

BLOCKS = 2


@pytest.fixture
def job(artifacts: Artifacts) -> CalibrationJob:
    return replace(artifacts.calibration_job, hold="block_by_block")


def slot(job: CalibrationJob, out_dir: Path, number: int = 0, of: int = 1) -> StreamedSlot:
    return StreamedSlot(job, out_dir, number, of, BLOCKS, 1)


@pytest.mark.parametrize("tokens", ["all", "completion"])
def test_two_slots_together_give_the_resident_grams(job: CalibrationJob, tokens: str, tmp_path: Path) -> None:
    job = replace(job, tokens=tokens)
    for number in range(2):
        each = slot(job, tmp_path, number, 2)
        assert [each.accumulate(position) for position in range(BLOCKS)] == [0, 1]
        each.commit()
    whole = ResidentSlot(job, tmp_path / "whole.safetensors", 1)
    for number in range(4):
        whole.accumulate(number)
    seen = 0
    for position in range(BLOCKS):
        parts = [part_file(tmp_path, number, 2, position) for number in range(2)]
        names = [name for name in whole.hooks.grams if f"layers.{position}." in name]
        for name, gram in reduce_slots(parts, names).items():
            expected = whole.hooks.grams[name]
            assert gram.num_tokens == expected.num_tokens
            torch.testing.assert_close(gram.symmetric(), expected.symmetric(), rtol=1e-5, atol=1e-5)
            seen += 1
    assert seen == len(job.groups)


def test_a_slot_made_anew_goes_on_after_its_last_block(job: CalibrationJob, tmp_path: Path) -> None:
    calm = slot(job, tmp_path / "calm")
    assert calm.position() == -1
    calm.accumulate(0)
    calm.accumulate(1)
    first = slot(job, tmp_path / "killed")
    first.accumulate(0)
    second = slot(job, tmp_path / "killed")
    assert second.position() == 0
    second.accumulate(1)
    calm_file, killed_file = (grams_file(tmp_path / run, 1, BLOCKS) for run in ("calm", "killed"))
    assert killed_file.read_bytes() == calm_file.read_bytes()


def test_a_slot_of_several_goes_on_where_its_sums_were_added(job: CalibrationJob, tmp_path: Path) -> None:
    slot(job, tmp_path, 0, 2).accumulate(0)
    assert slot(job, tmp_path, 0, 2).position() == 0
    part_file(tmp_path, 0, 2, 0).rename(grams_file(tmp_path, 0, BLOCKS))
    assert slot(job, tmp_path, 0, 2).position() == 0


def test_a_slot_that_lost_its_hidden_states_counts_no_block_twice(
    job: CalibrationJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm, moved = tmp_path / "calm", tmp_path / "moved"
    for position in range(BLOCKS):
        slot(job, calm, 0, 2).accumulate(position)
    slot(job, moved, 0, 2).accumulate(0)
    shutil.rmtree(moved / "hidden")
    again = slot(job, moved, 0, 2)
    assert again.position() == -1
    with monkeypatch.context() as patch:
        patch.setattr(streamed_slot, "GramHooks", lambda *_, **__: pytest.fail("counts again"))
        again.accumulate(0)
    assert slot(job, moved, 0, 2).position() == 0
    again.accumulate(1)
    for position in range(BLOCKS):
        found, expected = (part_file(out_dir, 0, 2, position) for out_dir in (moved, calm))
        assert found.read_bytes() == expected.read_bytes()


def test_a_slot_goes_on_after_the_highest_block_whose_hidden_states_are_here(
    job: CalibrationJob, tmp_path: Path
) -> None:
    """Though the Grams of later ones are written."""
    one = StreamedSlot(job, tmp_path, 0, 2, BLOCKS + 1, 1)
    for position in range(BLOCKS):
        one.accumulate(position)
    shutil.rmtree(tmp_path / "hidden")
    one.accumulate(0)
    assert one.position() == 0
    outputs_file(tmp_path, 0, one.numbers[-1], job.inputs).unlink()
    assert one.position() == -1


def test_a_slot_counts_anew_a_block_whose_sums_went(job: CalibrationJob, tmp_path: Path) -> None:
    """Though those of a later one are there."""
    for position in range(BLOCKS):
        slot(job, tmp_path).accumulate(position)
    lost = grams_file(tmp_path, 0, BLOCKS)
    before = lost.read_bytes()
    lost.unlink()
    again = slot(job, tmp_path)
    assert again.position() == -1
    again.accumulate(0)
    assert lost.read_bytes() == before
    again.accumulate(1)
    assert slot(job, tmp_path).position() == 1


def test_a_single_slot_writes_what_its_sum_would_be(job: CalibrationJob, tmp_path: Path) -> None:
    slot(job, tmp_path / "alone").accumulate(0)
    one = slot(job, tmp_path / "two", 0, 2)
    one.numbers = job.shards_of(0, 1)
    one.accumulate(0)
    names = [group[0] for group in job.groups if "layers.0." in group[0]]
    write_gram_shard(tmp_path / "sum.safetensors", reduce_slots([part_file(tmp_path / "two", 0, 2, 0)], names))
    assert grams_file(tmp_path / "alone", 0, BLOCKS).read_bytes() == (tmp_path / "sum.safetensors").read_bytes()
    assert not part_file(tmp_path / "alone", 0, 1, 0).exists()


def test_what_no_later_block_reads_is_removed(job: CalibrationJob, tmp_path: Path) -> None:
    one = slot(job, tmp_path)
    one.accumulate(0)
    assert all(outputs_file(tmp_path, 0, shard).is_file() for shard in range(4))
    one.accumulate(1)
    assert not list((tmp_path / "hidden").rglob("*.safetensors"))


def test_a_slot_that_moves_takes_no_hidden_states_of_another_config(
    job: CalibrationJob, s3_port: int, node_cache: Path, tmp_path: Path
) -> None:
    root = mirror(uri(s3_port, "moved/run"))
    out_dir, elsewhere = root / "calibration", tmp_path / "other" / root.name / "calibration"
    slot(resume_job(job, out_dir, "first", 1, False), elsewhere).accumulate(0)
    second = resume_job(job, out_dir, "second", 1, False)
    one = slot(second, out_dir)
    assert one.position() == -1
    one.accumulate(0)
    assert slot(second, elsewhere).position() == -1
    assert not list(local_only(elsewhere).rglob("*.safetensors"))
    assert one.position() == slot(second, out_dir).position() == 0
