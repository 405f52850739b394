"""What every calibration slot needs to know."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emloc_ray.io.runs.fingerprint import fingerprint
from emloc_ray.io.runs.resume import discard_unless
from emloc_ray.io.store.atomic import write_json
from emloc_ray.io.store.node_cache import ensure
from emloc_ray.modeling.inputs import Stream

if TYPE_CHECKING:
    from emloc_ray.data.processors import ImageInputs

Groups = tuple[tuple[str, ...], ...]
_BEGUN = ".way.json"
BLOCKS = "block_by_block"


@dataclass(frozen=True)
class Labels:
    """The labels that gradients are of: drawn, by ``seed``, from the model's predictions of ``loss_on``, the tokens of the
    ``completion`` or ``all``."""

    loss_on: str = "completion"
    seed: int = 0


@dataclass(frozen=True)
class CalibrationJob:
    """Artifact paths and flat settings; ``groups`` are linears that read the same tensor.

    ``waves`` splits the groups into parts whose Grams are gathered one part after the other, each in a pass of its own.
    ``shards`` are the token shards that count, ``[begin, end)``. ``inputs`` hashes what hidden states depend on.
    ``streams`` says which tokens a group's linears read, by the first one's name, where not those of the row; ``between``
    are the linears outside all blocks, with the block that runs next.
    ``experts`` are the groups of experts' linears, by their first one's name, with its inputs; those that are sent fewer
    tokens than ``min_expert_tokens`` are seen to in a second pass, whose job has ``reread`` set.
    ``hold`` is how a worker holds the model, see :mod:`emloc_ray.modeling.holding`; ``may_stream``: block by block, where that
    turns out to take more memory than there is.
    With ``gradients`` it is not what linears read that is summed up, but the gradients of what each of them gives: every
    linear is a group of its own.
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
        """The step of a run that it is the job of."""
        return "calibrate" if self.gradients is None else "gradients"

    def groups_of(self, block: str) -> list[tuple[str, ...]]:
        """The groups whose linears are inside a block, or run between the blocks right before it."""
        next_blocks = dict(self.between)
        return [g for g in self.groups if g[0].startswith(f"{block}.") or next_blocks.get(g[0]) == block]

    def shards_of(self, slot: int, num_slots: int) -> range:
        """The token shards of a slot: every ``num_slots``-th from its own number on."""
        return range(self.shards[0] + slot, self.shards[1], num_slots)


def go_on(job: CalibrationJob, out_dir: Path, inputs: Any, num_slots: int, auto: bool) -> CalibrationJob:
    """The job as a killed try of the same ``inputs`` began it, held as it held the model, in its waves, so that its sums count;
    as it is, over an empty ``out_dir``, where there was none, or where that would hold more than the job may now.

    What ``auto`` chose, by the memory that was free, may be chosen differently now; slots that go block by block left hidden
    states of their own shards alone.
    """
    discard_unless(out_dir, inputs)
    job = dataclasses.replace(job, inputs=fingerprint([inputs, job.batch_size]))
    path = out_dir / _BEGUN
    ensure(path)
    begun: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if begun and _may_go_on(begun, job, num_slots, auto):
        waves = begun["waves"] and tuple(tuple(tuple(group) for group in wave) for wave in begun["waves"])
        return dataclasses.replace(job, hold=begun["hold"], waves=waves)
    if begun:
        discard_unless(out_dir, None)
        discard_unless(out_dir, inputs)
    write_json(path, {"hold": job.hold, "waves": job.waves, "slots": num_slots})
    return job


def _may_go_on(begun: dict[str, Any], job: CalibrationJob, num_slots: int, auto: bool) -> bool:
    if begun.get("hold", BLOCKS) == BLOCKS:
        return begun["slots"] == num_slots and "hold" in begun and (auto or job.hold == BLOCKS)
    return job.hold != BLOCKS and len(begun["waves"] or ()) >= len(job.waves or ())
