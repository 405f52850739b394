"""A run whose linears take whatever loses least for one budget of bytes: floats, factors, integers, and both; end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from layer_differences import assert_covariance_corrects
from small_runs import FinishedRun, redone, run_values
from transformers import AutoModelForCausalLM

from emloc_ray.config.reading import parse_config
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.io.formats.grams import GramStore
from emloc_ray.modeling.adapter_files import Adapter
from emloc_ray.modeling.emulator_weights import emulator_weight
from emloc_ray.planning.prepared import prepare
from emloc_ray.stages.factorize.spend import read_forms


@pytest.fixture(scope="session")
def budget_run(make_run: Callable[..., FinishedRun], task_file: Path) -> FinishedRun:
    return make_run(
        task_file,
        "qwen2",  # biases
        "bfloat16",
        emulator={
            "compression_ratio": None,
            "budget": "3.5 bits",
            "objective": "predictions",
            "storage": "pivoted",
            "group_size": 16,
        },
        correction={"method": "covariance", "clamp": None},
    )


def test_the_linears_take_several_forms_within_the_budget(budget_run: FinishedRun) -> None:
    forms, told = read_forms(budget_run.root / "allocation"), budget_run.metrics["emulator"]
    layout = prepare(parse_config(budget_run.values)).layout
    assert set(forms) == set(layout.compressed)
    assert sum(told["forms"].values()) == len(forms)
    assert len(told["forms"]) > 1
    weights = layout.parameters_targeted
    assert told["bits_per_weight"] == pytest.approx(8 * layout.with_forms(forms).stored_bytes(2) / weights)
    assert told["bits_per_weight"] <= 3.5
    emulator = Checkpoint(budget_run.root / "emulator")
    assert told["bytes"] == emulator.num_bytes
    rest = (layout.num_parameters - weights) * 2
    biases = sum(entry.num_bytes for entry in emulator if entry.name.endswith("bias"))
    # Biases are counted with the rest; an exponent takes 2 bytes here, and is counted with 4.
    assert emulator.num_bytes - rest <= 3.5 * weights / 8
    assert biases < rest


def test_it_loads_as_it_was_made_and_trains(budget_run: FinishedRun) -> None:
    emulator = AutoModelForCausalLM.from_pretrained(budget_run.root / "emulator")
    assert {type(emulator.get_submodule(name)).__name__ for name in read_forms(budget_run.root / "allocation")} > {
        "IntegerLinear"
    }
    losses = {variant: scores["loss"] for variant, scores in budget_run.metrics["evaluation"].items()}
    assert losses["emulator_adapter"] < losses["emulator"]
    assert losses["corrected"] < losses["original"]
    assert losses["merged"] == pytest.approx(losses["corrected"], abs=1e-2)


def test_correction_takes_out_the_difference_to_what_is_stored(budget_run: FinishedRun) -> None:
    run = budget_run
    original, emulator = Checkpoint(run.model_dir), Checkpoint(run.root / "emulator")
    trained, corrected = Adapter(run.root / "adapter_emulator"), Adapter(run.root / "adapter")
    grams = GramStore(run.root / "calibration")
    for name in trained.names:
        weight = original.read(f"{name}.weight").double()
        held = emulator_weight(emulator, name, weight.shape[1])
        if held is None:  # dense: nothing to correct
            continue
        modules = trained.module(name), corrected.module(name)
        assert_covariance_corrects(weight, held.rows().double(), *modules, grams.read(name), name)


def test_the_page_tells_of_it_and_a_changed_budget_is_spent_anew(budget_run: FinishedRun) -> None:
    page = (budget_run.root / "report.html").read_text()
    assert "through an emulator of <b>3.5 bits</b>" in page
    assert "bits a weight</b>" in page
    assert redone(budget_run.values) == []
    changed = budget_run.changed(emulator={"budget": "2.6 bits"})
    assert redone(changed)[:2] == ["allocate", "factorize"]
    manifest = json.loads((budget_run.root / "manifest.json").read_text())
    assert "compression_ratio" not in manifest["config"]["emulator"]


def test_factors_that_healing_grows_are_rounded_after_it(budget_run: FinishedRun, tmp_path: Path) -> None:
    run = budget_run.copy(tmp_path)
    values = run.changed(emulator={"budget": "2.6 bits", "healing": {"steps": 4, "r": 1}})
    reporter = run_values(values)
    assert reporter.started[:4] == ["allocate", "factorize", "heal", "finetune"]
    forms, metrics = read_forms(run.root / "allocation"), json.loads((run.root / "metrics.json").read_text())
    before, after = (Checkpoint(run.root / place) for place in ("emulator", "emulator_healed"))
    grown = [name for name, form in forms.items() if form.bits is not None and (form.rank or 0) > 1]
    assert grown
    for name in grown:
        assert before.entry(f"{name}.down.weight").shape[0] == forms[name].rank - 1
        assert f"{name}.down.weight" not in after
        assert f"{name}.down.int{forms[name].bits}" in after
    whole = [name for name, form in forms.items() if form.bits is not None and form.rank is None]
    assert all(f"{name}.int{forms[name].bits}" in before for name in whole if not forms[name].residual_rank)
    assert metrics["emulator"]["bytes"] == after.num_bytes
    assert metrics["emulator"]["bits_per_weight"] <= 2.6
    assert metrics["evaluation"]["emulator_adapter"]["loss"] < metrics["evaluation"]["emulator"]["loss"]
    trained, corrected = Adapter(run.root / "adapter_emulator"), Adapter(run.root / "adapter")
    for name in set(trained.names) & set(grown):
        weight = Checkpoint(run.model_dir).read(f"{name}.weight").double()
        held = emulator_weight(after, name, weight.shape[1])
        assert held is not None
        gram = GramStore(run.root / "calibration").read(name)
        modules = trained.module(name), corrected.module(name)
        assert_covariance_corrects(weight, held.rows().double(), *modules, gram, name)
