"""The correction stage's plain function: what it reads, what it writes, and how it chooses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_artifacts import Artifacts, write_lora
from tiny import save_emulator
from transformers import AutoConfig

from emloc_ray.io.checkpoint import Checkpoint
from emloc_ray.io.grams import GramStore
from emloc_ray.modeling.adapter import Adapter, write_adapter
from emloc_ray.modeling.architecture import block_linears, empty_model
from emloc_ray.stages import correct as module
from emloc_ray.stages.correct import Candidate, CorrectionJob, candidates, correct_adapter, layer_difference


@pytest.fixture
def job(artifacts: Artifacts, tmp_path: Path) -> CorrectionJob:
    """A correction of the adapter for an emulator of rank 8, whose last linear is dense."""
    return CorrectionJob(
        model_dir=artifacts.model_dir,
        emulator_dir=save_emulator(artifacts.model_dir, tmp_path / "emulator"),
        calibration_dir=artifacts.calibration_dir,
        adapter_dir=artifacts.adapter_dir,
        out_dir=tmp_path / "corrected",
        selection_dir=artifacts.tokens_dir,
        specs=artifacts.specs,
        candidates=(Candidate("covariance", None, 1.0),),
    )


def update(adapter: Adapter, name: str) -> torch.Tensor:
    lora = adapter.module(name)
    return lora.scale * lora.lora_b.double() @ lora.lora_a.double()


def test_none_leaves_the_adapter_as_it_was_trained(job: CorrectionJob) -> None:
    result = correct_adapter(replace(job, candidates=(Candidate("none"),)))
    before, after = Adapter(job.adapter_dir), Adapter(job.out_dir)
    assert before.config == after.config
    for one, other in zip(map(before.module, before.names), map(after.module, after.names), strict=True):
        assert (one.name, one.scale) == (other.name, other.scale)
        assert torch.equal(one.lora_a, other.lora_a)
        assert torch.equal(one.lora_b, other.lora_b)
    assert result["method"] == "none"


def test_projection_serves_on_the_original_what_was_trained_on_the_emulator(job: CorrectionJob) -> None:
    correct_adapter(replace(job, candidates=(Candidate("projection", None, 1.0),)))
    before, after = Adapter(job.adapter_dir), Adapter(job.out_dir)
    original, emulator = Checkpoint(job.model_dir), Checkpoint(job.emulator_dir)
    specs = {spec.name: spec for spec in job.specs}
    assert before.names == after.names
    for name in before.names:
        delta = layer_difference(specs[name], original, emulator)
        if delta is None:  # dense in the emulator: nothing to take out
            assert name.endswith("1.mlp.down_proj")
            assert torch.equal(update(before, name), update(after, name))
            continue
        # On the directions x that the adapter reads: (W + s B_c A_c) x = (W_E + s B A) x.
        x = before.module(name).lora_a.double().T
        served = (original.read(specs[name].weight_name).double() + update(after, name)) @ x
        trained = (original.read(specs[name].weight_name).double() - delta.double() + update(before, name)) @ x
        torch.testing.assert_close(served, trained, rtol=1e-4, atol=1e-5)


def test_the_shortfall_told_is_that_of_the_written_adapter(job: CorrectionJob) -> None:
    result = correct_adapter(replace(job, candidates=(Candidate("covariance", 3.0, 0.5),)))
    before, after = Adapter(job.adapter_dir), Adapter(job.out_dir)
    original, emulator, grams = Checkpoint(job.model_dir), Checkpoint(job.emulator_dir), GramStore(job.calibration_dir)
    specs = {spec.name: spec for spec in job.specs}
    assert len(result["modules"]) == len(before.names) - 1
    for name, told in result["modules"].items():
        delta, gram = layer_difference(specs[name], original, emulator), grams.read(name).double()
        taken = update(before, name) - update(after, name)  # s C A_c
        for key, rest in (("before", delta.double()), ("after", delta.double() - taken)):
            assert told[key] == pytest.approx(math.sqrt(torch.trace(rest @ gram @ rest.T)), rel=1e-3)
        assert told["after"] < told["before"]


def test_auto_tries_every_candidate_and_keeps_the_best(job: CorrectionJob, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = tuple(candidates("auto", 3.0, 1.0, has_grams=True))
    steps: list[tuple[int, int]] = []
    result = correct_adapter(replace(job, candidates=tried), lambda done, total: steps.append((done, total)))
    losses = [candidate["loss"] for candidate in result["candidates"]]
    assert len(set(losses)) > 1
    best = losses.index(min(losses))
    assert (result["method"], result["clamp"], result["strength"]) == (
        tried[best].method,
        tried[best].clamp,
        tried[best].strength,
    )
    assert result["selection_tokens"] > 0
    assert steps[-1][0] == steps[-1][1] == 4 + len(tried)
    # What is plugged in to be scored is what is written in the end.
    found: dict[str, Any] = {}

    def score(model: Any, *args: Any, **kwargs: Any) -> Any:
        layers = {n: model.base_model.model.get_submodule(n) for n in Adapter(job.adapter_dir).names}
        found[kwargs["name"]] = {
            n: (m.lora_B["default"].weight @ m.lora_A["default"].weight).clone() for n, m in layers.items()
        }
        return type("Score", (), {"metrics": lambda self: {"loss": 1.0 - 0.1 * len(found)}})()

    monkeypatch.setattr(module, "score_rows", score)
    with torch.no_grad():
        correct_adapter(replace(job, candidates=(Candidate("none"), Candidate("projection", None))))
    written = Adapter(job.out_dir)
    for name, product in found["corrected (projection)"].items():
        lora = written.module(name)
        torch.testing.assert_close(lora.lora_b @ lora.lora_a, product)


def test_without_grams_covariance_is_left_out() -> None:
    assert {c.method for c in candidates("auto", 3.0, 1.0, has_grams=False)} == {"none", "projection"}
    assert candidates("projection", None, 0.7, has_grams=True) == [Candidate("projection", None, 0.7)]


def test_conv1d_weights_are_turned_before_they_are_compared(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    model_dir = tiny_model_dir("gpt2")
    emulator_dir = save_emulator(model_dir, tmp_path / "emulator")
    spec = next(s for s in block_linears(empty_model(AutoConfig.from_pretrained(model_dir))) if "c_fc" in s.name)
    original, emulator = Checkpoint(model_dir), Checkpoint(emulator_dir)
    delta = layer_difference(spec, original, emulator)
    assert delta is not None
    assert delta.shape == (spec.out_features, spec.in_features)
    # The emulator is the truncated SVD: what it lacks is small beside a random weight, and orthogonal to what it has.
    product = emulator.read(f"{spec.name}.up.weight") @ emulator.read(f"{spec.name}.down.weight")
    assert float((delta * product).sum()) == pytest.approx(0, abs=1e-3)


def test_r_stays_though_a_direction_was_dropped(artifacts: Artifacts, job: CorrectionJob, tmp_path: Path) -> None:
    specs = tuple(spec for spec in artifacts.specs if spec.name.endswith("0.self_attn.q_proj"))
    write_lora(tmp_path / "thin", specs)
    thin = Adapter(tmp_path / "thin")
    lora = thin.module(specs[0].name)
    lora.lora_a[1] = lora.lora_a[0]  # rank 3 of r = 4
    write_adapter(tmp_path / "thin", thin.config, [lora])
    correct_adapter(replace(job, adapter_dir=tmp_path / "thin"))
    corrected = Adapter(job.out_dir).module(specs[0].name)
    assert corrected.lora_a.shape == (4, 64)
    assert int(torch.linalg.matrix_rank(corrected.lora_a)) == 3
