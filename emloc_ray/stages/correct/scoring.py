"""What the selection rows lose under each candidate; what was scored before is kept."""

import functools
import itertools
import random
from collections.abc import Sequence
from typing import Any

from emloc_ray.core.correction import Candidate
from emloc_ray.core.selection import affordable_rows
from emloc_ray.data.formats import Tokens
from emloc_ray.data.token_shards import TokenShards
from emloc_ray.io.formats.checkpoint import read_shard
from emloc_ray.io.formats.shards import write_tensors
from emloc_ray.io.store.node_cache import exists
from emloc_ray.modeling.adapter_files import Adapter, lora_settings
from emloc_ray.modeling.adapter_methods import adapter_config
from emloc_ray.modeling.scoring import RowLosses, losses_by_row
from emloc_ray.stages.correct.job import CorrectionJob, module_groups
from emloc_ray.stages.correct.modules import CorrectableModule, plug_in, read_modules
from emloc_ray.stages.ray.tasks import set_threads


def selection_rows(job: CorrectionJob) -> list[Tokens]:
    """The rows to score candidates on: as many as ``max_tokens`` allow, perhaps none."""
    shards = TokenShards(job.selection_dir)
    rows = [shards.row(position) for position in range(len(shards))]
    random.Random(0).shuffle(rows)  # files may be sorted by what their rows are of
    return rows[: affordable_rows([len(row) for row in rows], job.max_tokens, len(job.candidates))]


def scored(job: CorrectionJob) -> dict[Candidate, RowLosses]:
    """What was scored so far, in the job's order."""
    losses: dict[Candidate, RowLosses] = {}
    for candidate in itertools.takewhile(lambda candidate: exists(job.losses_path(candidate)), job.candidates):
        entries = read_shard(job.losses_path(candidate)).entries
        losses[candidate] = RowLosses(**{entry.name: entry.read_rows() for entry in entries})
    return losses


class Scoring:
    """A slot whose units are candidates: see :func:`emloc_ray.stages.ray.slots.start_slot`. Where the original's weights come
    and go, all are scored in one pass."""

    def __init__(self, job: CorrectionJob, threads: int | None = None) -> None:
        if threads is not None:
            set_threads(threads)
        self.job = job
        self.rows = selection_rows(job)
        self.losses = scored(job)
        self._models: _AdaptedModels | None = None

    def position(self) -> int:
        """The last candidate that was scored, or -1."""
        return len(self.losses) - 1

    def accumulate(self, unit: int) -> int:
        """Scores the candidate, or where weights come and go all that are left, and writes their losses."""
        last = unit + 1 if self.job.hold == "resident" else None
        if candidates := self.job.candidates[len(self.losses) : last]:
            self._models = self._models or _AdaptedModels(self.job, len(candidates))
            for candidate, losses in zip(candidates, self._models.losses(candidates, self.rows), strict=True):
                self.losses[candidate] = losses
                write_tensors(self.job.losses_path(candidate), losses._asdict())
        return unit

    def commit(self) -> None:
        """Nothing: each candidate is safe once it is scored."""


class _AdaptedModels:
    """The original with the adapter as candidates correct it; so many of them at once where its weights come and go."""

    def __init__(self, job: CorrectionJob, number: int) -> None:
        from emloc_ray.modeling.holding import Offloaded, open_model  # seconds that the final actor need not wait

        self.held = None
        if job.hold != "resident":
            ends = job.hold == "all_offloaded"
            self.held = Offloaded(job.model_dir, ends_offloaded=ends, num_models=number, **job.model_options)
        bare = self.held.models if self.held else [open_model(job.model_dir, **job.model_options)]
        paths = [group.path for group in module_groups(job, Adapter(job.adapter_dir).names)]
        modules = [module for path in paths for module in read_modules(path)]
        self.models = [_AdaptedModel(job, model, modules) for model in bare]

    def losses(self, candidates: Sequence[Candidate], rows: Sequence[Tokens]) -> list[RowLosses]:
        """Of each row under each candidate."""
        passes = [
            functools.partial(model.losses, candidate, rows)
            for model, candidate in zip(self.models, candidates, strict=False)
        ]
        return self.held.in_step(passes) if self.held else [one_pass() for one_pass in passes]


class _AdaptedModel:
    """The original with the adapter as a candidate corrects it: first as trained, then, of other methods than LoRA, in
    LoRA's form."""

    def __init__(self, job: CorrectionJob, model: Any, modules: Sequence[CorrectableModule]) -> None:
        from emloc_ray.modeling.adapter import load_adapter

        self.job, self.adapter, self.modules = job, Adapter(job.adapter_dir), modules
        self.model = load_adapter(model, job.adapter_dir).eval()
        self.is_lora = self.adapter.is_lora

    def losses(self, candidate: Candidate, rows: Sequence[Tokens]) -> RowLosses:
        """Of each row."""
        from emloc_ray.modeling.adapter import attach_adapter, detach_adapter

        job = self.job
        if not self.is_lora and candidate.method != "none":
            settings = lora_settings([module.lora for module in self.modules])
            form: Any = adapter_config(**settings, task_type=self.adapter.config["task_type"])
            self.model, self.is_lora = attach_adapter(detach_adapter(self.model), form).eval(), True
        for module in self.modules if self.is_lora else ():
            corrected = module.corrected(candidate, job.dampening_frac)
            plug_in(self.model, corrected, module.magnitude(candidate, job.dampening_frac))
        return losses_by_row(
            self.model,
            rows,
            batch_size=job.rows_on_original,
            loss_on=job.loss_on,
            pad_token_id=job.pad_token_id,
            images=job.images,
        )
