"""The emulator as two steps of a run: the ranks, where they follow from the data, and the factors."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from emloc_ray.config.schema import RunConfig
from emloc_ray.core.ranks import rank_multiple
from emloc_ray.io.runs.fingerprint import fingerprint
from emloc_ray.io.runs.resume import discard_unless
from emloc_ray.modeling.stored_names import renamed_tensors
from emloc_ray.planning.costs import StageCost
from emloc_ray.planning.emulator_budget import budget_of_linears
from emloc_ray.planning.layout import Layout
from emloc_ray.planning.memory import MemoryModel
from emloc_ray.planning.model_bytes import file_dtype
from emloc_ray.planning.model_checks import check_healing
from emloc_ray.planning.prepared import Prepared
from emloc_ray.planning.training import factor_ranks, factorize_work, healing_training, quantized_late, rounded_late
from emloc_ray.stages.calibrate.stage import CALIBRATE, SUMS, gradient_inputs
from emloc_ray.stages.context import Context, Inputs, Result
from emloc_ray.stages.factorize.job import FactorizationJob
from emloc_ray.stages.factorize.kept_tensors import kept_bytes
from emloc_ray.stages.stage import Stage

if TYPE_CHECKING:
    from emloc_ray.stages.factorize.allocate import AllocationJob, Spending
    from emloc_ray.stages.ray.tasks import Progress, Resources


def allocation_job(context: Context) -> AllocationJob:
    """The job that allots the ranks of all linears whose ratio no pattern names."""
    from emloc_ray.stages.factorize.allocate import AllocationJob

    emulator, layout = context.prepared.config.emulator, context.layout
    allocated, placed = set(layout.allocated), {spec.name: spec for spec in context.specs()}
    groups = (tuple(placed[s.name] for s in group if s.name in allocated) for group in layout.groups)
    return AllocationJob(
        model_dir=context.model_dir,
        calibration_dir=context.path("calibration"),
        gradients_dir=context.path("gradients"),
        groups=tuple(group for group in groups if group),
        ranks={name: layout.ranks[name] for name in layout.allocated if name in layout.ranks},
        plain_factors=layout.objective == "activations",
        dampening_frac=emulator.dampening_frac,
        gradient_dampening_frac=emulator.gradient_dampening_frac,
        never_dense=frozenset(name for name in layout.allocated if not layout.may_be_dense(name)),
        storage=layout.storage,
        rank_multiple=emulator.rank_multiple,
        spending=None if layout.budget is None else _spending(context),
    )


def _spending(context: Context) -> Spending:
    """What there is to spend by the dtypes of the files, which a plan of a model on the hub does not know. Raises ConfigError
    where no forms meet the budget."""
    from emloc_ray.stages.factorize.allocate import Spending

    layout, emulator, checkpoint = context.layout, context.prepared.config.emulator, context.checkpoint
    compressed = set(layout.compressed)
    sizes = {
        spec.name: checkpoint.entry(spec.weight_rows[0].name).dtype.itemsize
        for spec in context.specs()
        if spec.name in compressed
    }
    weights = sum(layout.by_name[name].num_parameters * itemsize for name, itemsize in sizes.items())
    rest = kept_bytes(checkpoint, context.unused(), context.tied()) - weights
    itemsize = max(sizes.values())
    budget = budget_of_linears(layout, emulator, itemsize, rest)
    even = {name: layout.form(layout.by_name[name]) for name in layout.allocated}
    return Spending(budget, layout.form_sizes(itemsize), even)


def factorization_job(context: Context, layout: Layout | None = None) -> FactorizationJob:
    """Every group of linears that share an input; ``layout`` has the ranks, where they were allocated."""
    prepared = context.prepared if layout is None else replace(context.prepared, layout=layout)
    emulator, layout = prepared.config.emulator, prepared.layout
    placed = {spec.name: spec for spec in context.specs()}
    late, targeted = set(quantized_late(layout, emulator.heals)), set(layout.compressed)
    in_4bit = tuple(name for name in layout.in_4bit if name not in late)
    early = {name: bits for name, bits in layout.bits.items() if name not in late}
    return FactorizationJob(
        model_dir=context.model_dir,
        out_dir=context.path("emulator"),
        groups=tuple(tuple(placed[spec.name] for spec in group) for group in layout.groups),
        ranks=factor_ranks(prepared),
        dampening_frac=emulator.dampening_frac,
        seed=prepared.config.seed,
        renamed=renamed_tensors(context.stored()),
        unused=context.unused(),
        tied=context.tied(),
        in_4bit=in_4bit,
        without_gram=tuple(name for name in (*in_4bit, *layout.bits) if name not in targeted),
        kept_wide=layout.kept_wide,
        gradients_dir=context.path("gradients") if _reads_gradients(layout) else None,
        gradient_dampening_frac=emulator.gradient_dampening_frac,
        by_weights=layout.objective == "weights",
        storage=layout.storage,
        integers=replace(layout.forms, bits=early),
        gradients_for_residuals=layout.budget is not None and _reads_gradients(layout),
    )


def _reads_gradients(layout: Layout) -> bool:
    return layout.objective == "predictions" and (bool(layout.ranks) or layout.budget is not None)


def _reads_objective(layout: Layout) -> bool:
    return layout.objective == "weights" or _reads_gradients(layout)


def _storage(layout: Layout) -> Inputs:
    return {"storage": layout.storage} if layout.storage != "factors" else {}


def _gradient_key(context: Context) -> Inputs:
    # Which linears have sums is left out: the sums of one are the same whatever the others.
    inputs = {key: value for key, value in gradient_inputs(context).items() if key != "linears"}
    return {"weighing": fingerprint([inputs, context.prepared.config.emulator.gradient_dampening_frac])}


def _allocation(context: Context) -> Inputs:
    """What ranks follow from, but for Grams; empty where they are uniform."""
    layout = context.layout
    if not layout.allocated:
        return {}
    asked = context.prepared.config.emulator.rank_multiple
    multiples = {rank_multiple(s.out_features, s.in_features, asked) for s in layout.specs}
    return {
        **_storage(layout),
        **({"rank_multiple": asked} if multiples != {1} else {}),
        "allocation": layout.allocation,
        **_budget(context),
        "dampening_frac": context.prepared.config.emulator.dampening_frac,
        "dense": [name for name in layout.allocated if layout.may_be_dense(name)],
        "objective": layout.objective,
        **_gradient_key(context),
    }


def _budget(context: Context) -> Inputs:
    layout = context.layout
    if layout.budget is None:
        return {"budget": {name: layout.ranks[name] for name in layout.allocated}}
    form_sizes = dataclasses.asdict(layout.form_sizes(file_dtype(context.prepared).itemsize))
    # Version 2 of the predicted losses: in the first, forms whose loss was NaN counted as lossless.
    return {"budget": layout.budget, "linears": layout.allocated, "storing": form_sizes, "losses": 2}


def _factorize_inputs(context: Context) -> Inputs:
    """What decides the emulator. Allocated ranks count by what decides them: a cache must find the emulator without them."""
    config, layout, allocation = context.prepared.config, context.layout, _allocation(context)
    heals, objective = config.emulator.heals, layout.objective
    late = set(rounded_late(layout, heals))
    # Whether nothing is quantized in this stage: NF4 waits for healing; integers do where all of them are on healed linears.
    only_later = heals is not None and (layout.in_4bit or (not allocation and bool(late) and late == set(layout.bits)))
    inputs: Inputs = {
        "calibrate": context.made.get(CALIBRATE.name, ""),
        "model": context.model_key,
        "ranks": factor_ranks(context.prepared),
        "dampening_frac": config.emulator.dampening_frac,
        "seed": config.seed,
        **_storage(layout),
    }
    if allocation:
        inputs["allocation"] = allocation
    # ``ranks`` shows neither what healing takes of allocated ranks, nor that the linears that it grows stay floats.
    if heals is not None and (allocation or (late and not only_later)):
        inputs["healing"] = heals.r
    if _reads_objective(layout):
        inputs["objective"] = objective
    if _reads_gradients(layout):
        inputs |= _gradient_key(context)
    if config.emulator.quantization != "none" and not only_later:
        inputs["quantization"] = config.emulator.quantization
    if layout.bits and not only_later:
        inputs["integers"] = [layout.group_size, config.emulator.residual_rank]
    return inputs


def _allocated(context: Context) -> Layout:
    """The layout with the ranks that were allocated."""
    from emloc_ray.stages.factorize.spend import read_forms, read_ranks

    layout = context.layout
    if not layout.allocated:
        return layout
    if layout.budget is not None:
        return layout.with_forms(read_forms(context.path("allocation")))
    ranks = {**layout.ranks, **read_ranks(context.path("allocation"))}
    return replace(layout, ranks={name: rank for name, rank in ranks.items() if rank is not None})


def _allocate(context: Context, inputs: Inputs, granted: Resources, progress: Progress) -> Result:
    from emloc_ray.stages.factorize.allocate import allocate_ranks

    out_dir = context.path("allocation")
    discard_unless(out_dir, inputs)
    return allocate_ranks(allocation_job(context), out_dir, granted, progress, context.note)


def _factorize(context: Context, inputs: Inputs, granted: Resources, progress: Progress) -> Result:
    from emloc_ray.stages.factorize.factorize import build_emulator

    layout = _allocated(context)
    check_healing(context.prepared.config, layout)  # which the data may have left nothing to grow
    job = factorization_job(context, layout)
    # Ranks that were allocated anew need not be those of shards that a killed try left.
    forms = {} if layout.budget is None else {n: dataclasses.asdict(layout.form(s)) for n, s in layout.by_name.items()}
    discard_unless(job.out_dir, [inputs, job.ranks, *([forms] if forms else [])])
    made = build_emulator(job, context.path("calibration"), context.base_config(), granted, progress, context.note)
    heals = context.prepared.config.emulator.heals is not None
    # Healing has to know the ranks, of an emulator from the cache too.
    return {
        **made,
        **({"ranks": layout.ranks} if heals and layout.allocated else {}),
        **({"forms": forms} if forms else {}),
    }


def _allocate_cost(memory: MemoryModel) -> StageCost:
    layout = memory.layout
    spread = set(layout.allocated)
    specs = [spec for spec in layout.specs if spec.name in spread]
    values = sum(2 * s.num_parameters * s.in_features for s in specs)
    if layout.budget is not None:  # what integers and rounded factors lose too
        values += sum(4 * s.num_parameters * (s.out_features + min(s.out_features, s.in_features)) for s in specs)
    spectra = 8 * sum(min(s.out_features, s.in_features) for s in layout.specs)
    # At most what the group that needs most takes to be factorized.
    return StageCost(
        memory.factorization_parts(),
        float32_flops=2.5 * values,
        disk_bytes=spectra,
        start_seconds=6,
        sums_read=memory.sums_read(),
    )


def _factorize_cost(memory: MemoryModel) -> StageCost:
    healing, files = memory.config.emulator.heals, memory.emulator_files
    if healing is not None:  # at the lower ranks that healing begins with
        training = healing_training(memory.config, healing, memory.layout)
        files = MemoryModel(memory.prepared, memory.lengths, training).emulator_files
    work = 2.5 * factorize_work(memory.prepared)
    return StageCost(
        memory.factorization_parts(),
        float32_flops=work,
        disk_bytes=files,
        start_seconds=6,
        sums_read=memory.sums_read(_reads_gradients(memory.layout)),
    )


def thin_calibration(config: RunConfig, fewest_tokens: int | None, layout: Layout) -> str | None:
    """Says so where a Gram has fewer tokens than a rank that is taken from it."""
    highest = max(layout.ranks.values(), default=0)
    if fewest_tokens is None or fewest_tokens >= highest or layout.objective == "weights":
        return None
    section = config.calibration
    key = "num_calibration_samples" if section.num_calibration_tokens is None else "num_calibration_tokens"
    who = "An expert" if any(spec.routed_share is not None for spec in layout.specs) else "Calibration"
    return f"{who} saw {fewest_tokens} tokens, fewer than the highest rank {highest}: raise calibration.{key}."


def unseen_linears(unseen: Sequence[str], layout: Layout) -> str | None:
    """Says so where no token reached linears that are factorized by their inputs; the calibration reports experts itself."""
    ranked = {spec.name for spec in layout.specs if spec.routed_share is None and spec.name in layout.ranks}
    without = [name for name in unseen if name in ranked]
    if not without or layout.objective == "weights":
        return None
    return (
        f"Calibration brought no token to {len(without)} linears, {without[0]} among them (a vision tower without images?):"
        " they are factorized by their weights alone."
    )


def _remarks(context: Context, result: Result) -> list[str | None]:
    made = context.layout.as_made(result)
    return [
        thin_calibration(context.prepared.config, result["fewest_tokens"], made),
        unseen_linears(result.get("unseen", ()), made),
    ]


def _allocate_summary(result: Result) -> str:
    forms = ", ".join(f"{count} × {kind}" for kind, count in result["forms"].items())
    share = result["loss"] / result["even_loss"] if result["even_loss"] > 0 else 1.0
    return f"{forms}: what they lose is {share:.0%} of what even ones would, within {result['gap']:.1g} of the least"


def _allocate_metrics(prepared: Prepared, results: dict[str, Result]) -> dict[str, Any]:
    left_out = ("usage", "num_workers", "taken_from")
    return {"allocation": {key: value for key, value in results["allocate"].items() if key not in left_out}}


def _factorize_metrics(prepared: Prepared, results: dict[str, Result]) -> dict[str, Any]:
    """What was kept of the original, layer by layer and in all, as it is after healing."""
    made = results["factorize"]
    layout = prepared.layout.as_made(made)
    saved = layout.parameters_targeted - layout.parameters_factorized
    budget = prepared.config.emulator.budget
    stored = layout.stored_bytes(file_dtype(prepared).itemsize)
    specs = layout.by_name
    kinds = Counter(layout.form(specs[name]).kind for name in layout.compressed)
    emulator: dict[str, Any] = {
        "compression_ratio": prepared.config.emulator.compression_ratio if budget is None else None,
        **({"budget": budget, "forms": dict(kinds.most_common())} if budget is not None else {}),
        "bits_per_weight": 8 * stored / max(layout.parameters_targeted, 1),
        "parameters_kept": layout.parameters_factorized / max(layout.parameters_targeted, 1),
        "parameters": layout.num_parameters - saved,
        "original_parameters": layout.num_parameters,
        "mean_relative_error": made["mean_relative_error"],
        "quantization": prepared.config.emulator.quantization,
        "allocation": layout.allocation if prepared.layout.allocated else "uniform",
        "objective": layout.objective if _reads_objective(layout) else "activations",
        "storage": layout.storage,
        "layers": _with_shares(made["layers"], layout),
    }
    last = results.get("heal", made)
    return {"emulator": {**emulator, **({"bytes": last["bytes"]} if "bytes" in last else {})}}


def _with_shares(layers: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """Each layer with the share of its parameters that the emulator keeps, and its form where that has no rank; beside them those
    that an allocation left dense."""
    specs = layout.by_name
    free = layout.free if (layout.ranks or layout.budget is not None) and layout.allocation != "uniform" else ()
    dense = {
        name: {"rank": min(specs[name].out_features, specs[name].in_features), "relative_error": 0.0, "solver": "dense"}
        for name in free
    }
    shares = {name: layout.kept(spec) / spec.num_parameters for name, spec in specs.items()}
    named = {} if layout.quantization == "nf4" else {name: layout.form(spec) for name, spec in specs.items()}
    kinds = {name: {"form": form.kind} for name, form in named.items() if form.rank is None}
    return {
        name: {**layer, "share": shares[name], **kinds.get(name, {})} for name, layer in {**dense, **layers}.items()
    }


ALLOCATE = Stage(
    name="allocate",
    title="Allocating ranks",
    verb="factorize",
    wanted=lambda prepared: bool(prepared.layout.allocated),
    workers=lambda config: config.emulator,
    inputs=lambda context: {"calibrate": context.made[CALIBRATE.name], **_allocation(context)},
    outputs=("allocation",),
    run=_allocate,
    cost=_allocate_cost,
    reads=lambda context: SUMS,
    is_shared=lambda context: True,
    resumes=True,
    divisible=True,
    summary=_allocate_summary,
    metrics=_allocate_metrics,
    metrics_keys=("allocation",),
)
FACTORIZE = Stage(
    name="factorize",
    title="Factorizing",
    workers=lambda config: config.emulator,
    inputs=_factorize_inputs,
    outputs=("emulator",),
    run=_factorize,
    cost=_factorize_cost,
    reads=lambda context: SUMS if _reads_gradients(context.layout) else (CALIBRATE.name,),
    is_shared=lambda context: True,
    resumes=True,
    divisible=True,
    summary=lambda result: f"{len(result['layers'])} linears, mean relative error {result['mean_relative_error']:.3f}",
    remarks=_remarks,
    metrics=_factorize_metrics,
    metrics_keys=("emulator",),
)
