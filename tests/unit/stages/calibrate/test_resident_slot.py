"""A calibration slot: what it counts, what it commits, and that nobody can tell where it was interrupted."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from slot_files import read_slot
from stage_artifacts import Artifacts

from emloc_ray.data.token_shards import TokenShards
from emloc_ray.errors import NumericsError
from emloc_ray.stages.calibrate.resident_slot import ResidentSlot


def test_a_slot_made_anew_goes_on_from_its_commit(artifacts: Artifacts, tmp_path: Path) -> None:
    job = artifacts.calibration_job
    calm = ResidentSlot(job, tmp_path / "calm", 1)
    for number in (0, 1, 2, 3):
        assert calm.accumulate(number) == number
    calm.commit()
    first = ResidentSlot(job, tmp_path / "killed", 1)
    assert first.position() == -1
    first.accumulate(0)
    first.accumulate(1)
    first.commit()
    first.accumulate(2)  # counted, not committed: lost with the actor
    second = ResidentSlot(job, tmp_path / "killed", 1)
    assert second.position() == 1
    for number in (2, 3):
        second.accumulate(number)
    second.commit()
    (went_on, last), (expected, expected_last) = read_slot(tmp_path / "killed"), read_slot(tmp_path / "calm")
    assert last == expected_last == 3
    assert went_on.keys() == expected.keys()
    for name, gram in expected.items():
        assert torch.equal(went_on[name].matrix, gram.matrix)
        assert went_on[name].num_tokens == gram.num_tokens


def test_completion_tokens_alone_are_counted_where_asked(artifacts: Artifacts, tmp_path: Path) -> None:
    job = replace(artifacts.calibration_job, tokens="completion")
    slot = ResidentSlot(job, tmp_path / "slot", 1)
    slot.accumulate(0)
    slot.commit()
    rows = TokenShards(job.tokens_dir).shard(0)
    grams, last = read_slot(tmp_path / "slot")
    assert last == 0
    assert {gram.num_tokens for gram in grams.values()} == {sum(sum(row.completion_mask) for row in rows)}


def test_activations_that_are_no_numbers_name_the_first_layer_that_reads_them(
    artifacts: Artifacts, tmp_path: Path
) -> None:
    shutil.copytree(artifacts.model_dir, tmp_path / "model")
    for file in (tmp_path / "model").glob("*.safetensors"):
        tensors = load_file(file)
        if "model.layers.1.self_attn.v_proj.weight" in tensors:
            tensors["model.layers.1.self_attn.v_proj.weight"][0, 0] = torch.inf
            save_file(tensors, file, {"format": "pt"})
    job = replace(artifacts.calibration_job, model_dir=tmp_path / "model")
    slot = ResidentSlot(job, tmp_path / "slot", 1)
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.self_attn\.o_proj reads hold NaN or Inf"):
        slot.accumulate(0)
    assert not (tmp_path / "slot").exists()
