"""Within a budget batches shrink: to what inference of the original takes, where that is asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from emloc_ray.config.reading import parse_config
from emloc_ray.errors import ConfigError
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.modeling.architecture import empty_model
from emloc_ray.modeling.loading import ModelSource
from emloc_ray.planning.batches import shrink_batches
from emloc_ray.planning.layout import make_layout
from emloc_ray.planning.memory import MemoryModel, total
from emloc_ray.planning.plan import make_plan
from emloc_ray.planning.prepared import Prepared
from emloc_ray.planning.skeleton import skeleton_of
from emloc_ray.stages.order import STEPS

MODEL = LlamaConfig(
    vocab_size=8000,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
SKELETON = skeleton_of(MODEL, empty_model(MODEL))


def prepared(budget: Any, **sections: Any) -> Prepared:
    values = {
        "run_dir": "unused",
        "memory_budget": budget,
        "model": {"source": "unused", "dtype": "float32"},
        "data": {"train": {"path": "unused"}, "max_seq_length": 256},
        "calibration": {"batch_size": 64},
        "emulator": {"allocation": "sensitivity", "objective": "predictions", "healing": {"steps": 4}},
        "finetune": {"per_device_train_batch_size": 8, "gradient_checkpointing": False, "exact_steps": 2},
        "evaluation": {"batch_size": 32},
        **sections,
    }
    config = parse_config(values)
    return Prepared(config, RunDirectory("unused"), ModelSource(Path()), MODEL, make_layout(config, SKELETON), {})


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


def test_under_any_budget_the_evaluation_s_batch_shrinks_alone() -> None:
    asked = prepared("900MiB")
    ready = shrink_batches(asked)
    assert ready.config.evaluation.batch_size < asked.config.evaluation.batch_size
    same = ready.config.model_copy(update={"evaluation": asked.config.evaluation})
    assert same == asked.config


def test_gpus_that_come_later_leave_the_batches_as_they_are() -> None:
    asked = prepared("inference", calibration={"gpus_per_worker": "auto", "batch_size": 64})
    ready = dataclasses.replace(shrink_batches(asked), as_written=asked.config)
    on_gpus = ready.with_gpus(1)
    assert (on_gpus.config.calibration.gpus, ready.config.calibration.gpus) == (1, 0)
    assert on_gpus.config.calibration.batch_size == ready.config.calibration.batch_size < 64
    assert on_gpus.with_gpus(1) is on_gpus


@pytest.mark.parametrize("budget", ["inferences", "1,5GiB", 0])
def test_what_is_no_budget_is_told_in_a_sentence(budget: Any) -> None:
    with pytest.raises(ConfigError, match=r"memory_budget[^\n]*\.$"):
        prepared(budget)
