"""What every calibration slot needs to know."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emloc_ray.io.runs.fingerprint import fingerprint
from emloc_ray.io.runs.resume import discard_unless
from emloc_ray.io.store.atomic import read_json, write_json
from emloc_ray.io.store.node_cache import discard, sizes
from emloc_ray.modeling.inputs import Stream

if TYPE_CHECKING:
    from emloc_ray.data.processors import ImageInputs

Groups = tuple[tuple[str, ...], ...]
_BEGUN = ".way.json"  # the name on disk; it holds hold, waves and slots, and the rows of a batch that memory left
BLOCKS = "block_by_block"
MAX_LEAD = 2  # blocks that a slot may be ahead of the slowest: their sums stay on disk until all have passed them


@dataclass(frozen=True)
class Labels:
    """The labels of the loss whose gradients are summed: drawn, by ``seed``, from the model's own predictions of the
    ``loss_on`` tokens, ``completion`` or ``all``."""

    loss_on: str = "completion"
    seed: int = 0


@dataclass(frozen=True)
class CalibrationJob:
    """Artifact paths and flat settings; ``groups`` are linears that read the same tensor.

    ``waves`` splits the groups into parts whose Grams are gathered one part after the other, each in a pass of its own.
    ``shards`` are the token shards that count, ``[begin, end)``. ``inputs`` hashes what hidden states depend on. ``streams``
    maps a group's first linear to the tokens that the group reads, where not those of the row; ``between`` are the linears
    outside all blocks, with the block that runs next. ``experts`` maps the first linear of each group of experts' linears to
    its inputs; groups that are sent fewer tokens than ``min_expert_tokens`` get a second pass, whose job has ``reread`` set.
    ``hold`` is how a worker holds the model, see :mod:`emloc_ray.modeling.holding`; ``may_stream``: whether it may change to
    block by block when memory runs out. With ``gradients`` the sums are of the gradients of linears' outputs, not of their
    inputs, and every linear is a group of its own.
    """

    model_dir: Path
    tokens_dir: Path
    groups: Groups
    shards: tuple[int, int]
    tokens: str = "all"
    batch_size: int = 8
    pad_token_id: int = 0
    model_options: tuple[tuple[str, Any], ...] = ()
    hold: str = "resident"
    waves: tuple[Groups, ...] | None = None
    inputs: str = ""
    streams: tuple[tuple[str, Stream], ...] = ()
    between: tuple[tuple[str, str], ...] = ()
    experts: tuple[tuple[str, int], ...] = ()
    min_expert_tokens: int = 0
    reread: bool = False
    gradients: Labels | None = None
    may_stream: bool = False
    images: ImageInputs | None = None

    @property
    def step(self) -> str:
        """The name of the run's step whose job it is."""
        return "calibrate" if self.gradients is None else "gradients"

    def groups_of(self, block: str) -> list[tuple[str, ...]]:
        """The groups whose linears are inside a block, or run between the blocks right before it."""
        next_blocks = dict(self.between)
        return [g for g in self.groups if g[0].startswith(f"{block}.") or next_blocks.get(g[0]) == block]

    def shards_of(self, slot: int, num_slots: int) -> range:
        """The token shards of a slot: every ``num_slots``-th from its own number on."""
        return range(self.shards[0] + slot, self.shards[1], num_slots)


def resume_job(job: CalibrationJob, out_dir: Path, inputs: Any, num_slots: int, auto: bool) -> CalibrationJob:
    """The job with the waves of a killed try of the same ``inputs``, and block by block where that went so, in the batches of
    :func:`by_blocks` where that began it, so that its sums count. ``auto`` had chosen them by the memory that was free then; a
    whole model is held as the job says now.

    A new job over an emptied ``out_dir`` where there was no such try, where it held more than this job may, or where it went
    block by block with another number of slots: each slot has the hidden states of its own shards.
    """
    discard_unless(out_dir, inputs)
    job = dataclasses.replace(job, inputs=fingerprint([inputs, job.batch_size]))
    path = out_dir / _BEGUN
    begun: dict[str, Any] = read_json(path) or {}
    if begun and _may_resume(begun, job, num_slots, auto):
        waves = begun["waves"] and tuple(tuple(tuple(group) for group in wave) for wave in begun["waves"])
        # Sums are the same however the model is held, but for block by block.
        job = dataclasses.replace(job, hold=BLOCKS if begun["hold"] == BLOCKS else job.hold, waves=waves)
        job = job if begun.get("rows") is None else _in_batches_of(job, begun["rows"])
    else:
        begun = {}
        discard(out_dir)
        discard_unless(out_dir, inputs)
    write_json(path, {"hold": job.hold, "waves": job.waves, "slots": num_slots, "rows": begun.get("rows")})
    return job


def _in_batches_of(job: CalibrationJob, rows: int) -> CalibrationJob:
    """The job in other batches, whose hidden states are no other job's."""
    return dataclasses.replace(job, batch_size=rows, inputs=fingerprint([job.inputs, rows]))


def by_blocks(job: CalibrationJob, out_dir: Path) -> CalibrationJob:
    """The job block by block, a row at a time, for an ``out_dir`` that was begun otherwise and ran out of memory. Removes its
    slots and sums; a later try of what :func:`resume_job` began resumes so."""
    path = out_dir / _BEGUN
    begun: dict[str, Any] = read_json(path) or {}
    discard(out_dir / "slots")
    for sums in sizes(out_dir):
        if sums.suffix == ".safetensors":
            discard(sums)
    job = _in_batches_of(dataclasses.replace(job, hold=BLOCKS, waves=None), 1)
    write_json(path, {**begun, "hold": job.hold, "waves": job.waves, "rows": job.batch_size})
    return job


def _may_resume(begun: dict[str, Any], job: CalibrationJob, num_slots: int, auto: bool) -> bool:
    if begun.get("hold", BLOCKS) == BLOCKS:
        return begun["slots"] == num_slots and "hold" in begun and (auto or job.hold == BLOCKS)
    return job.hold != BLOCKS and len(begun["waves"] or ()) >= len(job.waves or ())
