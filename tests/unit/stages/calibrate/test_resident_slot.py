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
from emloc_ray.stages.calibrate.resident_slot import ResidentSlot, smaller_batch


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


@pytest.mark.parametrize("committed", [False, True])
def test_out_of_memory_halves_the_batch_and_counts_nothing_twice(
    artifacts: Artifacts, tmp_path: Path, committed: bool
) -> None:
    job = replace(artifacts.calibration_job, batch_size=8)
    calm, tight = ResidentSlot(job, tmp_path / "calm", 1), ResidentSlot(job, tmp_path / "tight", 1)
    rows: list[int] = []

    def run_out(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        rows.append(len(args[0]))
        if rows[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    for number in (0, 1, 2):
        calm.accumulate(number)
    tight.accumulate(0)
    if committed:
        tight.commit()
    # In the last block: the Grams before it have the batch by then.
    tight.hooks.model.get_submodule("model.layers.1.mlp").register_forward_pre_hook(run_out)
    for number in (1, 2):
        tight.accumulate(number)
    assert [count for count in rows if count > 2] == [5, 4]  # of the five rows of a shard
    assert (tight.batch_size, smaller_batch(tmp_path / "tight", 8), smaller_batch(tmp_path / "calm", 8)) == (2, 2, 8)
    assert ResidentSlot(job, tmp_path / "tight", 1).batch_size == 2
    for name, gram in calm.hooks.grams.items():
        assert tight.hooks.grams[name].num_tokens == gram.num_tokens
        torch.testing.assert_close(tight.hooks.grams[name].matrix, gram.matrix, rtol=1e-5, atol=1e-4)


def test_out_of_memory_with_a_row_at_a_time_is_raised(artifacts: Artifacts, tmp_path: Path) -> None:
    slot = ResidentSlot(artifacts.calibration_job, tmp_path / "slot", 1)

    def run_out(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    slot.hooks.model.get_submodule("model.layers.1.mlp").register_forward_pre_hook(run_out)
    with pytest.raises(torch.OutOfMemoryError):
        slot.accumulate(0)
    assert slot.batch_size == 1
