"""What the selection rows lose under each candidate, one after another on one model; what was scored before is kept."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from emloc_ray.core.correction import Candidate
from emloc_ray.core.selection import affordable
from emloc_ray.data.formats import Tokens
from emloc_ray.data.processors import ImageInputs
from emloc_ray.data.token_shards import TokenShards
from emloc_ray.io.formats.checkpoint import read_shard
from emloc_ray.io.formats.shards import write_tensors
from emloc_ray.io.store.node_cache import exists
from emloc_ray.modeling.adapter import attach_adapter, detach_adapter, load_adapter
from emloc_ray.modeling.adapter_files import Adapter, lora_form_settings
from emloc_ray.modeling.adapter_methods import adapter_config
from emloc_ray.modeling.holding import open_model
from emloc_ray.modeling.scoring import RowLosses, losses_by_row
from emloc_ray.stages.correct.job import CorrectionJob, module_groups
from emloc_ray.stages.correct.modules import CorrectableModule, plug_in, read_modules
from emloc_ray.stages.correct.search import ENOUGH_ROWS, next_candidate
from emloc_ray.stages.ray.tasks import set_threads


def selection(job: CorrectionJob) -> tuple[tuple[Candidate, ...], list[Tokens]]:
    """The candidates to begin with and the rows to score them on: as many as ``max_tokens`` allow, perhaps none."""
    shards = TokenShards(job.selection_dir)
    rows = [shards.row(position) for position in range(len(shards))]
    random.Random(0).shuffle(rows)  # files may be sorted by what their rows are of
    lengths = [len(row) for row in rows]
    begun, count = affordable(lengths, job.max_tokens, len(job.candidates), job.num_further, ENOUGH_ROWS)
    return job.candidates[:begun], rows[:count]


def scored(job: CorrectionJob, begun: Sequence[Candidate]) -> dict[Candidate, RowLosses]:
    """What was scored so far, in the order of the search."""
    losses: dict[Candidate, RowLosses] = {}
    while (candidate := _next(job, begun, losses)) is not None and exists(job.losses_path(candidate)):
        entries = read_shard(job.losses_path(candidate)).entries
        losses[candidate] = RowLosses(**{entry.name: entry.read_rows() for entry in entries})
    return losses


def _next(job: CorrectionJob, begun: Sequence[Candidate], losses: Mapping[Candidate, RowLosses]) -> Candidate | None:
    return next_candidate(begun, {candidate: rows.sums for candidate, rows in losses.items()}, job.num_further)


class Scoring:
    """A slot whose units are candidates in the order of the search: see :func:`emloc_ray.stages.ray.slots.start_slot`."""

    def __init__(self, job: CorrectionJob, threads: int | None = None) -> None:
        if threads is not None:
            set_threads(threads)
        self.job = job
        self.begun, self.rows = selection(job)
        self.losses = scored(job, self.begun)
        self._model: _AdaptedModel | None = None

    def position(self) -> int:
        """The last candidate that was scored, or -1."""
        return len(self.losses) - 1

    def accumulate(self, unit: int) -> int:
        """Scores the next candidate and writes its losses; nothing where the search has ended."""
        candidate = _next(self.job, self.begun, self.losses)
        if candidate is not None:
            self._model = self._model or _AdaptedModel(self.job)
            self.losses[candidate] = self._model.losses(candidate, self.rows)
            write_tensors(self.job.losses_path(candidate), self.losses[candidate]._asdict())
        return unit

    def commit(self) -> None:
        """Nothing: each candidate is safe once it is scored."""


class _AdaptedModel:
    """The original with the adapter as a candidate corrects it: first as trained, then, of other methods than LoRA, in
    LoRA's form."""

    def __init__(self, job: CorrectionJob) -> None:
        self.job, self.adapter = job, Adapter(job.adapter_dir)
        self.model = load_adapter(open_model(job.model_dir, job.hold, **job.model_options), job.adapter_dir).eval()
        self.images = ImageInputs(job.model_dir, job.model_options)
        self.is_lora = self.adapter.is_lora
        paths = [group.path for group in module_groups(job, self.adapter.names)]
        self.modules: Sequence[CorrectableModule] = [module for path in paths for module in read_modules(path)]

    def losses(self, candidate: Candidate, rows: Sequence[Tokens]) -> RowLosses:
        """Of each row."""
        job = self.job
        if not self.is_lora and candidate.method != "none":
            settings = lora_form_settings([module.lora for module in self.modules])
            form: Any = adapter_config(**settings, task_type=self.adapter.config["task_type"])
            self.model, self.is_lora = attach_adapter(detach_adapter(self.model), form).eval(), True
        for module in self.modules if self.is_lora else ():
            corrected = module.corrected(candidate, job.dampening_frac)
            plug_in(self.model, corrected, module.magnitude(candidate, job.dampening_frac))
        return losses_by_row(
            self.model,
            rows,
            batch_size=job.batch_size,
            loss_on=job.loss_on,
            pad_token_id=job.pad_token_id,
            images=self.images,
        )
