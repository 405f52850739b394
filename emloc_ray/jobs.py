"""What the config says of a stage, as that stage's flat job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emloc_ray.memory import MemoryModel
from emloc_ray.planner import row_lengths
from emloc_ray.preparation import Prepared

if TYPE_CHECKING:
    from emloc_ray.stages.calibration_job import CalibrationJob, Groups
    from emloc_ray.stages.factorize import FactorizationJob


def gram_groups(prepared: Prepared, groups: Sequence[Sequence[Any]] | None = None) -> Groups:
    """The names of the linears that compression targets, those that read the same tensor together."""
    targeted = set(prepared.layout.compressed)
    named = (tuple(spec.name for spec in group if spec.name in targeted) for group in groups or prepared.layout.groups)
    return tuple(group for group in named if group)


def calibration_job(
    prepared: Prepared, model_dir: Path, tokens_dir: Path, pad_token_id: int, model_options: dict[str, Any]
) -> CalibrationJob:
    """With the mode and the waves that fit a worker's memory."""
    from emloc_ray.data.token_shards import TokenShards
    from emloc_ray.stages.calibration_job import CalibrationJob

    memory = MemoryModel(prepared, row_lengths(prepared))
    mode = memory.calibration_mode()
    section = prepared.config.calibration
    return CalibrationJob(
        model_dir,
        tokens_dir,
        gram_groups(prepared),
        (0, TokenShards(tokens_dir).num_shards),
        section.tokens,
        section.batch_size,
        pad_token_id,
        tuple(model_options.items()),
        mode,
        tuple(gram_groups(prepared, wave) for wave in memory.waves()) if mode == "resident" else None,
    )


def factorization_job(prepared: Prepared, model_dir: Path, out_dir: Path) -> FactorizationJob:
    """Every group of linears that share an input."""
    from emloc_ray.stages.factorize import FactorizationJob

    config, layout = prepared.config, prepared.layout
    return FactorizationJob(
        model_dir, out_dir, layout.groups, layout.ranks, config.emulator.dampening_frac, config.seed
    )
