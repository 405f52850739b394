"""A tiny emulator with the LoRA that was distilled into it, folded into its factors; without Ray."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from stage_artifacts import write_tokens
from tiny import save_emulator
from transformers import AutoConfig

from emloc_ray.data.ingest import SampleOrder
from emloc_ray.data.token_shards import TokenShards
from emloc_ray.io.formats.teacher_shards import write_teacher_index
from emloc_ray.stages.factorize.factorize import finish_emulator
from emloc_ray.stages.finetune.job import FinetuneJob
from emloc_ray.stages.finetune.session import LoneSession
from emloc_ray.stages.finetune.training import train
from emloc_ray.stages.heal.fold import FoldJob, pieces, write_pieces
from emloc_ray.stages.heal.teacher import TeacherJob, teach_part

RANK, R, STEPS = 8, 4, 24


def teacher_job(model_dir: Path, tokens: Path, out: Path, **changes: Any) -> TeacherJob:
    order = SampleOrder(len(TokenShards(tokens)), 4, 0, 1, 0)
    return replace(TeacherJob(model_dir, tokens, out, order, STEPS, 300, batch_size=3), **changes)


def training_job(emulator: Path, tokens: Path, root: Path, healed: tuple[str, ...]) -> FinetuneJob:
    options = {"target_modules": list(healed), "r": R, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
    return FinetuneJob(
        emulator_dir=emulator,
        tokens_dir=tokens,
        out_dir=root / "adapter",
        storage_dir=root,
        name="heal",
        adapter={"method": "lora", **options},
        portable_targets=list(healed),
        base_model="the/original",
        max_steps=STEPS,
        batch_size=4,
        loss_on="all",
        training_arguments={"save_steps": 12, "logging_steps": 1, "learning_rate": 0.003, "disable_tqdm": True},
        teacher_dir=root / "teacher",
        stage="heal",
    )


def taught(job: TeacherJob) -> TeacherJob:
    teach_part(job, 0, 1)
    write_teacher_index(job.out_dir, [rows[0] for rows in job.shards()])
    return job


def fold_alone(job: FoldJob, model_dir: Path) -> None:
    """What :func:`emloc_ray.stages.heal.fold.fold` does, without Ray."""
    write_pieces(job, pieces(job))
    kept_wide = job.kept_wide if job.in_4bit else None
    files = [piece.file for piece in pieces(job)]
    base = AutoConfig.from_pretrained(model_dir)
    finish_emulator(files, base, job.emulator_dir, job.ranks, job.storage, kept_wide, job.integers)


class Healing:
    """A family's emulator, all but one linear factorized, with the LoRA that was distilled into it."""

    def __init__(self, model_dir: Path, root: Path) -> None:
        self.model_dir, self.emulator = model_dir, save_emulator(model_dir, root / "emulator", RANK)
        self.tokens = write_tokens(root / "tokens", 20, 5)
        self.ranks: dict[str, int] = json.loads((self.emulator / "config.json").read_text())["ranks"]
        # One layer too small to be healed.
        self.small, *self.healed = sorted(self.ranks)
        taught(teacher_job(model_dir, self.tokens, root / "teacher"))
        self.job = training_job(self.emulator, self.tokens, root, tuple(self.healed))
        self.outcome = train(self.job, LoneSession(root / "heal"))
        final = {**self.ranks, **dict.fromkeys(self.healed, RANK + R)}
        self.fold = FoldJob(self.emulator, self.job.out_dir, root / "healed", final, tuple(self.healed))
        fold_alone(self.fold, model_dir)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
