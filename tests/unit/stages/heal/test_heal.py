"""Healing without Ray: the teacher's shards, and the training towards them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from healings import RANK, STEPS, Healing, taught, teacher_job, training_job
from PIL import Image
from stage_artifacts import Artifacts
from tiny import make_emulator
from transformers import AutoConfig
from vlms import save_vlm

from emloc_ray.data.ingest import SampleOrder
from emloc_ray.data.processors import ImageInputs
from emloc_ray.data.reading import Place
from emloc_ray.data.token_shards import TokenShards, collate, shard_name, write_index, write_shard
from emloc_ray.data.tokenizing import TokenizeOptions
from emloc_ray.errors import NumericsError
from emloc_ray.io.formats.teacher_shards import TeacherShards, teacher_shard
from emloc_ray.modeling.architecture import block_linears, empty_model
from emloc_ray.modeling.emulator import write_emulator_config
from emloc_ray.modeling.loading import copy_tokenizer, load_model
from emloc_ray.modeling.loss import TopLogProbs, token_loss
from emloc_ray.stages.finetune import training
from emloc_ray.stages.finetune.session import LoneSession
from emloc_ray.stages.finetune.trainer import EmulatorTrainer
from emloc_ray.stages.finetune.training import train
from emloc_ray.stages.heal.heal import in_parts
from emloc_ray.stages.heal.teacher import teach_part, teach_shard


def test_the_bar_says_what_it_counts() -> None:
    moved, details = list[tuple[int, int]](), list[str]()
    parts, said = in_parts({"pieces": 2, "steps": 8}, lambda *counts: moved.append(counts), details.append)
    parts[0](1, 2)
    said("loss 1.2")
    parts[1](4, 8)
    assert moved == [(1, 10), (6, 10)]
    assert details == ["1 of 2 pieces", "4 of 8 steps, loss 1.2"]


def test_the_teacher_says_what_the_original_does(artifacts: Artifacts, tmp_path: Path) -> None:
    job = taught(teacher_job(artifacts.model_dir, artifacts.tokens_dir, tmp_path, num_logits=5))
    model, stored = load_model(artifacts.model_dir), TeacherShards(tmp_path)
    shards = TokenShards(artifacts.tokens_dir)
    for position in range(20):
        ids = torch.tensor([shards.row(position).input_ids])
        with torch.no_grad():
            expected = model(input_ids=ids).logits[0, :-1].log_softmax(-1).topk(5)
        found = stored.row(position)
        assert torch.equal(found[0].long(), expected.indices)
        torch.testing.assert_close(found[1].float(), expected.values, rtol=1e-3, atol=1e-3)
    assert job.shards() == [list(range(20))]


def test_only_the_rows_that_are_trained_on_are_asked_for(artifacts: Artifacts, tmp_path: Path) -> None:
    job = teacher_job(artifacts.model_dir, artifacts.tokens_dir, tmp_path, micro_steps=3)
    rows = [row for shard in job.shards() for row in shard]
    assert rows == sorted(set(job.order.micro_steps(0, 3).tolist()))
    assert len(rows) == 12
    two = replace(job, order=replace(job.order, world_size=2), micro_steps=2)
    both = {row for rank in (0, 1) for row in replace(two.order, rank=rank).micro_steps(0, 2).tolist()}
    assert [row for shard in two.shards() for row in shard] == sorted(both)


def test_shards_that_are_there_stay(artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emloc_ray.io.formats.teacher_shards.MAX_ROWS", 6)
    whole = taught(teacher_job(artifacts.model_dir, artifacts.tokens_dir, tmp_path / "whole"))
    assert len(whole.shards()) == 4
    job = replace(whole, out_dir=tmp_path / "broken")
    teach_part(job, 1, 3)  # of three workers' shards one's, before a kill
    [there] = job.out_dir.iterdir()
    inode = there.stat().st_ino
    taught(job)
    assert there.stat().st_ino == inode
    for number in range(4):
        assert teacher_shard(job.out_dir, number).read_bytes() == teacher_shard(whole.out_dir, number).read_bytes()


def test_an_original_whose_logits_are_no_numbers_is_told(artifacts: Artifacts, tmp_path: Path) -> None:
    model = load_model(artifacts.model_dir)
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    job = teacher_job(artifacts.model_dir, artifacts.tokens_dir, tmp_path)
    with pytest.raises(NumericsError, match=r"training row \d+ are NaN or Inf"):
        teach_shard(job, model, [0, 1])


def divergence_of(found: Healing, model_dir: Path, rows: list[int]) -> float:
    """A model's, from what the teacher says of some rows, in nats a label."""
    shards, teacher = TokenShards(found.tokens), TeacherShards(found.job.storage_dir / "teacher")
    told = [teacher.row(row) for row in rows]
    tops = TopLogProbs(torch.cat([ids for ids, _ in told]), torch.cat([values for _, values in told]))
    batch = collate([shards.row(row) for row in rows], 0)
    with torch.no_grad():
        result = token_loss(load_model(model_dir), batch, "all", teacher=tops)
    return float(result.loss_sum) / result.num_tokens


@pytest.mark.slow
def test_training_brings_the_emulator_nearer_to_the_original(healing: Callable[..., Healing]) -> None:
    found = healing("llama")
    losses = [json.loads(line)["loss"] for line in found.job.log_path.read_text().splitlines()]
    assert found.outcome["steps"] == len(losses) == STEPS
    # Before the first step B is zero.
    first = SampleOrder(20, 4, 0, 1, 0).micro_steps(0, 1).tolist()
    assert losses[0] == pytest.approx(divergence_of(found, found.emulator, first), rel=1e-4)
    before, after = (divergence_of(found, place, list(range(20))) for place in (found.emulator, found.fold.out_dir))
    assert after < 0.9 * before
    assert abs(divergence_of(found, found.model_dir, list(range(20)))) < 1e-3 * before


@pytest.mark.slow
def test_gradients_flow_into_the_lora_alone(
    healing: Callable[..., Healing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = healing("llama")
    trained: set[str] = set()

    class Watching(EmulatorTrainer):
        def gradients_are_finite(self) -> bool:
            trained.update(name for name, parameter in self.model.named_parameters() if parameter.grad is not None)
            return super().gradients_are_finite()

    monkeypatch.setattr(training, "EmulatorTrainer", Watching)
    job = replace(found.job, storage_dir=tmp_path, out_dir=tmp_path / "adapter", max_steps=1)
    train(job, LoneSession(tmp_path / "heal"))
    expected = {f"base_model.model.{name}.lora_{part}.default.weight" for name in found.healed for part in "AB"}
    assert trained == expected


@pytest.mark.deep
def test_a_model_that_sees_is_healed_on_its_images(tmp_path: Path) -> None:
    model_dir = save_vlm("LLaVA", tmp_path / "model")
    options = TokenizeOptions(str(model_dir), "messages", 128)
    made = [(Place(f"row {number}"), asked_about((40 * number, 120, 120))) for number in range(5)]
    rows = [tokens for row in options.tokens(iter(made)) for tokens in row or ()]
    tokens_dir = tmp_path / "tokens"
    write_shard(tokens_dir / shard_name(0), rows, with_images=True)
    write_index(tokens_dir, [len(rows)], {"tokens": sum(map(len, rows)), "images": len(rows)})
    images = ImageInputs(model_dir)
    teacher = taught(teacher_job(model_dir, tokens_dir, tmp_path / "teacher", images=images))
    config = AutoConfig.from_pretrained(model_dir)
    ranks = {spec.name: RANK for spec in block_linears(empty_model(config))}
    emulator = tmp_path / "emulator"
    save_factors(model_dir, emulator, ranks)
    job = training_job(emulator, tokens_dir, tmp_path, tuple(ranks))
    train(replace(job, teacher_dir=teacher.out_dir, images=images), LoneSession(tmp_path / "heal"))
    losses = [json.loads(line)["loss"] for line in job.log_path.read_text().splitlines()]
    assert sum(losses[-5:]) < sum(losses[:5])


def asked_about(colour: tuple[int, int, int]) -> dict[str, Any]:
    """A question about an image of one colour."""
    stream = io.BytesIO()
    Image.new("RGB", (12, 8), colour).save(stream, "PNG")
    asked = [{"type": "image", "image": stream.getvalue()}, {"type": "text", "text": "What colour?"}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "red"}]}


def save_factors(model_dir: Path, directory: Path, ranks: dict[str, int]) -> None:
    """An emulator of any model in which all linears are cut by a plain SVD."""
    model = make_emulator(load_model(model_dir), ranks)
    model.save_pretrained(directory, save_original_format=False)
    write_emulator_config(directory, model.config, ranks)
    copy_tokenizer(model_dir, directory)
