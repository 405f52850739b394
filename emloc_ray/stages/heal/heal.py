"""Heal: before its task, the emulator learns to predict what the original does on the task's own inputs.

The original's top logits are cached (``teacher.py``), a LoRA on the emulator is trained towards them, and that is folded into
the factors (``fold.py``). Each of the three resumes from what it had finished.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emloc_ray.io.store.atomic import read_json, write_json
from emloc_ray.io.store.node_cache import sizes
from emloc_ray.stages.finetune.finetune import finetune
from emloc_ray.stages.finetune.job import FinetuneJob
from emloc_ray.stages.heal.fold import FoldJob, fold
from emloc_ray.stages.heal.teacher import TeacherJob, teach
from emloc_ray.stages.ray.losses import Tell, unheard
from emloc_ray.stages.ray.tasks import Progress, Resources, silent


@dataclass(frozen=True)
class HealingJob:
    """The three parts of the stage; ``training`` reads what ``teacher`` writes, ``fold`` what ``training`` writes."""

    teacher: TeacherJob
    training: FinetuneJob
    fold: FoldJob

    @property
    def outcome_path(self) -> Path:
        """The file with the training's result, there once it is over."""
        return self.training.storage_dir / "outcome.json"


def heal(
    job: HealingJob,
    base_config: Any,
    resources: Resources,
    progress: Progress = silent,
    tell: Tell = unheard,
    detail: Tell = unheard,
) -> dict[str, Any]:
    """Writes the healed emulator to ``job.fold.out_dir``; ``base_config`` is the original's.

    Returns what :func:`finetune` does, with ``train_loss`` the divergence in nats a label, and what was cached. Raises
    NumericsError where the original's logits, the loss or gradients are no numbers.
    """
    parts = {
        "pieces of the original's predictions": len(job.teacher.shards()),
        "training steps": job.training.max_steps,
        "folded pieces": 1,  # all folding takes no longer than a few steps
    }
    (of_teacher, of_training, of_fold), add_detail = in_parts(parts, progress, detail)
    outcome: dict[str, Any] | None = read_json(job.outcome_path)
    if outcome is None:
        teach(job.teacher, resources, of_teacher, tell)
        cached = sum(size for file, size in sizes(job.teacher.out_dir).items() if file.suffix == ".safetensors")
        trained = finetune(job.training, resources, of_training, tell, detail=add_detail)
        rows = sum(map(len, job.teacher.shards()))
        outcome = {**trained, "teacher_rows": rows, "teacher_bytes": cached}
        write_json(job.outcome_path, outcome)
    total_size = fold(job.fold, base_config, resources, of_fold, tell)
    return {**outcome, "healed_layers": len(job.fold.healed), "bytes": total_size}


def in_parts(parts: Mapping[str, int], progress: Progress, detail: Tell) -> tuple[list[Progress], Tell]:
    """One progress callback for each part (``parts``: unit → number), which share the stage's bar, and one to add a detail to the
    part that runs."""
    details: list[str] = []

    def report_of(before: int, units: str) -> Progress:
        def tell(done: int, total: int) -> None:
            detail(", ".join([f"{done:,} of {total:,} {units}", *details]))
            progress(before + done * parts[units] // max(total, 1), sum(parts.values()))
            details.clear()

        return tell

    starts = itertools.accumulate(parts.values(), initial=0)
    return [report_of(before, units) for before, units in zip(starts, parts, strict=False)], details.append
