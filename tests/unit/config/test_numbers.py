"""Numbers of a config: true, which pydantic takes for 1, is none, and all are finite."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any

import pytest
from transformers import TrainingArguments

from emloc_ray.config.keys import config_keys
from emloc_ray.config.reading import check_config, put

NEEDED: dict[str, Any] = {"run_dir": "r", "model": {"source": "m"}, "data": {"train": {"path": "rows.jsonl"}}}


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("finetune", "exact_steps"),
        ("finetune", "max_steps"),
        ("finetune", "early_stopping_patience"),
        ("finetune", "gpus_per_worker"),
        ("emulator", "compression_ratio"),
        ("emulator", "rank_multiple"),
        ("calibration", "num_calibration_samples"),
    ],
)
def test_true_and_false_are_no_numbers(section: str, key: str) -> None:
    for value in (True, False):
        expected = f"{section}.{key}: {str(value).lower()} is no number: give one."
        assert check_config({**NEEDED, section: {key: value}})[1] == [expected]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"seed": True}, "seed: true is no number: give one."),
        ({"emulator": {"ratios": {"a": 0.5, "b": True}}}, "emulator.ratios: true is no number: give one."),
        ({"adapter": {"rank_pattern": {"a": True}}}, "adapter.rank_pattern: true is no number: give one."),
        ({"emulator": {"healing": {"steps": True}}}, "emulator.healing.steps: true is no number: give one."),
    ],
)
def test_nor_are_they_in_a_table_or_a_section_below(values: dict[str, Any], line: str) -> None:
    assert check_config({**NEEDED, **values})[1] == [line]


def test_where_true_is_meant_it_holds() -> None:
    values = {"finetune": {"gradient_checkpointing": False, "bf16": True}, "adapter": {"init_lora_weights": True}}
    config, lines = check_config({**NEEDED, **values})
    assert lines == []
    assert config is not None
    assert config.finetune.bf16 is True


def numbers() -> set[str]:
    """The dotted keys of numbers that need not be whole, those of transformers among them."""
    ours = {
        f"{name}.{key.name}"
        for section in config_keys()
        for name in section.name.split(", ")
        for key in section.keys
        if "number" in key.values.split(" | ")
    }
    types = typing.get_type_hints(TrainingArguments)
    passed = [field.name for field in dataclasses.fields(TrainingArguments) if "float" in str(types[field.name])]
    return ours | {f"finetune.{name}" for name in passed}


def refusals(key: str, value: Any) -> list[str]:
    """What is said of the key, set to the value."""
    values: dict[str, Any] = {**NEEDED}
    put(values, tuple(key.split(".")), value, key)
    return [line for line in check_config(values)[1] if line.startswith(key)]


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_every_number_is_finite(value: float) -> None:
    keys = numbers()
    assert {"correction.max_share", "finetune.num_train_epochs", "finetune.weight_decay"} < keys
    taken = {key for key in keys if not refusals(key, value)}
    assert taken == ({"finetune.max_grad_norm"} if value == math.inf else set())
    for table in ("emulator.ratios", "adapter.alpha_pattern", "data.train.path"):
        assert refusals(table, {"a": value}), table
    values = {"adapter": {"method": "vera", "d_initial": value}}
    assert "adapter.d_initial" in check_config({**NEEDED, **values})[1][0]
