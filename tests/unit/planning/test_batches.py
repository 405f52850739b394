"""Within a budget batches shrink: to what inference of the original takes, where that is asked for."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from bare_runs import bare_run
from transformers import LlamaConfig

from emloc_ray.config.reading import load_config, parse_config
from emloc_ray.errors import ConfigError
from emloc_ray.planning import calibration_memory
from emloc_ray.planning.batches import shrink_batches, without_budget
from emloc_ray.planning.budget import check_holding
from emloc_ray.planning.costs import with_base
from emloc_ray.planning.machine import Speeds
from emloc_ray.planning.memory import BASE_BYTES, MemoryModel, total
from emloc_ray.planning.plan import check_stages, make_plan
from emloc_ray.planning.prepared import Prepared, prepare
from emloc_ray.planning.training import healing_training
from emloc_ray.planning.work import rows_a_step
from emloc_ray.runs.remarks import over_budget, smaller_batches
from emloc_ray.stages.order import STEPS
from emloc_ray.ui.terminal import budget_lines

MODEL = LlamaConfig(
    vocab_size=8000,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
ROOT = Path(__file__).parents[3]
LEFT_OUT = object()


def prepared(budget: Any, model_config: Any = MODEL, **sections: Any) -> Prepared:
    values = {
        **({} if budget is LEFT_OUT else {"memory_budget": budget}),
        "model": {"source": "unused", "dtype": "float32"},
        "data": {"train": {"path": "unused"}, "max_seq_length": 256},
        "calibration": {"batch_size": 64},
        "emulator": {"allocation": "sensitivity", "objective": "predictions", "healing": {"steps": 4}},
        "finetune": {"per_device_train_batch_size": 8, "gradient_checkpointing": False, "exact_steps": 2},
        "evaluation": {"batch_size": 32},
    }
    return bare_run(model_config, **{**values, **sections})


def test_every_stage_stays_within_inference_and_a_step_keeps_its_rows() -> None:
    asked = prepared("inference")
    yardstick = total(MemoryModel(asked).inference())
    ready = shrink_batches(asked)
    plan = make_plan(STEPS, ready)
    assert yardstick == plan.worker_bytes["inference"] == MemoryModel(ready).budget
    assert {"gradients", "heal", "finetune", "correct", "finish", "evaluate"} <= plan.worker_bytes.keys()
    assert max(plan.worker_bytes.values()) == yardstick, plan.worker_bytes
    section = ready.config.finetune
    assert section.per_device_train_batch_size * section.gradient_accumulation_steps == 8
    assert section.per_device_train_batch_size < 8
    assert section.gradient_checkpointing
    assert ready.config.calibration.batch_size < 64
    assert ready.config.evaluation.batch_size < 32
    assert ready.layout == asked.layout


def test_what_a_budget_shrank_is_told_apart_by_what_was_asked() -> None:
    healing = {"steps": 4, "per_device_train_batch_size": 8}
    for rows in (1, 8, 9):
        asked = prepared("inference", emulator={"healing": {**healing, "per_device_train_batch_size": rows}})
        asked = dataclasses.replace(asked, written_config=asked.config)
        ready = shrink_batches(asked)
        assert ready.config.finetune.per_device_train_batch_size < 8
        # The offloaded original's batches are larger than what fits the emulator, and within the same bytes.
        assert MemoryModel(ready).evaluation_rows() > ready.config.evaluation.batch_size
        assert re.search(r"evaluation reads \d+ rows? a pass of the emulator", smaller_batches(ready) or "")
        assert max(make_plan(STEPS, ready).worker_bytes.values()) <= total(MemoryModel(asked).inference())
        known = ready.for_fingerprints.config
        assert known.finetune == asked.config.finetune
        assert known.evaluation == asked.config.evaluation
        assert known.emulator.healing == asked.config.emulator.healing
        section = ready.config.emulator.healing
        assert section is not None
        assert rows_a_step(healing_training(ready.config, section, ready.layout).section) == rows
    fewer = asked.config.model_copy(update={"finetune": asked.config.finetune.model_copy(update={"max_steps": 3})})
    assert dataclasses.replace(ready, config=fewer).for_fingerprints.config.finetune.max_steps == 3


def test_the_yardstick_is_a_row_whatever_the_batch() -> None:
    one, many = (prepared(None, finetune={"per_device_train_batch_size": rows}) for rows in (1, 64))
    assert MemoryModel(one).inference() == MemoryModel(many).inference()
    longer = prepared(None, data={"train": {"path": "unused"}, "max_seq_length": 512})
    assert total(MemoryModel(longer).inference()) > total(MemoryModel(one).inference())


def test_what_fits_stays_as_it_is() -> None:
    free = prepared(None)
    assert shrink_batches(free) is free
    large = prepared("64GiB")
    assert shrink_batches(large) is large


def test_under_any_budget_batches_shrink_to_it() -> None:
    asked = prepared("900MiB")
    ready = shrink_batches(asked)
    section = ready.config.finetune
    assert ready.config.evaluation.batch_size < asked.config.evaluation.batch_size
    assert ready.config.calibration.batch_size < asked.config.calibration.batch_size
    assert (
        section.per_device_train_batch_size
        < 8
        == (section.per_device_train_batch_size * section.gradient_accumulation_steps)
    )
    assert make_plan(STEPS, ready).worker_bytes["finetune"] <= 900 * 2**20
    roomy = prepared("64GiB")
    assert shrink_batches(roomy).config == roomy.config


def test_gpus_that_come_later_have_the_batches_worked_out_anew() -> None:
    asked = prepared("inference", calibration={"gpus_per_worker": "auto", "batch_size": 64})
    ready = dataclasses.replace(shrink_batches(asked), written_config=asked.config)
    on_gpus = ready.with_gpus(1)
    assert (on_gpus.config.calibration.gpus, ready.config.calibration.gpus) == (1, 0)
    assert on_gpus.config.calibration.batch_size == 64 > ready.config.calibration.batch_size
    again = shrink_batches(on_gpus)
    assert again.config.calibration.batch_size == ready.config.calibration.batch_size
    assert again.with_gpus(1) is again


def test_left_out_it_is_inference_and_reads_back_as_left_out() -> None:
    left_out, written = prepared(LEFT_OUT), prepared("inference")
    assert (left_out.config.memory_budget, left_out.config.budget_is_default) == ("inference", True)
    assert shrink_batches(left_out).config == shrink_batches(written).config
    assert not written.config.budget_is_default
    for config in (left_out.config, written.config, prepared(None).config, shrink_batches(left_out).config):
        again = parse_config(config.model_dump(mode="json"))
        assert (again.memory_budget, again.budget_is_default) == (config.memory_budget, config.budget_is_default)


def test_what_cannot_be_kept_to_is_refused_where_it_was_written_and_told_where_not(much_memory: None) -> None:
    wide = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=16384, num_hidden_layers=2, num_attention_heads=2
    )

    def of(budget: Any) -> Prepared:
        return prepared(budget, wide)

    with pytest.raises(
        ConfigError, match=r"needs gradients through the whole model, [\d.]+ GiB in a worker that may hold"
    ):
        check_holding(of("inference"))
    check_holding(of(LEFT_OUT))
    plan = make_plan(STEPS, shrink_batches(of(LEFT_OUT)))
    said = str(over_budget(plan.prepared.config, plan.worker_bytes))
    assert re.match(
        r"Inference of the original takes \d+ MiB, and a worker at its smallest batch takes more: .*gradients by [\d.]+ [GM]iB",
        said,
    )
    assert len(MemoryModel(of(LEFT_OUT)).gradient_plan().waves) == 1  # not a pass for every linear


def test_a_little_more_than_inference_is_told_as_more() -> None:
    """Of both rounded, a worker of 451 MiB was said to take more than 451 MiB."""
    values = {"run_dir": "r", "model": {"source": "m"}, "data": {"train": {"path": "a.jsonl"}}}
    said = str(over_budget(parse_config(values), {"inference": 451 * 2**20, "heal": 451 * 2**20 + 4096}))
    assert "takes more: heal by 4.00 KiB;" in said


def test_a_card_that_is_smaller_than_inference_bounds_what_was_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    section = {"gpus_per_worker": 1}
    large = prepared(LEFT_OUT, finetune=section, evaluation=section, ray={"num_gpus": 1})
    yardstick = total(MemoryModel(large).inference())
    monkeypatch.setattr(calibration_memory, "gpu_bytes", lambda: yardstick)
    ready = MemoryModel(shrink_batches(large))
    assert ready.budget_bytes("finetune") == ready.worker_bytes("evaluation") == pytest.approx(0.92 * yardstick)
    assert total(with_base(ready.finetuning_parts())) <= 0.92 * yardstick
    assert ready.worker_bytes("calibration") <= yardstick


ON_A_CARD: dict[str, Any] = {
    **{name: {"gpus_per_worker": 1} for name in ("calibration", "finetune", "evaluation")},
    "emulator": {"compression_ratio": 0.5},
    "ray": {"num_gpus": 1},
}


@pytest.mark.parametrize("budget", [LEFT_OUT, "8GiB", None])
def test_an_emulator_that_no_card_of_this_machine_holds_is_refused_before_anything_starts(
    budget: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = LlamaConfig(**{**MODEL.to_dict(), "hidden_size": 1152, "num_hidden_layers": 48})
    ready = prepared(budget, deep, **ON_A_CARD)
    weights = MemoryModel(ready).emulator
    monkeypatch.setattr(calibration_memory, "gpu_bytes", lambda: BASE_BYTES + 0.5 * weights)
    asked = shrink_batches(ready)
    check_holding(asked)  # its blocks pass through the card one by one
    plan = make_plan(STEPS, asked)
    assert 0.5 * weights < plan.host_bytes["finetune"] < plan.worker_bytes["finetune"]
    told = r"finetune is planned to hold [\d.]+ [MG]iB of a GPU of which \d+ MiB can be filled: lower its batch, .* same\.$"
    if budget is None:  # which tries all but what is too large by its weights alone
        check_stages(plan)
        monkeypatch.setattr(calibration_memory, "gpu_bytes", lambda: weights)
        told = r"finetune is planned to hold [\d.]+ MiB of weights of a GPU of which .* can be filled: lower emulator\..*0\.$"
    with pytest.raises(ConfigError, match=told):
        check_stages(plan)
    check_stages(plan, {"calibrate", "gradients", "factorize"})  # what a run up to then does


def test_a_card_that_holds_every_stage_or_is_not_known_refuses_none(monkeypatch: pytest.MonkeyPatch) -> None:
    joined = {**ON_A_CARD, "ray": {"address": "a-cluster:6379"}}
    unknown = make_plan(STEPS, shrink_batches(prepared(LEFT_OUT, **joined)))
    check_stages(unknown)
    held = max(stage.gpu_bytes for stage in unknown.stages)
    with pytest.raises(ConfigError, match="is planned to hold"):
        check_stages(make_plan(STEPS, dataclasses.replace(unknown.prepared, gpu_bytes=held)))
    check_stages(make_plan(STEPS, dataclasses.replace(unknown.prepared, gpu_bytes=held / 0.9)))
    monkeypatch.setattr(calibration_memory, "gpu_bytes", lambda: 1)
    on_cpus = {**ON_A_CARD, **{name: {"gpus_per_worker": 0} for name in ("calibration", "finetune", "evaluation")}}
    check_stages(make_plan(STEPS, shrink_batches(prepared(LEFT_OUT, **on_cpus))))


@pytest.mark.slow
def test_a_shipped_run_stays_within_inference_and_is_told_what_that_changed() -> None:
    pytest.importorskip("gguf")
    ready = shrink_batches(prepare(load_config(ROOT / "configs" / "low_rank.yaml")))
    assert ready.config.budget_is_default
    plan = make_plan(STEPS, ready, Speeds(1e10))
    assert max(plan.worker_bytes.values()) == plan.worker_bytes["inference"]
    assert over_budget(ready.config, plan.worker_bytes) is None
    finetune = ready.config.finetune
    assert finetune.gradient_accumulation_steps * finetune.per_device_train_batch_size == 8
    first, last = budget_lines(plan, make_plan(STEPS, without_budget(ready), Speeds(1e10)))
    assert finetune.gradient_checkpointing
    assert "training computes blocks again in the backward pass (gradient checkpointing)" in first
    assert "which inference of the original takes" in first
    assert last.startswith("With memory_budget: null a worker would hold up to 1.9")
    assert smaller_batches(without_budget(ready)) is None


@pytest.mark.slow
def test_the_quickstart_stays_within_inference_as_it_is_written() -> None:
    pytest.importorskip("gguf")
    ready = shrink_batches(prepare(load_config(ROOT / "configs" / "quickstart.yaml")))
    plan = make_plan(STEPS, ready, Speeds(1e10))
    assert ready.config.budget_is_default
    assert max(plan.worker_bytes.values()) == plan.worker_bytes["inference"]
    assert smaller_batches(ready) is None
    assert not ready.config.finetune.gradient_checkpointing


@pytest.mark.parametrize("budget", ["inferences", "1,5GiB", 0])
def test_what_is_no_budget_is_told_in_a_sentence(budget: Any) -> None:
    with pytest.raises(ConfigError, match=r"memory_budget[^\n]*\.$"):
        prepared(budget)
