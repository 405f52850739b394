"""What a worker computes with models on a device of its own is what the CPU gives."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pretend_device import METER, moved, pretend_device
from safetensors.torch import load_file
from stage_artifacts import Artifacts, random_rows
from tiny import save_emulator

from emloc_ray.core.correction import Candidate
from emloc_ray.data.token_shards import shard_name, write_index, write_shard
from emloc_ray.modeling.adapter import load_adapter
from emloc_ray.modeling.loading import load_model
from emloc_ray.stages.calibrate.job import BLOCKS
from emloc_ray.stages.calibrate.streamed_slot import StreamedSlot
from emloc_ray.stages.correct.adapted import see_adapted_inputs
from emloc_ray.stages.finetune.job import FinetuneJob, ValidationJob
from emloc_ray.stages.finetune.session import LoneSession
from emloc_ray.stages.finetune.validation import Validation
from emloc_ray.stages.refine.refine import RefinementJob, fits, refine_blocks

DEVICES = ("cpu", str(pretend_device()))


@pytest.fixture(scope="module")
def emulator_dir(artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_emulator(artifacts.model_dir, tmp_path_factory.mktemp("emulator") / "llama")


def assert_alike(directories: list[Path]) -> None:
    """Each file's tensors are the same to float32's rounding."""
    here, there = ({file.name: load_file(file) for file in folder.glob("*.safetensors")} for folder in directories)
    assert here
    assert here.keys() == there.keys()
    for name, tensors in here.items():
        torch.testing.assert_close(there[name], tensors, rtol=1e-3, atol=1e-5)


def test_a_device_holds_one_batch_of_a_shard_s_hidden_states(artifacts: Artifacts, tmp_path: Path) -> None:
    peaks = []
    for count in (1, 12):
        root = tmp_path / str(count)
        tokens_dir = root / "tokens"
        write_shard(tokens_dir / shard_name(0), random_rows(*[16] * count))
        write_index(tokens_dir, [count], {"tokens": 16 * count})
        job = replace(artifacts.calibration_job, tokens_dir=tokens_dir, shards=(0, 1), batch_size=1, hold=BLOCKS)
        slot = StreamedSlot(replace(job, model_options=(("device", DEVICES[1]),)), root, 0, 1, 2, 1)
        gc.collect()
        METER.restart()
        for position in range(2):
            slot.accumulate(position)
        peaks.append(METER.peak - METER.current)
        assert slot.position() == 1
    assert peaks[1] == peaks[0] > 0


@pytest.mark.slow
def test_blocks_are_refined(artifacts: Artifacts, emulator_dir: Path, tmp_path: Path) -> None:
    found, peaks = [], []
    for number, device in enumerate(DEVICES):
        root, options = tmp_path / str(number), (("device", device),)
        job = RefinementJob(
            artifacts.model_dir, emulator_dir, artifacts.tokens_dir, root / "work", root / "out", 10, 0.01
        )
        gc.collect()  # what earlier tests left on the device would be freed on the way
        METER.restart()
        refine_blocks(replace(job, batch_size=4, model_options=options))
        found.append(fits(job))
        peaks.append(METER.peak - METER.current)
    assert peaks[0] == 0 < peaks[1]
    assert found[1] == {name: pytest.approx(fit, rel=1e-3) for name, fit in found[0].items()}
    assert all(after < before for before, after in found[0].values())
    assert_alike([tmp_path / "0" / "out", tmp_path / "1" / "out"])


def test_what_linears_read_beside_the_adapter(artifacts: Artifacts, emulator_dir: Path, tmp_path: Path) -> None:
    for number, device in enumerate(DEVICES):
        root, options = tmp_path / str(number), {"device": device}
        job = artifacts.correction(emulator_dir, root, Candidate("adapted"), model_options=options)
        see_adapted_inputs(job)
        job.adapted_path.rename(root / "adapted.safetensors")
    assert_alike([tmp_path / "0", tmp_path / "1"])


@pytest.mark.slow
def test_validation_waits_once_a_score(artifacts: Artifacts, emulator_dir: Path, tmp_path: Path) -> None:
    paths = emulator_dir, artifacts.tokens_dir, tmp_path / "adapter", tmp_path
    job = FinetuneJob(*paths, "scored", {}, [], "base", max_steps=1, batch_size=4)
    scores = Validation(job, ValidationJob(artifacts.tokens_dir, 1, 4), LoneSession(tmp_path))
    model = load_adapter(load_model(emulator_dir), artifacts.adapter_dir)
    expected, there = scores.measure(model), moved(model)
    scores.measure(there)
    METER.restart()
    assert scores.measure(there) == pytest.approx(expected, rel=1e-5)
    assert METER.waits.total() == 1, METER.waits
