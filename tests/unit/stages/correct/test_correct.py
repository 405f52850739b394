"""The correction stage's plain function: what it reads, what it writes, and how it chooses."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import TARGETS, attached, logits, trained
from layer_differences import layer_difference
from peft import PeftModel
from stage_artifacts import Artifacts, write_lora
from tiny import save_emulator
from transformers import AutoConfig, AutoModelForCausalLM

from emloc_ray.core.correction import Candidate
from emloc_ray.data.formats import Tokens
from emloc_ray.data.token_shards import TokenShards, shard_name, write_index, write_shard
from emloc_ray.io.formats.checkpoint import Checkpoint, read_shard
from emloc_ray.io.formats.grams import GramStore
from emloc_ray.io.formats.shards import write_tensors
from emloc_ray.modeling.adapter import load_adapter, save_trained_adapter
from emloc_ray.modeling.adapter_files import Adapter, write_adapter
from emloc_ray.modeling.architecture import block_linears, empty_model
from emloc_ray.modeling.loading import load_model
from emloc_ray.modeling.scoring import losses_by_row, score_rows
from emloc_ray.stages.correct import scoring
from emloc_ray.stages.correct.adapted import see_adapted_inputs
from emloc_ray.stages.correct.correct import candidates, correct_adapter
from emloc_ray.stages.correct.job import CorrectionJob, module_groups
from emloc_ray.stages.correct.modules import Opened, see_differences

KEYS = ("method", "clamp", "strength")


@pytest.fixture
def job(artifacts: Artifacts, tmp_path: Path) -> CorrectionJob:
    """A correction of the adapter for an emulator of rank 8, whose last linear is dense."""
    emulator = save_emulator(artifacts.model_dir, tmp_path / "emulator")
    return artifacts.correction(emulator, tmp_path, Candidate("covariance", None))


def update(adapter: Adapter, name: str) -> torch.Tensor:
    lora = adapter.module(name)
    return lora.scale * lora.lora_b.double() @ lora.lora_a.double()


def test_without_a_difference_modules_are_read_block_by_block(job: CorrectionJob) -> None:
    alike = replace(job, calibration_dir=None, emulator_dir=job.model_dir)
    groups = module_groups(alike, Adapter(job.adapter_dir).names)
    assert [{spec.block for spec in group.specs} for group in groups] == [{"model.layers.0"}, {"model.layers.1"}]
    correct_adapter(alike)
    before, after = Adapter(job.adapter_dir), Adapter(job.out_dir)
    assert before.names == after.names
    for name in before.names:
        torch.testing.assert_close(update(after, name), update(before, name), rtol=1e-4, atol=1e-7)


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


@pytest.mark.parametrize("counted", ["all", "completion"])
def test_adapted_fits_what_the_emulator_with_the_adapter_gave_for_what_it_read(
    job: CorrectionJob, counted: str
) -> None:
    """Row by row, so without padding: each linear's ridge regression of ``Δ x`` on ``s A x``, in the adapter's own basis."""
    correct_adapter(replace(job, candidates=(Candidate("adapted", None, 1.0),), calibration_tokens=counted))
    before, after = Adapter(job.adapter_dir), Adapter(job.out_dir)
    model = load_adapter(load_model(job.emulator_dir), job.adapter_dir)
    read: dict[str, list[torch.Tensor]] = {name: [] for name in before.names}
    for name, tokens in read.items():
        model.base_model.model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, tokens=tokens: tokens.append(args[0][0].detach().double())
        )
    shards = TokenShards(job.tokens_dir)
    rows = [shards.row(position) for position in range(len(shards))]
    for row in rows:
        model(input_ids=torch.tensor([row.input_ids]))
    counts = torch.cat([torch.tensor(row.completion_mask) | (counted == "all") for row in rows])
    specs = {spec.name: spec for spec in job.specs}
    for name in before.names:
        lora, delta = (
            before.module(name),
            layer_difference(specs[name], Checkpoint(job.model_dir), Checkpoint(job.emulator_dir)),
        )
        x, basis = torch.cat(read[name])[counts], torch.linalg.qr(lora.lora_a.double().T).Q
        seen, wanted = x @ basis, torch.zeros(len(x), len(lora.lora_b)) if delta is None else x @ delta.double().T
        k = seen.shape[1]
        ridge = 0.1 * seen.square().sum() / k * torch.eye(k)
        taken = torch.linalg.solve(seen.T @ seen + ridge, seen.T @ wanted.double()).T @ basis.T
        expected = update(before, name) - taken
        torch.testing.assert_close(update(after, name), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_a_linear_that_no_token_reached_stays_as_trained(job: CorrectionJob) -> None:
    adapted = replace(job, candidates=(Candidate("adapted", None, 1.0),))
    name = Adapter(job.adapter_dir).names[0]
    see_adapted_inputs(adapted)
    parts = {entry.name: entry.read_rows() for entry in read_shard(adapted.adapted_path).entries}
    write_tensors(adapted.adapted_path, {key: value for key, value in parts.items() if not key.startswith(f"{name}/")})
    plan = module_groups(adapted, Adapter(job.adapter_dir).names)
    modules = {module.lora.name: module for group in plan for module in see_differences(Opened(adapted), group)}
    for other, module in modules.items():
        changes = module.applied(adapted.candidates[0], 1e-4).abs().max() > 0
        assert bool(changes) == (other != name and module.seen is not None)


def test_the_shortfall_told_is_that_of_the_written_adapter(job: CorrectionJob) -> None:
    result = correct_adapter(replace(job, candidates=(Candidate("covariance", 3.0, 0.5),)))
    before, after = Adapter(job.adapter_dir), Adapter(job.out_dir)
    assert job.calibration_dir is not None
    original, emulator, grams = Checkpoint(job.model_dir), Checkpoint(job.emulator_dir), GramStore(job.calibration_dir)
    specs = {spec.name: spec for spec in job.specs}
    assert len(result["modules"]) == len(before.names) - 1
    for name, told in result["modules"].items():
        delta, gram = layer_difference(specs[name], original, emulator), grams.read(name).double()
        taken = update(before, name) - update(after, name)  # s C A_c
        for key, rest in (("before", delta.double()), ("after", delta.double() - taken)):
            assert told[key] == pytest.approx(math.sqrt(torch.trace(rest @ gram @ rest.T)), rel=1e-3)
        assert told["after"] < told["before"]


def test_auto_chooses_by_rows_and_plugs_in_what_it_writes(job: CorrectionJob, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = tuple(candidates("auto", 3.0, 1.0))
    served: list[dict[str, torch.Tensor]] = []

    def losses(model: Any, rows: Any, **kwargs: Any) -> Any:
        """The stronger the less, on every row."""
        layers = {n: model.base_model.model.get_submodule(n) for n in Adapter(job.adapter_dir).names}
        served.append({n: m.lora_B["default"].weight @ m.lora_A["default"].weight for n, m in layers.items()})
        found = losses_by_row(model, rows, **kwargs)
        return found._replace(sums=found.sums - {3: 20, 4: 50}.get(len(served), 0) * found.counts)

    monkeypatch.setattr(scoring, "losses_by_row", losses)
    with torch.no_grad():
        result = correct_adapter(replace(job, candidates=tried))
    told = result["candidates"]
    assert [(c["method"], c["clamp"], c["strength"]) for c in told] == [(c.method, c.clamp, c.strength) for c in tried]
    chosen = told[-1]
    assert (result["method"], result["clamp"], result["strength"]) == tuple(chosen[k] for k in KEYS)
    assert chosen["gain"] > chosen["standard_error"]
    assert chosen["loss"] == min(c["loss"] for c in told)
    assert result["selection_rows"] == len(TokenShards(job.selection_dir))
    assert result["scored_tokens"] == len(told) * result["selection_tokens"]
    written = Adapter(job.out_dir)
    for name, product in served[3].items():
        lora = written.module(name)
        torch.testing.assert_close(lora.lora_b @ lora.lora_a, product)


@pytest.mark.parametrize("budget", [0, 100, 400, 1000])
def test_auto_reads_no_more_than_it_may(job: CorrectionJob, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0

    def losses(model: Any, rows: Any, **kwargs: Any) -> Any:
        nonlocal read
        read += sum(map(len, rows))
        return losses_by_row(model, rows, **kwargs)

    monkeypatch.setattr(scoring, "losses_by_row", losses)
    tried = tuple(candidates("auto", 3.0, 1.0))
    result = correct_adapter(replace(job, candidates=tried, max_tokens=budget))
    assert read <= budget
    if budget == 0:
        assert result["method"] == "none"
        assert "correction.max_share" in result["note"]
        assert result["candidates"] == [{"method": "none", "clamp": 3.0, "strength": 1.0, "loss": None}]
    else:
        assert read == result["scored_tokens"] > 0
    again = correct_adapter(replace(job, candidates=tried, max_tokens=budget))
    assert again == result


def test_one_selection_row_and_rows_of_one_token_say_nothing(job: CorrectionJob, tmp_path: Path) -> None:
    tried = tuple(candidates("auto", 3.0, 1.0))
    for lengths in ([9], [1, 1, 1]):
        tokens = tmp_path / f"rows{len(lengths)}"
        write_shard(tokens / shard_name(0), [Tokens([5] * n, [at > 0 for at in range(n)]) for n in lengths])
        write_index(tokens, [len(lengths)], {"tokens": sum(lengths)})
        result = correct_adapter(replace(job, candidates=tried, selection_dir=tokens))
        assert result["method"] == "none"
        json.dumps(result, allow_nan=False)


@pytest.fixture
def method_job(job: CorrectionJob, tmp_path: Path) -> Callable[[str], CorrectionJob]:
    """The same correction, of an adapter of another method as trained on that emulator."""

    def make(case: str) -> CorrectionJob:
        trained(tmp_path / case, job.emulator_dir, case, "llama")
        return replace(job, adapter_dir=tmp_path / case)

    return make


def served(directory: Path, model_dir: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), directory).eval()


def dense_update(directory: Path, spec: Any) -> torch.Tensor:
    return Adapter(directory).update(spec).rows(0, spec.out_features).double()


@pytest.mark.parametrize("case", ["loha", "lokr", "lokr decomposed", "vera"])
def test_another_method_s_update_is_corrected_in_lora_s_form(
    case: str, method_job: Callable[[str], CorrectionJob]
) -> None:
    """On the update's row space original plus adapter does what emulator plus adapter did; elsewhere nothing changed."""
    job = replace(method_job(case), candidates=(Candidate("projection", None, 1.0),), update_tolerance=0.0)
    result = correct_adapter(job)
    original, emulator = Checkpoint(job.model_dir), Checkpoint(job.emulator_dir)
    assert result["lora_form"]["largest_lack"] < 1e-6
    plain = served(job.out_dir, job.model_dir)
    for spec in job.specs:
        if spec.name not in Adapter(job.adapter_dir).names:
            continue
        trained_update, delta = dense_update(job.adapter_dir, spec), layer_difference(spec, original, emulator)
        expected = trained_update
        if delta is not None:
            _, s, vh = torch.linalg.svd(trained_update, full_matrices=False)
            space = vh[: int((s > 1e-5 * s[0]).sum())]
            expected = trained_update - delta.double() @ space.T @ space
        torch.testing.assert_close(dense_update(job.out_dir, spec), expected, rtol=1e-3, atol=1e-4)
        layer = plain.base_model.model.get_submodule(spec.name)
        assert layer.scaling["default"] == 1
        torch.testing.assert_close(layer.get_delta_weight("default").double(), expected, rtol=1e-3, atol=1e-4)


def test_what_an_update_of_full_rank_loses_is_within_the_tolerance(method_job: Callable[[str], CorrectionJob]) -> None:
    ranks = []
    for tolerance in (1e-3, 0.3):
        job = replace(method_job("lokr"), update_tolerance=tolerance, candidates=(Candidate("projection"),))
        result = correct_adapter(job)["lora_form"]
        assert result["largest_lack"] <= tolerance
        ranks.append(result["mean_rank"])
    assert ranks[1] < ranks[0]


@pytest.mark.parametrize("case", ["loha", "lokr", "vera", "ia3", "prefix", "prompt"])
def test_none_is_the_adapter_as_trained_byte_for_byte(case: str, method_job: Callable[[str], CorrectionJob]) -> None:
    job = replace(method_job(case), candidates=(Candidate("none"),))
    result = correct_adapter(job)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (job.out_dir / name).read_bytes() == (job.adapter_dir / name).read_bytes()
    assert result["method"] == "none"
    assert ("as_trained" in result) == (case in ("ia3", "prefix", "prompt"))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["lora", "lokr"])
def test_weights_that_come_and_go_come_once_for_all_candidates(
    case: str, method_job: Callable[[str], CorrectionJob], block_reads: Counter[str]
) -> None:
    job = replace(method_job(case), candidates=tuple(candidates("auto", 3.0, 1.0)))
    expected = correct_adapter(job)["candidates"]
    found = correct_adapter(replace(job, hold="offloaded"))["candidates"]
    batches = math.ceil(len(TokenShards(job.selection_dir)) / job.rows_on_original)
    assert set(block_reads.values()) == {batches + 1}
    assert [[one[key] for key in KEYS] for one in found] == [[one[key] for key in KEYS] for one in expected]
    assert [one["loss"] for one in found] == pytest.approx([one["loss"] for one in expected], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dora", "lokr", "vera"])
def test_auto_scores_each_candidate_as_it_would_serve(case: str, method_job: Callable[[str], CorrectionJob]) -> None:
    tried = (Candidate("none"), Candidate("projection"), Candidate("covariance", 3.0, 0.5))
    job = replace(method_job(case), update_tolerance=0.0)
    told = [one for one in correct_adapter(replace(job, candidates=tried))["candidates"] if not one["interpolated"]]
    shards = TokenShards(job.selection_dir)
    rows = [shards.row(at) for at in range(len(shards))]
    for found in told:
        candidate = Candidate(*(found[key] for key in KEYS))
        correct_adapter(replace(job, candidates=(candidate,)))
        model = served(job.out_dir, job.model_dir)
        score = score_rows(model, rows, batch_size=8, loss_on="completion", pad_token_id=0, name="served")
        assert found["loss"] == pytest.approx(score.metrics()["loss"], rel=1e-5)
    assert len({found["loss"] for found in told}) == len(told) >= 3


def test_an_untrained_dora_changes_nothing_on_the_original(job: CorrectionJob, tmp_path: Path) -> None:
    """With its magnitudes as trained, which are the lengths of the emulator's rows, it would."""
    model = attached(job.emulator_dir, "dora", "llama")
    save_trained_adapter(model, tmp_path / "fresh", targets=TARGETS["llama"], base_model="x")
    bare = logits(AutoModelForCausalLM.from_pretrained(job.model_dir))
    as_trained = logits(served(tmp_path / "fresh", job.model_dir))
    assert float((as_trained - bare).abs().max()) > 0.1
    for candidate in (Candidate("none"), Candidate("projection", None)):
        correct_adapter(replace(job, adapter_dir=tmp_path / "fresh", candidates=(candidate,)))
        torch.testing.assert_close(logits(served(job.out_dir, job.model_dir)), bare, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["none", "projection"])
def test_dora_s_gains_are_those_trained(method: Any, method_job: Callable[[str], CorrectionJob]) -> None:
    """What PEFT serves, ``m' / ‖W + ΔW_c‖ (W + ΔW_c)``, is the trained gain ``m / ‖W_E + ΔW‖`` times the corrected sum; so
    on the directions that the adapter reads it is what was trained."""
    job = replace(method_job("dora"), candidates=(Candidate(method, None),))
    correct_adapter(job)
    before, after = Adapter(job.adapter_dir), Adapter(job.out_dir)
    merged = served(job.out_dir, job.model_dir).merge_and_unload()
    original, emulator = Checkpoint(job.model_dir), Checkpoint(job.emulator_dir)
    for spec in job.specs:
        if spec.name not in before.names:
            continue
        weight, delta = original.read(spec.weight_name).double(), layer_difference(spec, original, emulator)
        on_emulator = weight - (0 if delta is None else delta.double()) + update(before, spec.name)
        gain = (before.magnitude(spec.name).double() / on_emulator.norm(dim=1)).unsqueeze(1)
        found = merged.get_submodule(spec.name).weight.detach().double()
        torch.testing.assert_close(found, gain * (weight + update(after, spec.name)), rtol=1e-4, atol=1e-5)
        if method == "projection":
            x = before.module(spec.name).lora_a.double().T
            torch.testing.assert_close(found @ x, gain * on_emulator @ x, rtol=1e-3, atol=1e-4)


def test_without_grams_covariance_is_left_out() -> None:
    assert candidates("projection", None, 0.7) == [Candidate("projection", None, 0.7)]


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


def test_rows_are_read_from_all_over_a_split(
    job: CorrectionJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files may be sorted by what their rows are of."""
    write_shard(tmp_path / shard_name(0), [Tokens([number] * 4, [True] * 4) for number in range(256)])
    write_index(tmp_path, [256], {"tokens": 1024})
    tried = tuple(candidates("auto", 3.0, 1.0))
    chosen = scoring.selection_rows(replace(job, candidates=tried, selection_dir=tmp_path, max_tokens=1024))
    read: list[int] = []
    monkeypatch.setattr(
        "emloc_ray.stages.correct.adapted.batches_by_length",
        lambda rows, *others: read.extend(row.input_ids[0] for row in rows) or [],
    )
    see_adapted_inputs(replace(job, candidates=tried, tokens_dir=tmp_path))
    for numbers in ([row.input_ids[0] for row in chosen], read):
        assert len(numbers) == len(set(numbers)) == 64
        assert min(numbers) < 32
        assert max(numbers) >= 224
