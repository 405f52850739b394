"""The report of every factorized layer, kept beside its factors."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from emloc_ray.io.formats.checkpoint import read_shard
from emloc_ray.io.runs.directory import SPECTRA
from emloc_ray.io.store.atomic import write_text

LAYERS = "layers"
_MOST_SAMPLES = 48


@dataclass(frozen=True)
class LayerReport:
    """One layer: its error, as stored, relative to ``‖W G^½‖``, and the energy ``tr(W G Wᵀ)`` of its spectrum.

    ``residual_energy`` is ``tr(Δ G Δᵀ)`` of ``Δ = W − W_E`` as stored, with the damped G; None where an older version wrote the
    report. ``rank`` is the full one and ``solver`` is ``dense`` for a layer put into 4 bits alone. Where factors keep
    predictions, spectrum and energy are those of ``S^½ W G Wᵀ S^½``, and ``weighed_error`` is the relative error in that
    metric; where they keep the weights, of ``W Wᵀ``. ``spectrum`` is a few of its values, each beside its number from 1 on, as
    shares of the energy.
    """

    name: str
    rank: int
    relative_error: float
    solver: str
    total_energy: float
    num_tokens: int
    weighed_error: float | None = None
    spectrum: Sequence[Sequence[float]] = ()
    residual_energy: float | None = None


def sampled(eigenvalues: torch.Tensor, total_energy: float) -> tuple[tuple[int, float], ...]:
    """At most ``_MOST_SAMPLES`` of a descending spectrum ``(n,)``, evenly spaced on a logarithmic scale of their numbers."""
    if not len(eigenvalues) or total_energy <= 0:
        return ()
    steps = torch.logspace(0, math.log10(len(eigenvalues)), _MOST_SAMPLES, dtype=torch.float64)
    numbers = steps.round().long().unique().tolist()
    return tuple((number, float(f"{float(eigenvalues[number - 1]) / total_energy:.3g}")) for number in numbers)


def write_spectra(directory: Path, reports: Iterable[LayerReport]) -> None:
    """Writes the sampled spectra of an emulator's layers as one small file."""
    write_text(directory / SPECTRA, json.dumps({report.name: report.spectrum for report in reports if report.spectrum}))


def spectra_file(factors: Path) -> Path:
    """Where the spectra of ``W G Wᵀ`` (descending) and the reports of a shard's layers are."""
    return factors.parent / "spectra" / factors.name


def read_reports(factors: Path) -> list[LayerReport]:
    """What :func:`factorize_group` reported of a shard's layers."""
    metadata = json.loads(read_shard(spectra_file(factors)).header)["__metadata__"]
    return [LayerReport(**layer) for layer in json.loads(metadata[LAYERS])]
