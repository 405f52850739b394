"""Numbers of a config: true, which pydantic takes for 1, is none."""

from __future__ import annotations

from typing import Any

import pytest

from emloc_ray.config.reading import check_config

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
