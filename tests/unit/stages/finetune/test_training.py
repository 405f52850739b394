"""Training with each adapter method, in this process: broken off and gone on with it ends in the same files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import CASES, TARGETS, settings
from payloads import Leaves
from stage_artifacts import Artifacts
from tiny import save_emulator

from emloc_ray.errors import DamagedArtifactError, StageError
from emloc_ray.modeling.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from emloc_ray.stages.finetune import training
from emloc_ray.stages.finetune.finetune import finetune
from emloc_ray.stages.finetune.job import FinetuneJob
from emloc_ray.stages.finetune.session import LoneSession, own_environment
from emloc_ray.stages.finetune.training import train
from emloc_ray.stages.ray.tasks import Resources


class Killed(Exception):
    pass


class DyingSession(LoneSession):
    """Dies once its first checkpoint is there."""

    def save(self, folder: Path | None, step: int) -> None:
        super().save(folder, step)
        raise Killed


@pytest.fixture(scope="module")
def job(artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> FinetuneJob:
    root = tmp_path_factory.mktemp("training")
    return FinetuneJob(
        emulator_dir=save_emulator(artifacts.model_dir, root / "emulator"),
        tokens_dir=artifacts.tokens_dir,
        out_dir=root / "adapter",
        storage_dir=root / "storage",
        name="training",
        adapter={},
        portable_targets=TARGETS["llama"],
        base_model="the/original",
        max_steps=4,
        batch_size=4,
        training_arguments={"save_steps": 2, "logging_steps": 1, "learning_rate": 0.01, "disable_tqdm": True},
    )


@pytest.fixture(autouse=True)
def own_environment_variables() -> Iterator[None]:
    with own_environment():
        yield


QUICK = ("lora", "prefix", "ia3")


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.deep) for case in CASES]
)
def test_it_goes_on_from_its_checkpoint(case: str, job: FinetuneJob, artifacts: Artifacts, tmp_path: Path) -> None:
    options = settings(case, "llama", [spec.name for spec in artifacts.specs])
    if case != "prefix":  # which the config refuses
        job = replace(job, training_arguments={**job.training_arguments, "gradient_checkpointing": True})
    job = replace(job, adapter=options, storage_dir=tmp_path)
    whole = replace(job, name="whole", out_dir=tmp_path / "whole-adapter")
    assert train(whole, LoneSession(tmp_path / "whole"))["resumed"] is False
    broken = replace(job, name="broken", out_dir=tmp_path / "broken-adapter")
    with pytest.raises(Killed):
        train(broken, DyingSession(tmp_path / "broken"))
    found = train(broken, LoneSession(tmp_path / "broken"))
    assert found["resumed"] is True
    assert found["steps"] == 4
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (broken.out_dir / name).read_bytes() == (whole.out_dir / name).read_bytes(), name


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_holds_code_is_refused(
    name: str, job: FinetuneJob, artifacts: Artifacts, tmp_path: Path
) -> None:
    """Everything that the Trainer reads again, torch's weights-only loader reads."""
    job = replace(
        job, storage_dir=tmp_path, adapter=settings(next(iter(CASES)), "llama", [spec.name for spec in artifacts.specs])
    )
    with pytest.raises(Killed):
        train(job, DyingSession(tmp_path / "broken"))
    [file] = (tmp_path / "broken").rglob(name)
    torch.save(Leaves(tmp_path / "mark"), file)
    with pytest.raises(DamagedArtifactError, match=f"{file.parent} holds something else"):
        train(job, LoneSession(tmp_path / "broken"))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("arguments", "zero", "has_bfloat16", "expected"),
    [
        ({}, None, False, False),
        ({"bf16": "auto"}, None, True, True),
        ({"bf16": "auto", "fp16": True}, None, True, False),
        ({"bf16": True}, None, False, True),
        ({"bf16": False}, None, True, False),
        ({"bf16": "auto"}, {"bf16": {"enabled": False}}, True, False),
        ({"bf16": "auto"}, {"bf16": {"enabled": "auto"}}, True, True),
    ],
)
def test_bfloat16_is_trained_in_where_the_gpu_has_it_or_where_it_is_asked_for(
    job: FinetuneJob,
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, Any],
    zero: dict[str, Any] | None,
    has_bfloat16: bool,
    expected: bool,
) -> None:
    monkeypatch.setattr(training, "computes_bfloat16", lambda device: has_bfloat16)
    assert training.trains_in_bfloat16(replace(job, training_arguments=arguments, zero_config=zero)) is expected


def test_a_group_that_ran_out_of_memory_is_not_begun_again(
    job: FinetuneJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(job: FinetuneJob, session: Any) -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(training, "train", run_out)
    monkeypatch.setattr(training, "GroupSession", lambda: None)
    settings: dict[str, Any] = {
        "job": replace(job, storage_dir=tmp_path),
        "threads": torch.get_num_threads(),
        "device": "cuda",
    }
    with pytest.raises(torch.OutOfMemoryError):
        training.train_loop(settings)
    assert training.train_loop(settings)["out_of_memory"]

    def runner(job: FinetuneJob, *_: Any) -> dict[str, Any]:
        job.out_of_memory_path.touch()
        return training.train_loop(settings)

    with pytest.raises(StageError, match="finetune: a worker ran out of memory: set memory_budget"):
        finetune(settings["job"], Resources(2), runner=runner)
