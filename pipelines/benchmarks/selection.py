"""How many selection rows ``auto`` needs to choose a correction, by their labels and by what the tuned emulator predicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ablations import runs
from ablations.cells import read_ablation
from torch import Tensor

import emloc_ray
from benchmarks.figures import THREADS, Figures, figure, write_result
from emloc_ray.config.schema import RunConfig
from emloc_ray.core.selection import paired_gain
from emloc_ray.data.ahead import batches_by_length
from emloc_ray.modeling.adapter import load_adapter
from emloc_ray.modeling.adapter_files import Adapter
from emloc_ray.modeling.holding import open_model
from emloc_ray.modeling.inputs import ModelCall, model_call
from emloc_ray.modeling.loss import logits_at
from emloc_ray.planning.prepared import prepare
from emloc_ray.stages.context import Context
from emloc_ray.stages.correct.adapted import see_adapted_inputs
from emloc_ray.stages.correct.correct import read_groups
from emloc_ray.stages.correct.job import CorrectionJob, module_groups
from emloc_ray.stages.correct.modules import Opened, plug_in, read_modules
from emloc_ray.stages.correct.scoring import selection_rows
from emloc_ray.stages.correct.search import AUTO
from emloc_ray.stages.correct.stage import correction_job
from emloc_ray.stages.importing import original_dir

GRID = Path(__file__).parents[2] / "configs" / "ablations" / "frontier.yaml"
METHODS = ("int2", "budget_2.4", "budget_1.1", "factors")
ROWS = (3, 6, 16, 32, 64, 128)
DRAWS = 4000
TOLD = 0.15  # points of the gap: the standard error at which 0.3 are told from chance
SETTINGS = (
    "compare_with={}",
    "datasets=[summaries]",
    "seeds=[0]",
    "rows.selection=512",
    "correction.num_selection_samples=512",
    "finetune.bf16=true",
    *(f"{stage}.cpus_per_worker={THREADS}" for stage in ("calibration", "emulator", "finetune", "evaluation")),
)


@dataclass(frozen=True)
class Losses:
    """Of the original with the adapter, by row: ``labels (rows, candidates)`` in nats, ``predicted`` the cross-entropy from what
    the emulator with the adapter predicts at the same places, both summed over the ``counts (rows,)`` of labels; ``gap`` in nats
    a label: what LoRA on the original gains on the original."""

    labels: Tensor
    predicted: Tensor
    counts: Tensor
    gap: float


def selection(out: Path) -> Figures:
    """Each method's adapter, of 60 steps, on the original, as ``auto``'s candidates correct it: by row the loss of labels, and
    the cross-entropy from the emulator's predictions, which no label's chance moves. Of both the standard error, and what is
    gained where the choice is made on fewer rows."""
    given = (
        f"run_dir={out / 'selection'}",
        f"shared={out / 'shared'}",
        f"methods=[lora,{','.join(METHODS)}]",
        *SETTINGS,
    )
    ablation = read_ablation(GRID, given)
    runs.make_data(ablation, print)
    ablation = runs.unrounded(ablation, print)
    bound, *cells = ablation.cells
    emloc_ray.run(bound.config, until="finetune", accept_changes=True)
    rows = []
    for cell in cells:
        print(cell.method, flush=True)
        emloc_ray.run(cell.config, until="finetune", accept_changes=True)
        rows.append({"method": cell.method, **told(losses(cell.config, bound.config))})
    write_result(out / "selection.json", "selection", "selection", rows=rows)
    figures = {}
    for row in rows:
        drawn_rows, choices = list(row["draws"]["labels"].items())[-1]
        figures[f"points gained by a choice on {drawn_rows} rows, {row['method']}"] = figure(
            choices["gained"], row["best"], "points (baseline: the best candidate)"
        )
    return figures


def losses(config: RunConfig, bound: RunConfig) -> Losses:
    """Of a finished training's adapter on all selection rows."""
    job, lora = _job(config), _job(bound)
    see_adapted_inputs(job)
    groups = module_groups(job, Adapter(job.adapter_dir).names)
    read_groups(Opened(job), groups, "cpu")
    modules = [module for group in groups for module in read_modules(group.path)]

    def original() -> Any:
        return open_model(job.model_dir, **job.model_options)

    models = [load_adapter(original(), job.adapter_dir).eval() for _ in AUTO]
    for model, candidate in zip(models, AUTO, strict=True):
        for module in modules:
            plug_in(model, module.corrected(candidate, job.dampening_frac), None)
    emulator = load_adapter(open_model(job.emulator_dir, **job.model_options), job.adapter_dir).eval()
    ends = [original(), load_adapter(original(), lora.adapter_dir).eval()]
    return _read(job, emulator, models, ends)


def _job(config: RunConfig) -> CorrectionJob:
    prepared = prepare(config)
    job = correction_job(Context(prepared, original_dir(prepared)))
    return dataclasses.replace(job, candidates=AUTO, max_tokens=None)


@torch.no_grad()
def _read(job: CorrectionJob, emulator: Any, models: Sequence[Any], ends: Sequence[Any]) -> Losses:
    rows = selection_rows(job)
    by_label, predicted = (torch.zeros(len(rows), len(models), dtype=torch.float64) for _ in range(2))
    counts, totals = torch.zeros(len(rows)), torch.zeros(2, dtype=torch.float64)
    for numbers, batch in batches_by_length(rows, job.batch_size, job.pad_token_id):
        call = model_call(emulator.config, batch, job.loss_on)
        expected = _log_probs(emulator, call).exp()
        for number, model in enumerate(models):
            made = _log_probs(model, call)
            by_label[numbers, number] = _by_row(_of_labels(made, call), call)
            predicted[numbers, number] = _by_row((expected * made).sum(-1), call)
        counts[numbers] = torch.tensor(call.counts).float()
        totals += torch.stack([_by_row(_of_labels(_log_probs(model, call), call), call).sum() for model in ends])
    return Losses(by_label, predicted, counts, float((totals[0] - totals[1]) / counts.sum()))


def _log_probs(model: Any, call: ModelCall) -> Tensor:
    """Of the whole vocabulary at the labels' places ``(labels, vocabulary)``."""
    with logits_at(model, call.predicting):
        return model(**call.inputs, use_cache=False).logits[0].float().log_softmax(-1)


def _of_labels(log_probs: Tensor, call: ModelCall) -> Tensor:
    return log_probs.gather(1, call.targets[:, None]).squeeze(1)


def _by_row(log_probs: Tensor, call: ModelCall) -> Tensor:
    """The loss of each row, from log-probabilities of its labels or of what stands for them."""
    return torch.stack([-part.sum() for part in log_probs.double().split(call.counts)])


def told(losses: Losses) -> dict[str, Any]:
    """What the rows tell, in points of the gap: of each correction its gain on ``none`` with the standard error on 64 rows, by
    labels and by predictions, how both follow each other, and what choices on fewer rows gain by labels."""
    points = 100 / losses.gap
    kinds = {"labels": losses.labels, "predicted": losses.predicted}
    corrections = []
    for number, candidate in enumerate(AUTO[1:], 1):
        of_both = {key: _gain(kind, number, losses.counts, points) for key, kind in kinds.items()}
        follow = torch.corrcoef(torch.stack([kind[:, 0] - kind[:, number] for kind in kinds.values()]))
        named = {"method": candidate.method, "strength": candidate.strength}
        corrections.append({**named, **of_both, "correlation": float(follow[0, 1])})
    gains = (losses.labels[:, :1] - losses.labels).sum(0) / losses.counts.sum() * points
    both = {**kinds, "both": losses.labels + losses.predicted}
    return {
        "rows": len(losses.counts),
        "gap": losses.gap,
        "best": float(gains.max()),
        "corrections": corrections,
        "draws": {key: drawn(kind, gains) for key, kind in both.items()},
    }


def _gain(kind: Tensor, number: int, counts: Tensor, points: float) -> dict[str, float]:
    gain, rows = paired_gain(kind[:, number], kind[:, 0], counts), len(counts)
    error = gain.standard_error * points
    return {
        "gain": gain.mean * points,
        "error_at_64": error * (rows / 64) ** 0.5,
        "rows_needed": rows * (error / TOLD) ** 2,
    }


def drawn(kind: Tensor, gains: Tensor) -> dict[str, Mapping[str, float]]:
    """By a number of rows: of :data:`DRAWS` draws of so many rows of ``kind (rows, candidates)``, on each of which the candidate
    with the least sum is chosen, the share that chose the best, the mean of ``gains (candidates,)`` of the chosen ones, and
    the share that chose one that is worse than the first."""
    generator = torch.Generator().manual_seed(0)
    results: dict[str, Mapping[str, float]] = {}
    for n in (n for n in ROWS if n <= len(kind)):
        order = torch.rand(DRAWS, len(kind), generator=generator).argsort(1)[:, :n]
        chosen = kind[order].sum(1).argmin(1)
        made = gains[chosen]
        results[str(n)] = {
            "best": float((chosen == gains.argmax()).double().mean()),
            "gained": float(made.double().mean()),
            "worse": float((made < gains[0]).double().mean()),
        }
    return results
