"""Every family through every stage; emloc_ray/README.md names them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_weights import dense_weight
from families import FAMILIES, cases
from peft import PeftModel
from plain_stages import gather
from small_runs import FinishedRun
from transformers import AutoConfig
from vlms import VLMS

import emloc_ray  # noqa: F401
from emloc_ray.config.reading import parse_config
from emloc_ray.data.processors import ImageInputs
from emloc_ray.data.token_shards import TokenShards, collate
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.io.formats.grams import GramStore
from emloc_ray.modeling.adapter_files import Adapter
from emloc_ray.modeling.architecture import auto_class
from emloc_ray.modeling.inputs import model_call
from emloc_ray.modeling.loading import load_model
from emloc_ray.planning.prepared import prepare
from emloc_ray.stages.calibrate.stage import calibration_job
from emloc_ray.stages.context import Context


@pytest.fixture(scope="module", params=cases([*FAMILIES, *VLMS]))
def run(request: pytest.FixtureRequest, family_run: Callable[[str], FinishedRun]) -> FinishedRun:
    """A family's run."""
    return family_run(request.param)


def images_of(run: FinishedRun) -> ImageInputs:
    return ImageInputs(run.model_dir)


def opened(directory: Path) -> tuple[Any, dict[str, Any]]:
    """A model directory as its owner opens it, with what transformers says of its weights."""
    config = AutoConfig.from_pretrained(directory)
    auto = auto_class(config.original() if hasattr(config, "original") else config)
    model, said = auto.from_pretrained(directory, output_loading_info=True)
    return model.eval(), said


def batch(run: FinishedRun, split: str = "eval") -> dict[str, torch.Tensor]:
    shards = TokenShards(run.root / "data" / "tokens" / split)
    return collate([shards.row(position) for position in range(4)], 0, images_of(run))


@torch.no_grad()
def logits(model: Any, run: FinishedRun) -> torch.Tensor:
    call = model_call(model.config, batch(run))
    return model(**call.inputs).logits[call.predicting]


@pytest.fixture(scope="module")
@torch.no_grad()
def exact(run: FinishedRun) -> dict[str, tuple[torch.Tensor, int]]:
    """Of each linear the sum of ``x xᵀ`` over every token, each row run alone, in float64, and how many they are."""
    model = load_model(run.model_dir).double()
    groups = GramStore(run.root / "calibration").index["groups"]
    names = [name for names in groups.values() for name in names]
    found = {}
    for name in names:
        features = dense_weight(model.get_submodule(name)).shape[1]
        found[name] = torch.zeros(features, features, dtype=torch.float64), 0

    def reading(name: str) -> Any:
        def hook(module: Any, args: Any) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            gram, count = found[name]
            found[name] = gram + x.T @ x, count + len(x)

        return hook

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(reading(name))
    shards = TokenShards(run.root / "data" / "tokens" / "calibration")
    for position in range(len(shards)):
        model(**model_call(model.config, collate([shards.row(position)], 0, images_of(run), multiple=1)).inputs)
    return found


def test_calibrate(run: FinishedRun, exact: dict[str, tuple[torch.Tensor, int]]) -> None:
    """One sum stands for all that read the same tensor; an expert that the router never chooses has none."""
    store = GramStore(run.root / "calibration")
    for name, (expected, count) in exact.items():
        assert count == store.num_tokens(name)
        scale = float(expected.diagonal().max())
        torch.testing.assert_close(store.read(name).double(), expected, rtol=1e-3, atol=1e-5 * scale)


def test_by_blocks(run: FinishedRun, tmp_path: Path) -> None:
    """Block by block, the Grams are those of the whole model."""
    job = calibration_job(Context(prepare(parse_config(run.values)), run.model_dir))
    ours = gather(dataclasses.replace(job, hold="block_by_block"), tmp_path)
    whole = GramStore(run.root / "calibration")
    assert ours.index["groups"] == whole.index["groups"]
    for name in whole.index["groups"]:
        assert ours.num_tokens(name) == whole.num_tokens(name)
        scale = float(whole.read(name).diagonal().max())
        torch.testing.assert_close(ours.read(name), whole.read(name), rtol=1e-4, atol=1e-5 * scale)


def test_factorize(run: FinishedRun, exact: dict[str, tuple[torch.Tensor, int]]) -> None:
    """The emulator opens by the original's Auto class, and each layer's error is that of the best rank there is.

    Of the exact sum, to 1 %: that in float32 has eigenvalues of rounding, some larger than the damping.
    """
    emulator, said = opened(run.root / "emulator")
    original = load_model(run.model_dir)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    assert not said["mismatched_keys"]
    config = AutoConfig.from_pretrained(run.root / "emulator")
    assert config.ranks
    for name, rank in config.ranks.items():
        weight, made = dense_weight(original.get_submodule(name)), dense_weight(emulator.get_submodule(name))
        gram = exact[name][0].clone()
        gram.diagonal().add_(1e-6 * gram.diagonal().mean())
        values, vectors = torch.linalg.eigh(gram)
        root = vectors * values.clamp_min(0).sqrt() @ vectors.T
        best = torch.linalg.svdvals(weight.double() @ root)[rank:].square().sum().sqrt()
        error = torch.linalg.norm((weight - made).double() @ root)
        torch.testing.assert_close(error, best, rtol=1e-2, atol=1e-6 * float(torch.linalg.norm(weight)))


def test_finetune(run: FinishedRun) -> None:
    """Trained on the emulator, the adapter lowers its loss there."""
    evaluation = run.metrics["evaluation"]
    assert evaluation["emulator_adapter"]["loss"] < evaluation["emulator"]["loss"] - 0.05


@torch.no_grad()
def test_correct(run: FinishedRun) -> None:
    """Every module's update is the trained one less the closed form, worked out here densely and in float64.

    With ``Aᵀ = Q S Vᵀ``, ``B' = B V S`` and ``G`` damped: ``C = Δ G Q (Qᵀ G Q)⁻¹ / s``, each column clamped to λ times that
    of ``B'``, and ``B_c A_c = (B' − C) Qᵀ``.
    """
    original, emulator = load_model(run.model_dir), opened(run.root / "emulator")[0]
    grams = GramStore(run.root / "calibration")
    trained, corrected = Adapter(run.root / "adapter_emulator"), Adapter(run.root / "adapter")
    assert trained.names == corrected.names
    settings, clamp, clamped, corrections = run.values["adapter"], run.values["correction"]["clamp"], 0, []
    scale = settings["lora_alpha"] / settings["r"]
    for name in trained.names:
        before, after = trained.module(name), corrected.module(name)
        weights = (dense_weight(model.get_submodule(name)).double() for model in (original, emulator))
        delta = next(weights) - next(weights)
        q, s, vh = torch.linalg.svd(before.lora_a.double().T, full_matrices=False)
        b, gram = before.lora_b.double() @ vh.T * s, grams.read(name).double()
        size = (q.T @ gram @ q).diagonal().mean()
        damped = gram + (1e-4 * size if size > 0 else 1) * torch.eye(len(gram), dtype=gram.dtype)
        c = delta @ damped @ q @ torch.linalg.inv(q.T @ damped @ q) / scale
        ratio = c.abs().mean(dim=0) / b.abs().mean(dim=0).clamp_min(1e-30)
        c *= torch.where(ratio > clamp, clamp / ratio, 1) * b.any(dim=0)
        expected = (b - c) @ q.T
        found = after.lora_b.double() @ after.lora_a.double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(b.abs().max()))
        clamped += int((ratio > clamp).sum())
        corrections.append(float(c.norm() / b.norm()) if b.any() else 0.0)
    assert max(corrections) > 0.02  # far above what is tolerated: a sign, or a scale left out, shows
    assert 0 < clamped < len(corrections) * settings["r"]


def test_merge(run: FinishedRun) -> None:
    """The merged model is a plain checkpoint: the original's names and shapes, byte for byte where nothing was adapted."""
    _, said = opened(run.root / "merged")
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    merged, original = Checkpoint(run.root / "merged"), Checkpoint(run.model_dir)
    assert merged.entries.keys() == original.entries.keys()
    changed = {name for name in original.entries if not torch.equal(merged.read(name), original.read(name))}
    prepared = prepare(parse_config(run.values))
    adapter, adapted = Adapter(run.root / "adapter"), set(prepared.layout.adapted)
    assert set(adapter.names) == adapted
    moved = {name for name in adapted if adapter.module(name).lora_b.any()}
    # LLaVA reads its tower before the last block, and a router may choose an expert for no token.
    assert all("vision_tower" in name or ".experts." in name for name in adapted - moved)
    specs = Context(prepared, run.model_dir).specs()
    assert changed == {rows.name for spec in specs if spec.name in moved for rows in spec.weight_rows}


def test_parity(run: FinishedRun) -> None:
    """The merged model gives what the adapter on the original gives."""
    merged, _ = opened(run.root / "merged")
    original, _ = opened(run.model_dir)
    before = logits(original, run)
    adapted = logits(PeftModel.from_pretrained(original, run.root / "adapter").eval(), run)
    difference, scale = (logits(merged, run) - adapted).abs().max(), adapted.abs().max()
    assert float(difference) <= 1e-4 * float(scale)
    assert float((adapted - before).abs().max()) > 1e-3 * float(scale)
    evaluation = run.metrics["evaluation"]
    assert evaluation["merged"]["loss"] == pytest.approx(evaluation["corrected"]["loss"], abs=1e-3)
