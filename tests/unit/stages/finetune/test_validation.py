"""Scores of a training: counted once each, whenever it is broken off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapter_cases import TARGETS, settings
from dying_session import DyingSession, Killed
from stage_artifacts import Artifacts
from tiny import save_emulator

from emloc_ray.data.token_shards import TokenShards
from emloc_ray.modeling.adapter_files import WEIGHTS_NAME
from emloc_ray.modeling.loss import TokenLoss
from emloc_ray.stages.finetune import trainer, validation
from emloc_ray.stages.finetune.job import FinetuneJob, ValidationJob
from emloc_ray.stages.finetune.session import LoneSession
from emloc_ray.stages.finetune.trainer import EmulatorTrainer
from emloc_ray.stages.finetune.training import train
from emloc_ray.stages.finetune.validation import Validation


@pytest.fixture
def job(artifacts: Artifacts, tmp_path: Path) -> FinetuneJob:
    """Of four steps, scored at each, which ends at the second score: none is better than the first by enough."""
    return FinetuneJob(
        emulator_dir=save_emulator(artifacts.model_dir, tmp_path / "emulator"),
        tokens_dir=artifacts.tokens_dir,
        out_dir=tmp_path / "adapter",
        storage_dir=tmp_path,
        name="training",
        adapter=settings("lora", "llama", [spec.name for spec in artifacts.specs]),
        portable_targets=TARGETS["llama"],
        base_model="the/original",
        max_steps=4,
        batch_size=4,
        training_arguments={"save_steps": 2, "logging_steps": 1, "disable_tqdm": True},
        validation=ValidationJob(artifacts.tokens_dir, 1, 4, patience=1, threshold=1e9),
    )


def test_a_training_that_goes_on_has_the_scores_of_one_that_was_not_broken_off(
    job: FinetuneJob, tmp_path: Path
) -> None:
    """Which is scored before its first step, and saved between two scores."""
    arguments = {**job.training_arguments, "learning_rate": 2.0, "eval_on_start": True}
    asked = ValidationJob(job.tokens_dir, 4, 4, keeps_best=True, patience=2)
    job = replace(job, max_steps=6, training_arguments=arguments, validation=asked)
    whole, broken = (replace(job, name=name, out_dir=tmp_path / f"{name}-adapter") for name in ("whole", "broken"))
    train(whole, LoneSession(tmp_path / "whole"))
    with pytest.raises(Killed):
        train(broken, DyingSession(tmp_path / "broken"))
    train(broken, LoneSession(tmp_path / "broken"))
    assert broken.validation_path.read_bytes() == whole.validation_path.read_bytes()
    assert (broken.out_dir / WEIGHTS_NAME).read_bytes() == (whole.out_dir / WEIGHTS_NAME).read_bytes()


def test_a_training_that_was_over_takes_no_further_step(job: FinetuneJob, tmp_path: Path) -> None:
    assert train(job, LoneSession(tmp_path / "whole"))["steps"] == 2
    broken = replace(job, out_dir=tmp_path / "broken-adapter")
    with pytest.raises(Killed):
        train(broken, DyingSession(tmp_path / "broken"))
    assert train(broken, LoneSession(tmp_path / "broken"))["steps"] == 2
    assert (broken.out_dir / WEIGHTS_NAME).read_bytes() == (job.out_dir / WEIGHTS_NAME).read_bytes()


def test_what_is_scored_and_saved_is_the_average_of_an_optimizer_that_keeps_one(
    job: FinetuneJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the schedule-free ones, whose gradients are taken elsewhere."""
    made: list[Averaging] = []
    seen: list[str] = []

    class Averaging(torch.optim.SGD):
        mode = "train"

        def train(self) -> None:
            self.mode = "train"

        def eval(self) -> None:
            self.mode = "eval"

    def create_optimizer(trainer: EmulatorTrainer, model: Any = None) -> torch.optim.Optimizer:
        trainer.optimizer = Averaging([p for p in trainer.model.parameters() if p.requires_grad], lr=0.01)
        made.append(trainer.optimizer)
        return trainer.optimizer

    monkeypatch.setattr(EmulatorTrainer, "create_optimizer", create_optimizer)
    monkeypatch.setattr(Validation, "measure", lambda self, model: seen.append(made[0].mode) or 1.0)
    monkeypatch.setattr(trainer, "save_trained_adapter", lambda *_, **__: seen.append(made[0].mode))
    for one in (job, replace(job, validation=None, max_steps=1)):
        made.clear()
        train(one, LoneSession(tmp_path / f"{one.max_steps} steps"))
        assert made[0].mode == "eval"
    assert seen == ["eval"] * 4


def test_rows_are_read_as_their_batches_are_made(
    job: FinetuneJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, read, seen = TokenShards.row, list[int](), list[int]()

    def score(model: Any, batch: dict[str, torch.Tensor], loss_on: str) -> TokenLoss:
        seen.append(len(read))
        return TokenLoss(torch.ones(()), torch.zeros(()), 1)

    monkeypatch.setattr(TokenShards, "shard", lambda *_: pytest.fail("a whole shard was read"))
    monkeypatch.setattr(TokenShards, "row", lambda shards, position: read.append(position) or row(shards, position))
    monkeypatch.setattr(validation, "token_loss", score)
    model = torch.nn.Linear(1, 1)
    model.device = torch.device("cpu")  # type: ignore[assignment]
    asked = ValidationJob(job.tokens_dir, 1, 3)
    session: Any = SimpleNamespace(rank=1, world_size=2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: None)
    Validation(job, asked, session).measure(model)
    assert seen == [3, 6, 9]  # of twenty rows in seven batches the second, fourth and sixth
    lengths = TokenShards(job.tokens_dir).lengths()
    assert read == [p for p, _ in sorted(enumerate(lengths), key=lambda item: item[1])][3:6] + read[3:]


def test_the_score_of_a_group_is_over_the_rows_of_all_its_ranks(
    job: FinetuneJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(model: Any, batch: dict[str, torch.Tensor], loss_on: str) -> TokenLoss:
        return TokenLoss(batch["input_ids"].double().sum(), torch.zeros(()), int(batch["attention_mask"].sum()))

    def measured(rank: int, world_size: int) -> float:
        session: Any = SimpleNamespace(rank=rank, world_size=world_size)
        return Validation(job, ValidationJob(job.tokens_dir, 1, 3), session).measure(model)

    monkeypatch.setattr(validation, "token_loss", score)
    model = torch.nn.Linear(1, 1)
    model.device = torch.device("cpu")  # type: ignore[assignment]
    own: list[torch.Tensor] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: own.append(sums.clone()))
    assert measured(0, 2) != measured(1, 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sums.copy_(sum(own)))
    assert measured(0, 2) == measured(1, 2) == measured(0, 1)
