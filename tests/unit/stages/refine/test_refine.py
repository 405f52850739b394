"""Refinement without Ray: each block comes closer to the original's, and a try that was killed is continued."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from integer_emulators import save_integer_emulator
from other_vlms import PADDING, row_with_images
from plain_runs import plain_run
from ray.exceptions import WorkerCrashedError
from small_runs import make_values
from stage_artifacts import Artifacts, tensors_in, write_tokens
from tiny import save_emulator, save_model
from vlms import build_vlm

from emloc_ray.core.refinement import token_error
from emloc_ray.data.formats import Tokens
from emloc_ray.data.processors import ImageInputs
from emloc_ray.data.token_shards import TokenShards, shard_name, write_index, write_shard
from emloc_ray.modeling.architecture import block_names
from emloc_ray.modeling.integer_linear import IntegerLinear
from emloc_ray.modeling.loading import load_model
from emloc_ray.stages.correct.stage import correction_job
from emloc_ray.stages.finetune.session import own_environment
from emloc_ray.stages.ray.losses import MAX_RESTARTS, Losses
from emloc_ray.stages.ray.tasks import Resources
from emloc_ray.stages.refine import refine as refining
from emloc_ray.stages.refine.refine import RefinementJob, Refiner, fits, refine_blocks, write_refined, written_blocks


def job_of(model_dir: Path, emulator: Path, tokens: Path, root: Path, **changes: Any) -> RefinementJob:
    made = RefinementJob(model_dir, emulator, tokens, root / "work", root / "refined", 40, 0.01, batch_size=4)
    return replace(made, **changes)


@pytest.fixture(scope="module")
def refined(artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> RefinementJob:
    """A tiny Llama's emulator, refined; read it, do not write to it."""
    root = tmp_path_factory.mktemp("refined")
    job = job_of(artifacts.model_dir, save_emulator(artifacts.model_dir, root / "emulator"), artifacts.tokens_dir, root)
    refine_blocks(job)
    return job


def distance(model_dir: Path, emulator: Path, tokens: Path) -> float:
    """Between the hidden states that both end in, squared, over all rows."""
    shards, models, found = TokenShards(tokens), [load_model(d) for d in (model_dir, emulator)], 0.0
    with torch.no_grad():
        for row in range(len(shards)):
            ids = torch.tensor([shards.row(row).input_ids])
            ours, theirs = (model.get_decoder()(input_ids=ids).last_hidden_state for model in models)
            found += float((ours - theirs).square().sum())
    return found


@pytest.mark.slow
def test_each_block_comes_closer_at_the_same_bytes(refined: RefinementJob) -> None:
    found = fits(refined)
    assert list(found) == ["block-00000", "block-00001"]
    assert all(fit.is_better for fit in found.values())
    before = distance(refined.model_dir, refined.emulator_dir, refined.tokens_dir)
    assert distance(refined.model_dir, refined.out_dir, refined.tokens_dir) < 0.9 * before
    one, other = tensors_in(refined.emulator_dir), tensors_in(refined.out_dir)
    assert {name: (t.shape, t.dtype) for name, t in one.items()} == {n: (t.shape, t.dtype) for n, t in other.items()}
    changed = {name for name, tensor in one.items() if not torch.equal(tensor, other[name])}
    assert changed == {name for name in one if name.endswith((".up.weight", ".down.weight"))}
    assert not (refined.work_dir / "hidden").exists()


def test_its_error_is_that_of_the_blocks_on_the_hidden_states_of_both(refined: RefinementJob, tmp_path: Path) -> None:
    """The first block's, by both models' own forward passes."""
    found = fits(refined)["block-00000"]
    models = [load_model(directory) for directory in (refined.model_dir, refined.emulator_dir, refined.out_dir)]
    refiner = Refiner(replace(refined, work_dir=tmp_path))
    rows = [row for number in refiner.held_out for row in refiner.batches[number]]
    sums, tokens = [0.0, 0.0], 0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([refiner.shards.row(row).input_ids])
            states = [model(input_ids=ids, output_hidden_states=True).hidden_states[1] for model in models]
            errors = [(states[0] - ours).norm(dim=-1) / states[0].norm(dim=-1) for ours in states[1:]]
            sums = [total + float(error.square().sum()) for total, error in zip(sums, errors, strict=True)]
            tokens += ids.numel()
    assert [total / tokens for total in sums] == pytest.approx([found.before, found.after], rel=1e-4)
    fitted = {row for step in refiner.fitted for number in step for row in refiner.batches[number]}
    assert fitted | {*rows} == {*range(len(refiner.shards))}
    assert not fitted & {*rows}


@pytest.mark.slow
@pytest.mark.parametrize("keeps_hidden_states", [True, False])
def test_a_killed_try_is_continued(refined: RefinementJob, tmp_path: Path, keeps_hidden_states: bool) -> None:
    job = replace(refined, work_dir=tmp_path / "work", out_dir=tmp_path / "out")
    Refiner(job).take(0)
    assert written_blocks(job) == [job.block_file(0)]  # of all that lies there
    written = job.block_file(0).stat().st_ino
    if not keeps_hidden_states:  # of a node that is gone
        shutil.rmtree(job.work_dir / "hidden")
    assert Refiner(job).begin() == int(keeps_hidden_states)
    refine_blocks(job)
    assert job.block_file(0).stat().st_ino == written
    for name, tensor in tensors_in(refined.out_dir).items():
        torch.testing.assert_close(tensors_in(job.out_dir)[name], tensor, rtol=0, atol=1e-6)


def test_a_block_of_one_model_is_held_at_a_time(
    refined: RefinementJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While rows pass the original's, while the emulator's is fitted, and while rows pass that."""
    refiner = Refiner(replace(refined, work_dir=tmp_path))
    order, seen = refiner.flow.order, list[tuple[str, set[tuple[str, int]]]]()

    def note(when: str) -> None:
        held = {
            (model, position)
            for model, replay in refiner.replays.items()
            for position, block in enumerate(order)
            if any(not weight.is_meta for weight in replay.model.get_submodule(block).parameters())
        }
        seen.append((when, held))

    def noted(when: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            note(when)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(refining, "fit_block", noted("fit", refining.fit_block))
    for name, replay in refiner.replays.items():
        monkeypatch.setattr(replay, "forward", noted(name, replay.forward))
    for position in (0, 1):
        seen.clear()
        refiner.take(position)
        assert {when for when, _ in seen} == {"original", "fit", "emulator"}
        for when, held in seen:
            assert held == {("original" if when == "original" else "emulator", position)}


def test_a_try_that_fitted_all_blocks_takes_none_again(refined: RefinementJob, tmp_path: Path) -> None:
    job = replace(refined, out_dir=tmp_path / "out")
    assert len(written_blocks(job)) == 2
    assert not (job.work_dir / "hidden").exists()
    assert Refiner(job).begin() == 2
    refine_blocks(job)
    assert tensors_in(job.out_dir).keys() == tensors_in(refined.out_dir).keys()


def test_blocks_that_are_done_between_losses_are_progress(
    refined: RefinementJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, losing = replace(refined, work_dir=tmp_path / "work"), [0, 0, 0, 1, 1, 1]

    def run_tasks(function: Any, shared: Any, pieces: list[Any], resources: Resources, losses: Losses, _: Any) -> None:
        for position in losing:
            shutil.copy(refined.block_file(0), job.block_file(position))
            losses.record_lost_worker(pieces[0][0], WorkerCrashedError())

    job.work_dir.mkdir()
    monkeypatch.setattr(refining, "run_tasks", run_tasks)
    assert len(losing) > MAX_RESTARTS
    assert refining.refine(job, 2, Resources())["blocks"] == 2


@pytest.mark.slow
def test_a_try_with_other_batches_does_not_take_their_hidden_states(refined: RefinementJob, tmp_path: Path) -> None:
    job = replace(refined, work_dir=tmp_path / "work", out_dir=tmp_path / "out")
    Refiner(job).take(0)
    smaller = replace(job, rows_at_once=2)
    assert Refiner(smaller).begin() == 0
    refine_blocks(smaller)
    first = "model.layers.0.mlp.up_proj.up.weight"
    assert torch.equal(tensors_in(job.out_dir)[first], tensors_in(refined.out_dir)[first])  # refined once


@pytest.mark.slow
def test_fewer_rows_at_once_change_nothing_but_in_rounding(refined: RefinementJob, tmp_path: Path) -> None:
    job = replace(refined, work_dir=tmp_path / "work", out_dir=tmp_path / "out", rows_at_once=1)
    refine_blocks(job)
    for name, tensor in tensors_in(refined.out_dir).items():
        torch.testing.assert_close(tensors_in(job.out_dir)[name], tensor, rtol=0, atol=1e-4)
    assert fits(job)["block-00001"].after == pytest.approx(fits(refined)["block-00001"].after, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "storage", "dtype"), [("gpt2", "factors", "float32"), ("qwen2_moe", "pivoted", "bfloat16")]
)
def test_other_layers_are_refined_too(family: str, storage: Any, dtype: str, tmp_path: Path) -> None:
    model_dir = save_model(tmp_path / "model", family, dtype=dtype)
    emulator = save_emulator(model_dir, tmp_path / "emulator", storage=storage)
    job = job_of(model_dir, emulator, write_tokens(tmp_path / "tokens", 12, 5), tmp_path, steps=10)
    refine_blocks(job)
    assert all(fit.after < fit.before for fit in fits(job).values())
    assert load_model(job.out_dir).dtype == getattr(torch, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("qwen2_moe", "bfloat16")])
def test_integers_are_refined_where_they_are(family: str, dtype: str, tmp_path: Path) -> None:
    """Factors, whole weights and both, in 2 to 8 bits: other integers, scales and zero points, in the same bytes."""
    model_dir = save_model(tmp_path / "model", family, dtype=dtype)
    emulator, _ = save_integer_emulator(model_dir, tmp_path / "emulator")
    job = job_of(model_dir, emulator, write_tokens(tmp_path / "tokens", 12, 5), tmp_path, steps=20)
    refine_blocks(job)
    assert any(fit.is_better for fit in fits(job).values())
    one, other = tensors_in(emulator), tensors_in(job.out_dir)
    assert {name: (t.shape, t.dtype) for name, t in one.items()} == {n: (t.shape, t.dtype) for n, t in other.items()}
    changed = {name.rsplit(".", 1)[-1] for name, tensor in one.items() if not torch.equal(tensor, other[name])}
    assert {"scales", "zeros"} < changed <= {"int2", "int3", "int4", "int8", "scales", "zeros"}
    assert load_model(job.out_dir).dtype == getattr(torch, dtype)


def test_one_block_s_integers_are_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, register = list[bool](), IntegerLinear.register_buffer

    def note(linear: IntegerLinear, name: str, tensor: torch.Tensor) -> None:
        register(linear, name, tensor)
        made.append(linear.get_buffer(name).is_meta)

    monkeypatch.setattr(IntegerLinear, "register_buffer", note)
    model_dir = save_model(tmp_path / "model")
    emulator, _ = save_integer_emulator(model_dir, tmp_path / "emulator")
    replay = Refiner(job_of(model_dir, emulator, write_tokens(tmp_path / "tokens", 12, 5), tmp_path)).replays[
        "emulator"
    ]

    def held() -> set[str]:
        buffers = {n: b for n, b in replay.model.named_buffers() if n.endswith("scales")}
        assert buffers
        return {name.split(".")[2] for name, buffer in buffers.items() if not buffer.is_meta}

    assert held() == set()
    assert made
    assert all(made)  # not even as zeros while the model is made
    for position in (0, 1):
        replay.load_block(position)
        assert held() == {str(position)}
    replay.drop_blocks()
    assert held() == set()


def test_a_decoder_s_blocks_are_fitted_where_its_answers_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the longest prompt of a batch is as long as its longest answer."""
    model_dir = families.save("T5", tmp_path / "model")
    emulator = save_emulator(model_dir, tmp_path / "emulator")
    blocks = tuple(name for name in block_names(load_model(model_dir)) if name.startswith("decoder"))
    lengths = [(2, 4), (5, 5), (5, 3)]  # of prompts and answers; the first row is held out
    rows = [Tokens([*range(2, 2 + a + b)], [*[False] * a, *[True] * b]) for a, b in lengths]
    write_shard(tmp_path / "tokens" / shard_name(0), rows)
    write_index(tmp_path / "tokens", [3], {"tokens": 24})
    counted: list[list[int]] = []

    def note(given: torch.Tensor, wanted: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        counted.append((torch.ones(given.shape[:-1]) if mask is None else mask).sum(dim=1).tolist())
        return token_error(given, wanted, mask)

    monkeypatch.setattr(refining, "token_error", note)
    refine_blocks(job_of(model_dir, emulator, tmp_path / "tokens", tmp_path, steps=1, decoder_blocks=blocks))
    encoder, decoder = [[2], [5, 5], [2]], [[4], [3, 5], [4]]  # each held out, in a step, held out again
    assert counted == [*encoder, *encoder, *decoder, *decoder]


def test_rows_are_held_out_of_those_that_show_images_too(tmp_path: Path) -> None:
    model, processor = build_vlm("Idefics2", PADDING)
    model.save_pretrained(tmp_path / "model")
    emulator = save_emulator(tmp_path / "model", tmp_path / "emulator")
    for directory in (tmp_path / "model", emulator):
        processor.save_pretrained(directory)
    shown = [row_with_images(processor, [(24, 24)]) for _ in range(6)]
    rows = [*(Tokens([5] * length, [True] * length) for length in range(3, 13)), *shown]
    write_shard(tmp_path / "tokens" / shard_name(0), rows, {}, True)
    write_index(tmp_path / "tokens", [len(rows)], {"tokens": 1, "images": 6})
    refiner = Refiner(job_of(tmp_path / "model", emulator, tmp_path / "tokens", tmp_path, steps=1))
    held_out = {row for number in refiner.held_out for row in refiner.batches[number]}
    assert {row >= 10 for row in held_out} == {True, False}
    assert len(held_out) == 2


def test_a_tower_s_blocks_are_fitted_where_its_patches_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = build_vlm("Idefics2", PADDING)
    model.save_pretrained(tmp_path / "model")
    emulator = save_emulator(tmp_path / "model", tmp_path / "emulator")
    for directory in (tmp_path / "model", emulator):
        processor.save_pretrained(directory)
    write_shard(tmp_path / "tokens" / shard_name(0), [row_with_images(processor, [(24, 24), (90, 40)])], {}, True)
    write_index(tmp_path / "tokens", [1], {"tokens": 1})
    counted: list[tuple[int, int]] = []

    def note(given: torch.Tensor, wanted: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        counted.append((given[..., 0].numel(), given[..., 0].numel() if mask is None else int(mask.sum())))
        return token_error(given, wanted, mask)

    monkeypatch.setattr(refining, "token_error", note)
    images = ImageInputs(tmp_path / "model")
    refine_blocks(job_of(tmp_path / "model", emulator, tmp_path / "tokens", tmp_path, steps=1, images=images))
    assert {numbers for numbers in counted if numbers[0] == 80} == {(80, 16 + 40)}


@pytest.mark.parametrize("computed", ["float16", "float32"])
def test_factors_are_stored_in_the_dtype_of_the_checkpoint(computed: str, tmp_path: Path) -> None:
    model_dir = save_model(tmp_path / "model", dtype="bfloat16")
    emulator = save_emulator(model_dir, tmp_path / "emulator")
    tokens = write_tokens(tmp_path / "tokens", 12, 5)
    job = job_of(model_dir, emulator, tokens, tmp_path, steps=3, model_options=(("dtype", computed),))
    refine_blocks(job)
    before, after = tensors_in(emulator), tensors_in(job.out_dir)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    name = "model.layers.0.mlp.up_proj"
    one, other = (t[f"{name}.up.weight"].float() @ t[f"{name}.down.weight"].float() for t in (before, after))
    assert 0 < (other - one).norm() < 0.5 * one.norm()


def test_shards_that_are_written_stay(refined: RefinementJob, tmp_path: Path) -> None:
    job = replace(refined, out_dir=shutil.copytree(refined.out_dir, tmp_path / "out"))
    before = {file.name: file.stat().st_ino for file in job.out_dir.glob("*.safetensors")}
    gone = min(before)
    (job.out_dir / gone).unlink()
    write_refined(job)
    after = {file.name: file.stat().st_ino for file in job.out_dir.glob("*.safetensors")}
    assert {name for name in before if before[name] != after[name]} <= {gone}
    assert json.loads((job.out_dir / "config.json").read_text())["model_type"] == "emloc_emulator"


@pytest.mark.slow
def test_a_run_heals_trains_and_corrects_what_was_refined(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, task_file: Path
) -> None:
    emulator = {"refinement": {"steps": 6}, "healing": {"steps": 2, "r": 4}}
    values = make_values(tmp_path / "run", tiny_model_dir("llama"), task_file, emulator=emulator)
    with own_environment():
        run = plain_run(values, tiny_model_dir("llama"))
    job = correction_job(run.context)
    assert job.emulator_dir.name == "emulator_healed"
    assert not {*job.residuals} & {*run.context.layout.ranks}  # what the factorization measured is no more
    healed, refined = tensors_in(job.emulator_dir), tensors_in(run.context.unhealed_dir)
    name = "model.layers.0.mlp.up_proj.down.weight"
    assert torch.equal(healed[name][:-4], refined[name])
    assert run.losses["merged"] == pytest.approx(run.losses["corrected"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "emulator",
    [
        {"compression_ratio": 1.0, "quantization": "int2", "residual_rank": 4},
        {"quantization": "int4", "healing": {"steps": 2, "r": 4}},
        {"compression_ratio": None, "budget": "2.6 bits", "objective": "predictions"},
    ],
    ids=["whole", "factors that heal", "by one budget"],
)
def test_a_run_trains_and_corrects_refined_integers(
    emulator: dict[str, Any], tiny_model_dir: Callable[..., Path], tmp_path: Path, task_file: Path
) -> None:
    settings = {**emulator, "group_size": 16, "refinement": {"steps": 6}}
    values = make_values(
        tmp_path / "run", tiny_model_dir("llama"), task_file, emulator=settings, correction={"method": "covariance"}
    )
    with own_environment():
        run = plain_run(values, tiny_model_dir("llama"))
    job = correction_job(run.context)
    assert not {*job.residuals} & {*run.context.layout.ranks, *run.context.layout.bits}
    stored, factorized = tensors_in(job.emulator_dir), tensors_in(run.context.path("emulator"))
    assert any(name.endswith((".int2", ".int4")) for name in stored)
    assert any(name not in factorized or not torch.equal(stored[name], factorized[name]) for name in stored)
    assert run.losses["merged"] == pytest.approx(run.losses["corrected"], abs=1e-4)
