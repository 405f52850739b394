"""A training that is killed once its first checkpoint is there."""

from __future__ import annotations

from pathlib import Path

from emloc_ray.stages.finetune.session import LoneSession


class Killed(Exception):
    pass


class DyingSession(LoneSession):
    """Dies once its first checkpoint is there."""

    def save(self, folder: Path | None, step: int) -> None:
        super().save(folder, step)
        raise Killed
