"""A small census: a hybrid that works, a type that is refused in a sentence, a process that is ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ablations.tables import render
from census import row_here, row_of, write_results
from censusing.tiny_configs import tiny_config


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "outcome"), [("jamba", "works"), ("rwkv", "refused")])
def test_a_row_says_what_comes_of_a_type(model_type: str, outcome: str) -> None:
    row = row_here(model_type)
    assert row["baseline"]
    assert row["outcome"] == outcome
    if outcome == "refused":
        assert "set rescale_every to 0 in its config.json" in row["why"]


def test_a_type_that_takes_too_long_is_ended() -> None:
    row = row_of("llama", limit_s=0)
    assert row["outcome"] == "no baseline"
    assert "ended by a signal" in row["why"]


def test_a_tiny_config_keeps_one_layer_of_each_kind() -> None:
    config = tiny_config("qwen3_next")
    assert config.layer_types == ["linear_attention", "full_attention"]
    assert config.hidden_size == 64


def test_the_table_has_reasons(tmp_path: Path) -> None:
    works = {"kind": "causal-lm", "outcome": "works", "baseline": True, "seconds": 1.0}
    write_results(tmp_path / "census.json", {"llama": works, "x": {**works, "outcome": "refused", "why": "a | b"}})
    table = render(json.loads((tmp_path / "census.json").read_text()))
    assert "| 1 causal-lm | works | llama |" in table
    assert "| x | refused | a / b |" in table
