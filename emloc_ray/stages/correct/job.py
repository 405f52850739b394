"""What every task of the correction needs to know, and where its results go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emloc_ray.core.correction import Candidate
from emloc_ray.io.formats.grams import GramStore, StoredGram
from emloc_ray.modeling.architecture import LinearSpec
from emloc_ray.modeling.inputs import Stream

if TYPE_CHECKING:
    from emloc_ray.data.processors import ImageInputs


@dataclass(frozen=True)
class CorrectionJob:
    """Artifact paths and flat settings of the stage.

    Where there is more than one candidate, ``none`` is the first. ``max_tokens`` bounds what scoring all may read (None: all
    selection rows). ``residuals``: each linear's ``tr(Δ G' Δᵀ)`` as the factorization measured it, before healing added
    ``healed`` ranks; without linears whose weights were stored anew since. ``gram_dampening_frac`` damps their G'.

    For ``adapted`` the emulator with the adapter reads calibration rows of ``tokens_dir``, of which the ``calibration_tokens``
    count. ``streams`` names the tokens that a linear reads, where these are not the row's.
    """

    model_dir: Path
    emulator_dir: Path
    calibration_dir: Path | None
    adapter_dir: Path
    out_dir: Path
    selection_dir: Path
    tokens_dir: Path
    specs: tuple[LinearSpec, ...]
    candidates: tuple[Candidate, ...]
    max_tokens: int | None = None
    dampening_frac: float = 1e-4
    gram_dampening_frac: float = 1e-6
    residuals: Mapping[str, float] = field(default_factory=dict)
    healed: Mapping[str, int] = field(default_factory=dict)
    update_tolerance: float = 1e-3
    batch_size: int = 8
    rows_on_original: int = 8  # of a batch that candidates are scored on
    loss_on: str = "completion"
    calibration_tokens: str = "all"
    streams: tuple[tuple[str, Stream], ...] = ()
    pad_token_id: int = 0
    model_options: dict[str, Any] = field(default_factory=dict)
    hold: str = "resident"
    images: ImageInputs | None = None

    @property
    def state_dir(self) -> Path:
        """What is done already: each group's modules, each candidate's losses."""
        return self.out_dir.parent / "correction"

    @property
    def adapted_path(self) -> Path:
        """The file with ``Q`` and ``G_A Q`` of the adapter's linears: see
        :func:`~emloc_ray.stages.correct.adapted.see_adapted_inputs`."""
        return self.state_dir / "adapted.safetensors"

    @property
    def reads_adapted(self) -> bool:
        """Whether a candidate needs that."""
        return any(candidate.method == "adapted" for candidate in self.candidates)

    def losses_path(self, candidate: Candidate) -> Path:
        """The selection rows' losses under a candidate."""
        name = f"losses-{candidate.method}-{candidate.clamp}-{candidate.strength}.safetensors"
        return self.state_dir / name


@dataclass(frozen=True)
class ModuleGroup:
    """Linears of the adapter that read the same tensor, its Gram, and where their modules are to be written."""

    specs: tuple[LinearSpec, ...]
    gram: StoredGram | None
    path: Path


def module_groups(job: CorrectionJob, names: Sequence[str]) -> list[ModuleGroup]:
    """The adapter's linears by Gram, those without one each alone; by blocks where emulator and original are the same."""
    grams = None if job.calibration_dir is None else GramStore(job.calibration_dir)
    placed = {spec.name: spec for spec in job.specs}
    members: dict[object, list[LinearSpec]] = {}
    stored: dict[object, StoredGram] = {}
    for name in names:
        key: object = placed[name].block if grams is None else name
        if grams is not None and name in grams and grams.num_tokens(name) > 0:
            key = gram = grams.stored(name)
            stored[key] = gram
        members.setdefault(key, []).append(placed[name])
    paths = [job.state_dir / f"modules-{k + 1:05d}-of-{len(members):05d}.safetensors" for k in range(len(members))]
    return [
        ModuleGroup(tuple(specs), stored.get(key), path)
        for (key, specs), path in zip(members.items(), paths, strict=True)
    ]
