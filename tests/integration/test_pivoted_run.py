"""Runs whose factors are stored pivoted: from end to end by allocated ranks, and healed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_runs import FinishedRun, redone, run_values
from test_allocated_run import divergence
from transformers import AutoModelForCausalLM

from emloc_ray.config.reading import parse_config
from emloc_ray.core.ranks import factor_parameters
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.modeling.emulator import PivotedLinear
from emloc_ray.planning.prepared import prepare
from emloc_ray.stages.factorize.spend import read_ranks

pytestmark = pytest.mark.deep


def ranks_of(directory: Path) -> dict[str, int]:
    """Those of the layers that load."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    return {name: m.down.out_features for name, m in model.named_modules() if isinstance(m, PivotedLinear)}


def test_the_budget_is_that_of_as_many_numbers(pivoted_run: FinishedRun) -> None:
    layout = prepare(parse_config(pivoted_run.values)).layout
    ranks, emulator = read_ranks(pivoted_run.root / "allocation"), pivoted_run.root / "emulator"
    used = sum(factor_parameters(s.out_features, s.in_features, ranks[s.name], "pivoted") for s in layout.specs)
    left = pivoted_run.metrics["allocation"]["left"]
    assert used + left == layout.parameters_factorized <= layout.parameters_targeted / 2
    told = pivoted_run.metrics["emulator"]
    assert told["storage"] == "pivoted"
    assert told["parameters_kept"] == pytest.approx(used / layout.parameters_targeted)
    index = json.loads((emulator / "model.safetensors.index.json").read_text())["metadata"]
    assert index["total_parameters"] == told["parameters"]
    assert told["bytes"] == index["total_size"] == Checkpoint(emulator).num_bytes
    assert ranks_of(emulator) == {name: rank for name, rank in ranks.items() if rank is not None}
    assert "factors stored pivoted" in (pivoted_run.root / "report.html").read_text()


def test_the_higher_ranks_keep_more_of_the_predictions(pivoted_run: FinishedRun, tmp_path: Path) -> None:
    copied = pivoted_run.copy(tmp_path)
    values = copied.changed(emulator={"storage": "factors"})
    assert redone(values)[0] == "allocate"
    run_values(values, until="factorize")
    pivoted, plain = (divergence(run, run.root / "emulator") for run in (pivoted_run, copied))
    assert pivoted < plain


def test_all_that_follows_takes_them(pivoted_run: FinishedRun) -> None:
    evaluation = pivoted_run.metrics["evaluation"]
    assert evaluation["merged"]["loss"] == pytest.approx(evaluation["corrected"]["loss"], abs=1e-3)
    assert evaluation["corrected"]["loss"] < evaluation["original"]["loss"]
    merged = {entry.name for entry in Checkpoint(pivoted_run.root / "merged")}
    assert merged == {entry.name for entry in Checkpoint(pivoted_run.model_dir)}


def test_healed_they_have_the_ranks_that_the_budget_leaves(pivoted_run: FinishedRun, tmp_path: Path) -> None:
    copied = pivoted_run.copy(tmp_path)
    run_values(copied.changed(emulator={"healing": {"steps": 4, "r": 4}}), until="heal")
    healed, whole = copied.root / "emulator_healed", pivoted_run.root / "emulator"
    assert ranks_of(healed) == ranks_of(whole)
    assert sum(entry.num_bytes for entry in Checkpoint(healed)) == Checkpoint(whole).num_bytes
    assert divergence(copied, healed) < 1e-2
