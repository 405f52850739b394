"""Experts that were sent few tokens or none: their Grams from all tokens, else the plain SVD, and never NaN."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from stage_artifacts import write_tokens
from tiny import save_lopsided
from transformers import AutoConfig

from emloc_ray.core.correction import canonical_form, correction, difference, shortfall
from emloc_ray.core.stored_weight import StoredWeight
from emloc_ray.data.token_shards import TokenShards
from emloc_ray.io.formats.checkpoint import Checkpoint, read_shard
from emloc_ray.io.formats.grams import GramStore, gram_counts, reduce_slots, write_gram_index, write_gram_shard
from emloc_ray.modeling.architecture import LinearSpec, block_linears, empty_model, trace_inputs
from emloc_ray.modeling.stored_names import stored_parameters, stored_specs
from emloc_ray.stages.calibrate.job import CalibrationJob
from emloc_ray.stages.calibrate.resident_slot import ResidentSlot
from emloc_ray.stages.calibrate.stage import thin_experts
from emloc_ray.stages.calibrate.streamed_slot import StreamedSlot, grams_file
from emloc_ray.stages.calibrate.thin_experts import Gathered, describe, gather_for_thin_experts, thin_names
from emloc_ray.stages.factorize.factorize import factorize_group
from emloc_ray.stages.factorize.job import FactorizationJob
from emloc_ray.stages.factorize.layer_reports import read_reports

SHARDS, BLOCKS = 4, 2


@dataclass
class Scene:
    """A lopsided Mixtral and tokens for it."""

    model_dir: Path
    job: CalibrationJob
    specs: tuple[LinearSpec, ...]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    root = tmp_path_factory.mktemp("lopsided")
    model_dir = save_lopsided(root / "model")
    model = empty_model(AutoConfig.from_pretrained(model_dir))
    specs = tuple(block_linears(model))
    groups = tuple(tuple(group) for group in trace_inputs(model, specs).groups)
    job = CalibrationJob(
        model_dir,
        write_tokens(root / "tokens", 20, 5),
        groups,
        (0, SHARDS),
        batch_size=3,
        experts=tuple((spec.name, spec.in_features) for spec in specs if spec.routed_share is not None),
        min_expert_tokens=1,
    )
    return Scene(model_dir, job, specs)


def resident(job: CalibrationJob, folder: Path) -> Gathered:
    slot = ResidentSlot(job, folder / "slot.safetensors", 1)
    for number in range(SHARDS):
        slot.accumulate(number)
    slot.commit()
    return written(job, folder, [folder / "slot.safetensors"])


def streamed(job: CalibrationJob, folder: Path) -> Gathered:
    slot = StreamedSlot(replace(job, hold="block_by_block"), folder, 0, 1, BLOCKS, 1)
    for block in range(BLOCKS):
        slot.accumulate(block)
    files = [grams_file(folder, block, BLOCKS) for block in range(BLOCKS)]
    counts = [gram_counts(file) for file in files]
    return (
        {name: count for each in counts for name, count in each.items()},
        {name: file.name for file, each in zip(files, counts, strict=True) for name in each},
    )


def written(job: CalibrationJob, folder: Path, slots: list[Path], file: str = "grams.safetensors") -> Gathered:
    names = [group[0] for group in job.groups]
    grams = reduce_slots(slots, names)
    write_gram_shard(folder / file, grams)
    return {name: gram.num_tokens for name, gram in grams.items()}, dict.fromkeys(names, file)


def calibrated(scene: Scene, out_dir: Path, minimum: int, gather: type | object = resident) -> tuple[GramStore, dict]:
    """Both passes; the store, and what the stage says of experts."""
    assert callable(gather)
    job = replace(scene.job, min_expert_tokens=minimum)
    (counts, weight_map), routed = gather_for_thin_experts(job, out_dir, gather(job, out_dir), gather)
    orders = {name: order for name, order in job.experts if name not in weight_map}
    write_gram_index(out_dir, job.groups, weight_map, counts, routed_tokens=routed, orders=orders)
    return GramStore(out_dir), describe(job, counts, routed)["experts"]


@pytest.mark.parametrize("gather", [resident, streamed])
def test_an_expert_that_no_token_is_sent_to_has_the_gram_of_all_tokens(
    scene: Scene, gather: object, tmp_path: Path
) -> None:
    store, told = calibrated(scene, tmp_path, 1, gather)
    total = max(store.index["num_tokens"].values())
    for block in range(BLOCKS):
        experts = [f"model.layers.{block}.mlp.experts.{index}.gate_up" for index in range(4)]
        assert [store.num_tokens(experts[3]), store.index["routed_tokens"][experts[3]]] == [total, 0]
        # Every token goes to just one of the others: together they read what the idle one was made to read.
        assert sum(map(store.num_tokens, experts[:3])) == total
        torch.testing.assert_close(store.read(experts[3]), sum(map(store.read, experts[:3])), rtol=1e-4, atol=1e-4)
        assert float(store.read(experts[3].replace("gate_up", "down")).diagonal().min()) > 0
    assert told["number"] == 8
    assert told["never_routed"] == 2
    assert (told["plain_svd"], told["reread_tokens"]) == (0, total)


def test_experts_alone_are_read_again_where_no_linear_reads_all_tokens(scene: Scene, tmp_path: Path) -> None:
    experts = {name for name, _ in scene.job.experts}
    only = replace(scene, job=replace(scene.job, groups=tuple(g for g in scene.job.groups if g[0] in experts)))
    tokens = sum(len(row) for number in range(SHARDS) for row in TokenShards(only.job.tokens_dir).shard(number))
    store, told = calibrated(only, tmp_path, tokens)
    assert {store.num_tokens(name) for name in experts} == {tokens}
    assert (told["too_few"], told["plain_svd"], told["reread_tokens"]) == (8, 0, tokens)


def test_with_too_few_tokens_in_all_the_plain_svd_is_left(scene: Scene, tmp_path: Path) -> None:
    store, told = calibrated(scene, tmp_path, 10_000)
    assert not (tmp_path / "reread").exists()  # no second pass over too few tokens, no identity in a file
    name = "model.layers.1.mlp.experts.3.down"
    assert store.num_tokens(name) == 0
    assert torch.equal(store.read(name), torch.eye(len(store.read(name))))
    assert (told["too_few"], told["plain_svd"], told["number"]) == (8, 8, 8)
    assert store.num_tokens("model.layers.1.self_attn.o_proj") > 0

    checkpoint = Checkpoint(scene.model_dir)
    stored = stored_parameters(
        empty_model(AutoConfig.from_pretrained(scene.model_dir)), (entry.name for entry in checkpoint)
    )
    [spec] = stored_specs([spec for spec in scene.specs if spec.name == name], stored, checkpoint)
    job = FactorizationJob(scene.model_dir, tmp_path / "emulator", ((spec,),), {name: 5})
    factorize_group(job, [spec], store.stored(name), tmp_path / "emulator" / "factors.safetensors")
    made = {
        entry.name: entry.read_rows() for entry in read_shard(tmp_path / "emulator" / "factors.safetensors").entries
    }
    weight = spec.read_weight(checkpoint)
    u, s, vh = torch.linalg.svd(weight)
    best = u[:, :5] * s[:5] @ vh[:5]
    torch.testing.assert_close(made[f"{name}.up.weight"] @ made[f"{name}.down.weight"], best, rtol=1e-4, atol=1e-6)
    [report] = read_reports(tmp_path / "emulator" / "factors.safetensors")
    assert report.num_tokens == 0
    assert report.relative_error == pytest.approx(float(s[5:].norm() / s.norm()), rel=1e-4)


def test_where_none_is_thin_nothing_is_done_again(scene: Scene, tmp_path: Path) -> None:
    store, told = calibrated(scene, tmp_path, 0)
    assert not (tmp_path / "reread").exists()
    assert "routed_tokens" not in store.index
    assert (told["too_few"], told["never_routed"]) == (0, 2)
    assert thin_experts({"experts": told}) is None
    assert thin_names(scene.job, {}) == []
    assert describe(replace(scene.job, experts=()), {}, {}) == {}


def test_a_remark_says_in_numbers_what_was_done() -> None:
    told = {
        "number": 8,
        "min_expert_tokens": 256,
        "fewest_routed_tokens": 0,
        "too_few": 3,
        "never_routed": 1,
        "plain_svd": 1,
        "reread_tokens": 900,
    }
    assert thin_experts({"experts": told}) == (
        "The router sent 3 of 8 experts fewer than 256 tokens (1 none, the fewest 0): 2 have their statistics from 900"
        " tokens run through them and 1 are cut by a plain SVD, for want of tokens."
    )


@pytest.mark.parametrize("method", ["projection", "covariance"])
def test_a_gram_of_no_tokens_corrects_without_nan(method: str) -> None:
    torch.manual_seed(0)
    delta, form = torch.randn(12, 8), canonical_form(torch.randn(3, 8), torch.randn(12, 3))
    seen = difference(delta, StoredWeight(torch.zeros(12, 8)), form.q, torch.zeros_like(form.q))
    found = correction(seen, method, 2.0)  # type: ignore[arg-type]
    torch.testing.assert_close(found, delta.double() @ form.q / 2.0, rtol=1e-6, atol=1e-8)
    assert shortfall(seen, found, 2.0) == 0.0


def test_an_adapter_of_an_untrained_expert_corrects_to_itself() -> None:
    form = canonical_form(torch.zeros(3, 8), torch.zeros(12, 3))
    assert form.q.shape == (8, 0)
    seen = difference(torch.randn(12, 8), StoredWeight(torch.zeros(12, 8)), form.q, form.q)
    assert correction(seen, "covariance", 2.0).shape == (12, 0)
