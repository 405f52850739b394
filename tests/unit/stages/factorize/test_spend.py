"""Forms under one budget as the stages' plain functions find and make them: bytes within it, losses near those expected."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_artifacts import Artifacts
from test_allocate import DAMPING, allocation_job, damped, gradients_dir, stored

from emloc_ray.core.forms import Form, FormSizes
from emloc_ray.core.gram import Gram
from emloc_ray.core.integer_forms import IntegerForms
from emloc_ray.core.ranks import factor_parameters, possible_ranks
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.io.formats.grams import GramStore, StoredGram, write_gram_shard
from emloc_ray.modeling.emulator_weights import emulator_weight
from emloc_ray.stages.factorize.allocate import AllocationJob, Spending, group_losses
from emloc_ray.stages.factorize.factorize import factorize_group
from emloc_ray.stages.factorize.job import FactorizationJob
from emloc_ray.stages.factorize.spend import FORMS, RANKS, Offer, read_forms, read_ranks, spend

__all__ = ["gradients_dir"]
FORM_SIZES = FormSizes(4, "pivoted", 16)


def budget_job(artifacts: Artifacts, sums: Path, bits: float) -> AllocationJob:
    budget = int(bits * sum(spec.num_parameters for spec in artifacts.specs) / 8)
    even = {spec.name: Form(bits=2) for spec in artifacts.specs}
    job = allocation_job(artifacts, sums)
    return replace(job, storage="pivoted", spending=Spending(budget, FORM_SIZES, even))


@pytest.fixture(scope="module")
def losses(artifacts: Artifacts, gradients_dir: Path) -> dict[str, torch.Tensor]:
    job, grams = budget_job(artifacts, gradients_dir, 3), GramStore(artifacts.calibration_dir)
    found: dict[str, torch.Tensor] = {}
    for group in artifacts.groups:
        names = [spec.name for spec in group]
        found |= group_losses(job, group, grams.stored(names[0]), stored(gradients_dir, names))
    return found


def test_an_expert_of_twice_the_tokens_loses_twice_as_much_in_every_form(
    artifacts: Artifacts, gradients_dir: Path, losses: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Its sums are over its own tokens: a linear stands for one that is sent so many, and one that is sent twice as many."""
    job, group = budget_job(artifacts, gradients_dir, 3), artifacts.groups[0]
    names, grams, sums = [spec.name for spec in group], GramStore(artifacts.calibration_dir), GramStore(gradients_dir)
    doubled = {f"of {name}": Gram(2 * sums.read(name), 2 * sums.num_tokens(name)) for name in names}
    doubled["inputs"] = Gram(2 * grams.read(names[0]), 2 * grams.num_tokens(names[0]))
    write_gram_shard(tmp_path / "doubled", doubled)
    gradients = {name: StoredGram(tmp_path / "doubled", f"of {name}") for name in names}
    found = group_losses(job, group, StoredGram(tmp_path / "doubled", "inputs"), gradients)
    for name in names:
        torch.testing.assert_close(found[name], 2 * losses[name], rtol=1e-4, atol=1e-6 * float(losses[name].max()))


def spent(job: AllocationJob, artifacts: Artifacts, losses: dict[str, torch.Tensor], directory: Path) -> dict[str, Any]:
    assert job.spending is not None
    offers = {}
    for spec in artifacts.specs:
        forms = job.forms(spec)
        offers[spec.name] = Offer(forms, [job.cost(spec, form) for form in forms], losses[spec.name], job.even(spec))
    return spend(offers, job.spending.budget, directory / FORMS)


@pytest.mark.parametrize("bits", [1.5, 2.6, 4.3, 9.0])
def test_the_forms_fit_and_lose_no_more_than_even_ones(
    artifacts: Artifacts, gradients_dir: Path, losses: dict[str, torch.Tensor], tmp_path: Path, bits: float
) -> None:
    job = budget_job(artifacts, gradients_dir, bits)
    result = spent(job, artifacts, losses, tmp_path)
    forms = read_forms(tmp_path)
    used = sum(FORM_SIZES.num_bytes(s.out_features, s.in_features, forms[s.name]) for s in artifacts.specs)
    assert used + result["left"] == result["budget"]
    assert result["left"] >= 0
    assert sum(result["forms"].values()) == len(artifacts.specs)
    if bits > 2.6:
        assert result["loss"] < result["even_loss"]
    layers = json.loads((tmp_path / FORMS).read_text())["layers"]
    assert sum(layer["loss"] for layer in layers.values()) == pytest.approx(result["loss"])
    assert result["gap"] < 0.05


def test_a_linear_of_which_the_data_says_nothing_keeps_the_even_form(
    artifacts: Artifacts, gradients_dir: Path, losses: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    silent = artifacts.specs[0].name
    job = budget_job(artifacts, gradients_dir, 4)
    without = {**losses, silent: torch.zeros_like(losses[silent])}
    result = spent(job, artifacts, without, tmp_path)
    assert read_forms(tmp_path)[silent] == Form(bits=2)
    assert result["num_kept_even"] == 1
    assert result["left"] >= 0


def test_it_takes_the_least_where_the_even_form_leaves_no_room_for_the_others(
    artifacts: Artifacts, gradients_dir: Path, losses: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    job, silent = budget_job(artifacts, gradients_dir, 4), artifacts.specs[0].name
    assert job.spending is not None
    least = sum(min(job.cost(spec, form) for form in job.forms(spec)) for spec in artifacts.specs)
    without = {**losses, silent: torch.zeros_like(losses[silent])}
    result = spent(replace(job, spending=replace(job.spending, budget=least)), artifacts, without, tmp_path)
    assert result["left"] == 0
    assert read_forms(tmp_path)[silent] != Form(bits=2)


def test_a_linear_that_matters_is_left_dense_and_one_that_does_not_pays(tmp_path: Path) -> None:
    gains = {"flat": torch.ones(32), "steep": torch.tensor([100.0, *[1e-6] * 31])}
    ranks = possible_ranks(32, 32, 9)
    for dense, expected in (([None], {"flat": None, "steep": 2}), ([], {"flat": 15, "steep": 3})):
        forms = [Form(rank) for rank in (*ranks, *dense)]
        offers = {
            name: Offer(
                forms,
                [factor_parameters(32, 32, form.rank) for form in forms],
                torch.stack([each[32 if form.rank is None else form.rank :].sum() for form in forms]),
                Form(9),
            )
            for name, each in gains.items()
        }
        result = spend(offers, 18 * 64, tmp_path / RANKS)
        assert read_ranks(tmp_path) == expected
        assert result["left"] == 0
        assert result["loss"] < result["even_loss"]


def test_each_form_is_made_and_loses_about_what_is_expected(
    artifacts: Artifacts, gradients_dir: Path, losses: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    group = next(group for group in artifacts.groups if len(group) == 2)  # gate and up
    job = budget_job(artifacts, gradients_dir, 3)
    grams, sums = GramStore(artifacts.calibration_dir), GramStore(gradients_dir)
    of_each = {group[0].name: Form(rank=16), group[1].name: Form(bits=2, residual_rank=8)}
    made = FactorizationJob(
        artifacts.model_dir,
        tmp_path,
        (group,),
        {group[0].name: 16},
        gradients_dir=gradients_dir,
        gradient_dampening_frac=DAMPING,
        storage="pivoted",
        integers=IntegerForms({group[1].name: 2}, {group[1].name: 8}, 16),
        gradients_for_residuals=True,
    )
    (tmp_path / "spectra").mkdir()
    file = tmp_path / "model.safetensors"
    factorize_group(made, group, grams.stored(group[0].name), file)
    emulator = Checkpoint(tmp_path)
    for spec in group:
        weight = Checkpoint(artifacts.model_dir).read(spec.weight_name).double()
        held = emulator_weight(emulator, spec.name, spec.in_features)
        assert held is not None
        difference = weight - held.rows().double()
        gram = damped(grams.read(spec.name), 1e-6)
        lost = float((difference @ gram @ difference.T @ damped(sums.read(spec.name), DAMPING)).trace())
        lost /= 2 * grams.num_tokens(spec.name)
        expected = float(losses[spec.name][job.forms(spec).index(of_each[spec.name])])
        assert expected == pytest.approx(lost, rel=0.02 if spec is group[0] else 0.5)
