"""What a config sets reaches the stages' jobs, whose own defaults would hide what is not handed on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_runs import make_values, task_rows, write_jsonl
from stage_artifacts import write_tokens
from tiny import save_model

from emloc_ray.config.reading import parse_config
from emloc_ray.errors import ConfigError
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.planning.prepared import prepare
from emloc_ray.stages.calibrate.stage import calibration_job, gradient_job
from emloc_ray.stages.context import Context
from emloc_ray.stages.correct.stage import correction_job
from emloc_ray.stages.evaluate.stage import evaluation_job
from emloc_ray.stages.factorize.allocate import Spending
from emloc_ray.stages.factorize.stage import allocation_job, factorization_job
from emloc_ray.stages.finetune.stage import finetune_job
from emloc_ray.stages.heal.stage import healing_job
from emloc_ray.stages.merge.stage import merge_job
from emloc_ray.stages.refine.stage import REFINE

OPTIONS = {"dtype": "bfloat16", "attn_implementation": None, "trust_remote_code": False}


@pytest.fixture
def context(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> Context:
    """Of settings that are none of the defaults."""
    sections: dict[str, Any] = {
        "model": {"dtype": "bfloat16"},
        "calibration": {"tokens": "completion", "batch_size": 3},
        "emulator": {
            "allocation": "sensitivity",
            "objective": "predictions",
            "dampening_frac": 1e-3,
            "gradient_dampening_frac": 0.2,
            "rank_multiple": 4,
            "healing": {"steps": 2, "r": 2, "loss_on": "completion", "num_teacher_logits": 9},
        },
        "finetune": {
            "loss_on": "all",
            "max_failures": 7,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "eval_original_every": 3,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_original_loss",
            "early_stopping_patience": 4,
            "early_stopping_threshold": 0.5,
            "loraplus_lr_ratio": 16.0,
        },
        "correction": {"dampening_frac": 0.3, "update_tolerance": 0.25},
        "merge": {"max_shard_size": "1MiB", "chunk_bytes": 8192},
        "evaluation": {"batch_size": 3, "num_exact_match": 5, "num_generations": 6, "max_new_tokens": 7},
    }
    rows = write_jsonl(tmp_path / "rows.jsonl", task_rows(40))
    values = make_values(tmp_path / "run", tiny_model_dir(), rows, **sections)
    prepared = prepare(parse_config({**values, "seed": 5}))
    context = Context(prepared, prepared.source.directory)
    for split in ("train", "calibration"):
        write_tokens(context.tokens(split), 16, 8)
    return context


def test_of_the_sums_and_the_factors(context: Context) -> None:
    grams, gradients = calibration_job(context), gradient_job(context)
    assert (grams.tokens, grams.batch_size, dict(grams.model_options)) == ("completion", 3, OPTIONS)
    assert gradients.gradients is not None
    assert (gradients.gradients.loss_on, gradients.gradients.seed) == ("all", 5)
    for job in (allocation_job(context), factorization_job(context)):
        assert (job.dampening_frac, job.gradient_dampening_frac) == (1e-3, 0.2)
    assert allocation_job(context).rank_multiple == 4
    assert factorization_job(context).seed == 5


def test_a_budget_is_spent_by_the_dtypes_of_the_files_that_were_imported(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """A model on the hub is planned in its config's dtype; its files may be wider."""
    rows = write_jsonl(tmp_path / "rows.jsonl", task_rows(40))
    wide, narrow = save_model(tmp_path / "wide"), save_model(tmp_path / "narrow", dtype="bfloat16")
    emulator = {"compression_ratio": None, "objective": "predictions"}

    def spending(budget: str) -> Spending:
        values = make_values(tmp_path / "run", narrow, rows, emulator={**emulator, "budget": budget})
        made = allocation_job(Context(prepare(parse_config(values)), wide)).spending
        assert made is not None
        return made

    entries = {entry.name: entry for entry in Checkpoint(wide)}
    inside = sum(e.num_bytes for name, e in entries.items() if "_proj" in name and name.endswith("weight"))
    rest = sum(entry.num_bytes for entry in entries.values()) - inside
    assert spending("3 bits").budget == 3 * inside // 32
    assert spending(f"{rest + inside // 8}B").budget == inside // 8
    assert spending("3 bits").form_sizes.itemsize == 4
    with pytest.raises(ConfigError, match=r"emulator.budget: .* is met by no ranks and bits: give at least"):
        spending(f"{rest}B")


def test_a_refinement_is_of_the_ranks_that_data_gave(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """Another machine's sums may have given others, under the same inputs."""
    rows = write_jsonl(tmp_path / "rows.jsonl", task_rows(40))
    emulator = {"allocation": "sensitivity", "refinement": {"steps": 3}}
    prepared = prepare(parse_config(make_values(tmp_path / "run", tiny_model_dir(), rows, emulator=emulator)))

    def inputs(rank: int) -> Any:
        layers = {name: {"rank": rank, "solver": "eigh"} for name in prepared.layout.ranks}
        context = Context(prepared, prepared.source.directory, made={"factorize": "x"})
        context.results["factorize"] = {"layers": layers}
        write_tokens(context.tokens("calibration"), 16, 8)
        return REFINE.inputs(context)

    assert inputs(4) == inputs(4) != inputs(5)


def test_a_pass_opens_the_original_once(context: Context, opened: list[Path]) -> None:
    allocation_job(context)
    factorization_job(context)
    correction_job(context)
    merge_job(context)
    assert opened == [context.model_dir]


def test_of_the_trainings(context: Context) -> None:
    job = finetune_job(context, "x")
    assert (job.loss_on, job.seed, job.max_failures, job.loraplus_lr_ratio) == ("all", 5, 7, 16.0)
    assert job.model_options == OPTIONS
    asked = job.validation
    assert asked is not None
    assert (asked.every, asked.keeps_best, asked.patience, asked.threshold) == (2, True, 4, 0.5)
    assert asked.original is not None
    assert (asked.original.every, asked.goes_by) == (3, "original_loss")
    healing = context.prepared.config.emulator.healing
    assert healing is not None
    healed = healing_job(context, healing, "x")
    assert healed.training.loss_on == healed.teacher.loss_on == "completion"
    assert (healed.teacher.num_logits, healed.teacher.order.seed, healed.training.seed) == (9, 5, 5)
    assert healed.fold.dampening_frac == 1e-3


def offloaded(context: Context, **sections: Any) -> Context:
    """The original's weights come and go, with place for any batch; keys of sections may be others."""
    config = context.prepared.config
    others = {name: getattr(config, name).model_copy(update=keys) for name, keys in sections.items()}
    model = config.model.model_copy(update={"hold": "offloaded"})
    config = config.model_copy(update={**others, "model": model, "memory_budget": 2**34})
    return replace(context, prepared=replace(context.prepared, config=config))


def test_an_offloaded_teacher_reads_more_rows_at_once_than_the_training(context: Context) -> None:
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    healing = context.prepared.config.emulator.healing
    assert healing is not None
    resident = healing_job(context, healing, "x")
    assert resident.teacher.batch_size == resident.training.batch_size
    job = healing_job(offloaded(context, finetune=batches), healing, "x")
    assert (job.teacher.hold, job.teacher.batch_size) == ("offloaded", 2 * 2 * 4)  # all that two steps read
    assert (job.training.batch_size, job.teacher.order.batch_size, job.teacher.micro_steps) == (2, 2, 2 * 4)


def test_an_offloaded_original_is_scored_on_the_rows_that_are_asked_for(context: Context) -> None:
    """However few the emulator is scored on."""
    smaller = offloaded(context, evaluation={"batch_size": 1})
    for job in (evaluation_job(smaller), correction_job(smaller)):
        assert (job.hold, job.batch_size, job.rows_on_original) == ("offloaded", 1, 3)
    model = smaller.prepared.config.model.model_copy(update={"hold": "resident"})
    config = smaller.prepared.config.model_copy(update={"model": model})
    resident = replace(smaller, prepared=replace(smaller.prepared, config=config))
    for job in (evaluation_job(resident), correction_job(resident)):
        assert (job.hold, job.batch_size, job.rows_on_original) == ("resident", 1, 1)


def test_of_what_follows(context: Context) -> None:
    correct = correction_job(context)
    assert (correct.dampening_frac, correct.update_tolerance, correct.gram_dampening_frac) == (0.3, 0.25, 1e-3)
    assert (correct.loss_on, correct.calibration_tokens, correct.batch_size) == ("all", "completion", 3)
    merging = merge_job(context)
    assert (merging.chunk_bytes, merging.max_shard_size) == (8192, 2**20)
    scores = evaluation_job(context)
    assert (scores.loss_on, scores.batch_size) == ("all", 3)
    assert (scores.num_exact_match, scores.num_generations, scores.max_new_tokens) == (5, 6, 7)
    assert correct.model_options == scores.model_options == OPTIONS


def test_what_exact_steps_serve_is_scored_unasked(context: Context) -> None:
    config = context.prepared.config
    finetune = config.finetune.model_copy(update={"exact_steps": 1})
    evaluation = config.evaluation.model_copy(update={"variants": ["original", "corrected"]})
    config = config.model_copy(update={"finetune": finetune, "evaluation": evaluation})
    job = evaluation_job(replace(context, prepared=replace(context.prepared, config=config)))
    assert job.scored == ("original", "corrected", "finished")
    assert job.generating == ("original", "finished")
