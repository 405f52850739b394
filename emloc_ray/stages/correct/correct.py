"""Correct: takes the emulator's difference out of the adapter, a Ray task for the linears that share a Gram; another task
scores the candidates, and the best is written."""

import functools
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, get_args

import ray
import torch

from emloc_ray.core.correction import Candidate, Method
from emloc_ray.core.precision import exact_float32
from emloc_ray.data.ahead import read_ahead
from emloc_ray.io.store.node_cache import discard, existing
from emloc_ray.modeling.adapter_files import Adapter, copy_adapter, lora_config, write_adapter
from emloc_ray.stages.correct.adapted import see_adapted_inputs
from emloc_ray.stages.correct.job import CorrectionJob, ModuleGroup, module_groups
from emloc_ray.stages.correct.modules import Opened, read_differences, read_modules, see_differences, write_modules
from emloc_ray.stages.correct.scoring import Scoring, scored, selection_rows
from emloc_ray.stages.correct.search import AUTO, best_choice
from emloc_ray.stages.ray.losses import Losses, Tell, unheard
from emloc_ray.stages.ray.slots import run_slots, start_slot
from emloc_ray.stages.ray.tasks import Progress, Resources, bundles, run_tasks, silent

# Why adapters of a kind are plugged into the original as trained.
AS_TRAINED = {
    "scaling": "IA³ scales what linears read or give and adds nothing to their weights: there is no update to correct.",
    "prompt": "Virtual tokens are added to what the model reads and nothing to its weights: there is no update to correct,"
    " and none to merge.",
}


def candidates(method: str, clamp: float | None, strength: float) -> list[Candidate]:
    """The candidates of a ``correction`` section: one, or with ``auto`` those that are measured."""
    if method == "auto":
        return list(AUTO)
    return [Candidate(m, clamp, strength) for m in get_args(Method) if m == method]


def correct_adapter(job: CorrectionJob, device: str = "cpu") -> dict[str, Any]:
    """Corrects every module on ``device``, chooses among the candidates on the selection split, writes ``job.out_dir``; in this
    process. Returns the choice, every candidate's loss, and each module's shortfall before and after."""
    discard(job.state_dir)
    plan = _Plan(job)
    if plan.num_passes:
        see_adapted_inputs(job)
    read_groups(Opened(job), plan.groups, device)
    if plan.num_scored:
        scoring = Scoring(job)
        for unit in range(plan.num_scored):
            scoring.accumulate(unit)
    result = finish(job)
    discard(job.state_dir)
    return result


def correct(
    job: CorrectionJob, resources: Resources, progress: Progress = silent, tell: Tell = unheard
) -> dict[str, Any]:
    """As :func:`correct_adapter`, in tasks; modules and losses that ``job.state_dir`` holds already are kept."""
    plan = _Plan(job)
    if plan.num_passes:
        run_tasks(see_adapted_inputs, job, [("the inputs in the emulator", ())], resources, Losses("correct", tell))
        progress(1, plan.total)
    largest = sorted(plan.groups, key=_parameters, reverse=True)
    work = [(_names(bundle), (bundle, resources.device)) for bundle in bundles(largest, _parameters, resources)]

    def read(done: int, _: int) -> None:
        progress(plan.num_passes + done, plan.total)

    if work:
        losses = Losses("correct", tell, files={name: [g.path for g in bundle] for name, (bundle, _) in work})
        run_tasks(read_groups, Opened(job), work, resources, losses, read)
    if plan.num_scored:
        units = range(plan.num_scored)
        arguments = ray.put(job), resources.threads
        run_slots(
            lambda slot: start_slot(resources, "correct: candidates", units, Scoring, *arguments),
            [units],
            "candidate",
            Losses("correct", tell),
            lambda done, _: progress(plan.num_read + done, plan.total),
            planned_s=resources.planned_s,
        )
    here = replace(resources, gpus_per_worker=0)
    [result] = run_tasks(finish, job, [("the adapter", ())], here, Losses("correct", tell))
    return {"num_workers": resources.num_workers, **result}


class _Plan:
    """A correction's work: the groups to read, and how many candidates may have to be scored."""

    def __init__(self, job: CorrectionJob) -> None:
        self.job, self.adapter = job, Adapter(job.adapter_dir)
        self.as_trained = AS_TRAINED.get(self.adapter.kind)
        self.groups = [] if self.as_trained else module_groups(job, self.adapter.names)
        choosing = len(job.candidates) > 1 and not self.as_trained
        self.rows = selection_rows(job) if choosing else []
        self.num_scored = len(job.candidates) if self.rows else 0
        chooses_none = choosing and not self.rows
        self.num_passes = int(job.reads_adapted and bool(self.groups) and not chooses_none)

    @property
    def num_read(self) -> int:
        """Units of work before candidates are scored: the emulator's pass, and the groups."""
        return self.num_passes + len(self.groups)

    @property
    def total(self) -> int:
        """Units of work."""
        return self.num_read + self.num_scored


def _parameters(group: ModuleGroup) -> int:
    return sum(spec.num_parameters for spec in group.specs)


def _names(bundle: Sequence[ModuleGroup]) -> str:
    return " and ".join(spec.name for spec in bundle[0].specs[:4]) + ("" if len(bundle) == 1 else ", …")


def read_groups(opened: Opened, groups: Sequence[ModuleGroup], device: str) -> None:
    """Writes the modules of a task's groups, one after another; those that are whole, from a try that was killed, are kept. On a
    GPU the next one's tensors are read meanwhile."""
    written, on = existing([group.path for group in groups]), torch.device(device)
    todo = [group for group in groups if group.path not in written]
    for group, tensors in read_ahead(todo, functools.partial(read_differences, opened), on):
        write_modules(group.path, see_differences(opened, group, on, tensors))


@exact_float32()
def finish(job: CorrectionJob) -> dict[str, Any]:
    """Chooses by what was scored, and writes the adapter: see :func:`correct_adapter`. In the method's own form where it is
    LoRA or nothing is taken out; else as a LoRA adapter of the same linears."""
    plan = _Plan(job)
    adapter = plan.adapter
    if plan.as_trained:
        copy_adapter(job.adapter_dir, job.out_dir)
        return {
            **asdict(Candidate("none")),
            **_unscored(Candidate("none")),
            "modules": {},
            "as_trained": plan.as_trained,
        }
    chosen, scores = _chosen(plan)
    corrected, magnitudes, shortfalls, lacks = {}, {}, {}, []
    for group in plan.groups:
        for module in read_modules(group.path):
            name = module.lora.name
            corrected[name] = module.corrected(chosen, job.dampening_frac)
            if (magnitude := module.magnitude(chosen, job.dampening_frac)) is not None:
                magnitudes[name] = magnitude
            if (missed := module.shortfalls(chosen, job.dampening_frac)) is not None:
                shortfalls[name] = missed
            lacks.append(module.lack)
    in_order = [corrected[name] for name in adapter.names]
    result = {**asdict(chosen), **scores, "modules": {n: shortfalls[n] for n in adapter.names if n in shortfalls}}
    if adapter.is_lora:
        write_adapter(job.out_dir, adapter.config, in_order, magnitudes)
        return result
    if chosen.method == "none":
        copy_adapter(job.adapter_dir, job.out_dir)
    else:
        write_adapter(job.out_dir, lora_config(adapter.config, in_order), in_order, magnitudes)
    ranks = [len(lora.lora_a) for lora in in_order]
    return {**result, "lora_form": {"largest_lack": max(lacks), "mean_rank": sum(ranks) / len(ranks)}}


def _unscored(candidate: Candidate) -> dict[str, Any]:
    return {"selection_tokens": 0, "candidates": [{**asdict(candidate), "loss": None}]}


def _chosen(plan: _Plan) -> tuple[Candidate, dict[str, Any]]:
    """The best candidate, and what was scored."""
    job = plan.job
    if not plan.num_scored:
        first = job.candidates[0]
        too_little = f"Fine-tuning read too little for a choice to cost {job.max_tokens} tokens: set correction.max_share higher."
        return first, {**_unscored(first), **({"note": too_little} if len(job.candidates) > 1 else {})}
    choice = best_choice(scored(job))
    tokens = sum(map(len, plan.rows))
    return choice.chosen, {
        "selection_rows": len(plan.rows),
        "selection_tokens": tokens,
        "scored_tokens": tokens * choice.num_measured,
        "max_tokens": job.max_tokens,
        "candidates": choice.records(),
        "considered": {**asdict(choice.considered), "certainty": choice.least_certainty()},
    }
