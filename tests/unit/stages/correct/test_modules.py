"""What modules see of the difference, by Gram group: held to the direct formulas of a ``Δ`` that the stage never makes."""

from __future__ import annotations

import gc
import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bare_runs import tiny_run
from layer_differences import layer_difference
from plain_stages import build
from pretend_device import METER, pretend_device
from stage_artifacts import write_lora
from torch import Tensor
from transformers import AutoConfig

from emloc_ray.core import correction as core_correction
from emloc_ray.core import gram, products
from emloc_ray.core.correction import Candidate
from emloc_ray.core.gram import Gram
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.io.formats.grams import GramStore, StoredGram, write_gram_index, write_gram_shard
from emloc_ray.modeling.adapter_files import Adapter
from emloc_ray.modeling.architecture import LinearSpec, block_linears, empty_model, trace_inputs
from emloc_ray.modeling.stored_names import stored_parameters, stored_specs
from emloc_ray.planning import memory as planned_memory
from emloc_ray.planning.lengths import Lengths
from emloc_ray.planning.memory import MemoryModel
from emloc_ray.stages.correct import modules as stage
from emloc_ray.stages.correct.correct import correct, finish, read_groups
from emloc_ray.stages.correct.job import CorrectionJob, module_groups
from emloc_ray.stages.correct.modules import (
    CorrectableModule,
    Opened,
    read_differences,
    read_modules,
    see_differences,
    write_modules,
)
from emloc_ray.stages.factorize.factorize import finish_emulator
from emloc_ray.stages.factorize.job import FactorizationJob
from emloc_ray.stages.factorize.layer_reports import read_reports
from emloc_ray.stages.heal.fold import FoldJob, pieces, write_pieces
from emloc_ray.stages.ray.tasks import Resources

RANK, R, FRAC = 12, 4, 1e-6
COVARIANCE = Candidate("covariance", 3.0, 0.7)
SMALL = {"compression_ratio": 0.1, "rank_multiple": 1}


def inputs_of(kind: str, width: int) -> Tensor:
    """Tokens that a group of linears read."""
    count = RANK - 2 if kind == "fewer tokens than ranks" else 300
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(width))
    x[:, 5] *= 3000 if kind == "a channel 3,000 times the others" else 1
    return x * torch.logspace(0, -1, width)


def emulated(root: Path, model_dir: Path, kind: str = "plain", **changes: Any) -> CorrectionJob:
    """A correction of an adapter on all linears, for an emulator whose last linear stays dense."""
    model, original = empty_model(AutoConfig.from_pretrained(model_dir)), Checkpoint(model_dir)
    specs = stored_specs(block_linears(model), stored_parameters(model, (e.name for e in original)), original)
    placed = {spec.name: spec for spec in specs}
    groups = trace_inputs(model, block_linears(model)).groups
    x = {group[0]: inputs_of(kind, placed[group[0]].in_features) for group in groups}
    write_gram_shard(root / "grams" / "grams.safetensors", {n: Gram(t.T @ t, len(t)) for n, t in x.items()})
    files, counts = dict.fromkeys(x, "grams.safetensors"), {name: len(t) for name, t in x.items()}
    write_gram_index(root / "grams", groups, files, counts)
    job = FactorizationJob(
        model_dir,
        root / "emulator",
        tuple(tuple(placed[name] for name in group) for group in groups),
        {spec.name: RANK for spec in specs[:-1]},
        dampening_frac=FRAC,
        **changes,
    )
    build(job, root / "grams", model.config)
    spectra = sorted((root / "emulator" / "spectra").iterdir())
    reports = [report for file in spectra for report in read_reports(root / "emulator" / file.name)]
    return CorrectionJob(
        model_dir=model_dir,
        emulator_dir=root / "emulator",
        calibration_dir=root / "grams",
        adapter_dir=write_lora(root / "adapter", specs),
        out_dir=root / "corrected",
        selection_dir=root,
        tokens_dir=root,
        specs=specs,
        candidates=(COVARIANCE,),
        gram_dampening_frac=FRAC,
        residuals={r.name: r.residual_energy for r in reports if r.residual_energy is not None},
    )


def healed(job: CorrectionJob, root: Path, **changes: Any) -> CorrectionJob:
    """The same with a LoRA folded into the emulator's factors."""
    specs = tuple(spec for spec in job.specs if spec.name in job.residuals)
    ranks = {spec.name: RANK + R for spec in specs}
    names = tuple(ranks)
    fold = FoldJob(job.emulator_dir, write_lora(root / "healing", specs), root / "healed", ranks, names, **changes)
    write_pieces(fold, pieces(fold))
    files = [piece.file for piece in pieces(fold)]
    kept_wide = fold.kept_wide if fold.in_4bit else None
    finish_emulator(files, AutoConfig.from_pretrained(job.model_dir), job.emulator_dir, ranks, fold.storage, kept_wide)
    plain = fold.storage == "factors" and not fold.in_4bit
    residuals = job.residuals if plain else {}
    return replace(job, emulator_dir=root / "healed", residuals=residuals, healed=dict.fromkeys(residuals, R))


def all_modules(job: CorrectionJob) -> dict[str, CorrectableModule]:
    groups = module_groups(job, Adapter(job.adapter_dir).names)
    found = [module for group in groups for module in see_differences(Opened(job), group)]
    return {module.lora.name: module for module in found}


def assert_direct(job: CorrectionJob, modules: dict[str, CorrectableModule]) -> None:
    """Against ``Δ`` as a matrix and the damped Gram, in float64."""
    assert job.calibration_dir is not None
    original, emulator, grams = Checkpoint(job.model_dir), Checkpoint(job.emulator_dir), GramStore(job.calibration_dir)
    for spec in job.specs:
        module, delta = modules[spec.name], layer_difference(spec, original, emulator)
        if delta is None:
            assert module.seen is None
            assert module.shortfalls(COVARIANCE, 1e-4) is None
            continue
        delta, gram, q = delta.double(), grams.read(spec.name).double(), module.form.q
        damped = gram + FRAC * gram.diagonal().mean() * torch.eye(len(gram)).double()
        size = float(spec.read_weight(original).double().norm())
        assert module.seen is not None
        torch.testing.assert_close(module.seen.delta_q, delta @ q, rtol=0, atol=1e-6 * size)
        torch.testing.assert_close(
            module.seen.delta_gq, delta @ gram @ q, rtol=0, atol=1e-6 * float(gram.norm()) * size
        )
        applied = module.applied(COVARIANCE, 1e-4)
        told = module.shortfalls(COVARIANCE, 1e-4)
        assert told is not None
        for key, missed in (("before", delta), ("after", delta - module.lora.scale * applied @ q.T)):
            direct = float((missed @ damped @ missed.T).trace()) ** 0.5
            assert told[key] == pytest.approx(direct, rel=5e-3), (spec.name, key)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_device_holds_no_more_than_is_planned(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Of each group one linear's weights beside the Gram; what goes in parts is in small ones for these small matrices."""
    for module in (products, core_correction, stage, planned_memory):
        monkeypatch.setattr(module, "ROWS", 64)
    monkeypatch.setattr(gram, "gather_triangle", partial(gram.gather_triangle, elements=2**13))
    sizes = {"hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 1}
    model_dir = tiny_model_dir("llama", dtype=dtype, **sizes)
    job, device = emulated(tmp_path, model_dir), pretend_device()
    opened = Opened(job)
    for group in module_groups(job, Adapter(job.adapter_dir).names):
        targets = [spec.name for spec in group.specs]
        sections: dict[str, Any] = {
            "adapter": {"r": R, "target_modules": targets},
            "correction": {"method": "covariance"},
        }
        run = tiny_run(tmp_path, model_dir, memory_budget=None, emulator=SMALL, **sections)
        gc.collect()
        METER.restart()
        before = METER.current
        see_differences(opened, group, device, read_differences(opened, group))
        planned = MemoryModel(run, Lengths(20.0, 20.0)).correction_parts()["difference"]
        assert 0.7 * planned < METER.peak - before <= planned


def test_a_worker_with_a_gpu_reads_its_groups_in_one_task(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = emulated(tmp_path, tiny_model_dir("llama"))
    groups = module_groups(job, Adapter(job.adapter_dir).names)
    read_groups(Opened(job), groups[:1], "cpu")  # as a try that was killed has left it
    written = groups[0].path.stat().st_mtime_ns
    shares, heard = list[Any](), list[tuple[int, int]]()

    def here(function: Any, shared: Any, work: Any, resources: Any, losses: Any, *progress: Any) -> list[Any]:
        if function is finish:  # as a task of the stage's memory, which the final actor has none of
            assert resources == replace(granted, gpus_per_worker=0)
            return [function(shared)]
        for name, (share, device) in work:
            assert device == "cuda"
            assert losses.files[name] == [group.path for group in share]  # which tell how far a lost one had come
            shares.append(share)
            function(shared, share, "cpu")
            progress[0](sum(map(len, shares)), len(groups))
        return []

    monkeypatch.setattr("emloc_ray.stages.correct.correct.run_tasks", here)
    granted = Resources(num_workers=2, gpus_per_worker=1, memory_per_worker=2**30)
    correct(job, granted, lambda done, of: heard.append((done, of)))
    assert len(shares) == 2 < sum(map(len, shares)) == len(groups)
    assert heard[-1] == (len(groups), len(groups))
    assert all(count >= len(shares[0]) for count, _ in heard)
    assert groups[0].path.stat().st_mtime_ns == written


@pytest.mark.parametrize("kind", ["plain", "fewer tokens than ranks", "a channel 3,000 times the others"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shortfalls_are_those_of_the_direct_formula(
    dtype: str, kind: str, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    job = emulated(tmp_path, tiny_model_dir("llama", dtype=dtype), kind)
    assert len(job.residuals) == len(job.specs) - 1
    assert_direct(job, all_modules(job))
    assert_direct(job, all_modules(replace(job, residuals={})))  # measured here


def test_experts_and_biased_rows(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    job = emulated(tmp_path, tiny_model_dir("mixtral"))
    assert any("experts" in name for name in job.residuals)
    assert_direct(job, all_modules(job))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_healing_joins_is_counted_in(dtype: str, tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    job = emulated(tmp_path, tiny_model_dir("llama", dtype=dtype))
    before = all_modules(job)
    job = healed(job, tmp_path)
    after = all_modules(job)
    name = job.specs[0].name
    assert after[name].seen.energy != pytest.approx(before[name].seen.energy, rel=0.05)
    assert_direct(job, after)


@pytest.mark.parametrize("changes", [{"storage": "pivoted"}, {"in_4bit": True}])
def test_what_was_stored_anew_after_healing_is_measured_anew(
    changes: dict[str, Any], tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    storage = {"storage": changes["storage"]} if "storage" in changes else {}
    job = emulated(tmp_path, tiny_model_dir("llama"), **storage)
    names = tuple(job.residuals)
    job = healed(job, tmp_path, **({"in_4bit": names} if "in_4bit" in changes else storage))
    assert not job.residuals
    assert_direct(job, all_modules(job))


def test_a_gram_is_read_once_and_no_product_with_it_is_wide(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, read, products = emulated(tmp_path, tiny_model_dir("llama")), [], []
    groups = module_groups(job, Adapter(job.adapter_dir).names)
    plain_read, plain_product = type(groups[0].gram).packed, stage.product_by_rows

    def product(left: Tensor, right: Tensor) -> Tensor:
        products.append(right.shape[1])
        return plain_product(left, right)

    monkeypatch.setattr(type(groups[0].gram), "packed", lambda gram: (read.append(gram.name), plain_read(gram))[1])
    monkeypatch.setattr(stage, "product_by_rows", product)
    monkeypatch.setattr(stage, "residual_energy", None)
    all_modules(job)
    assert sorted(read) == sorted({group.gram.name for group in groups if group.gram is not None})
    assert sorted(products) == sorted(4 * len(group.specs) for group in groups)


def test_it_is_what_the_cpu_gives_and_the_host_seldom_waits(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    device, job = pretend_device(), emulated(tmp_path, tiny_model_dir("llama"))
    group = max(module_groups(job, Adapter(job.adapter_dir).names), key=lambda group: len(group.specs))
    assert len(group.specs) == 3
    METER.restart()
    there, here = see_differences(Opened(job), group, device), see_differences(Opened(job), group)
    copies = METER.waits["copy_"] + METER.waits["_to_copy"]
    assert METER.waits.total() - copies <= 1, METER.waits  # the Gram's size
    # Of the Gram, and of a linear its weight, its factors and the adapter's to the device, and three thin matrices back.
    assert copies <= 1 + 7 * len(group.specs), METER.waits
    for one, other in zip(here, there, strict=True):
        lora, expected = (module.corrected(COVARIANCE, 1e-4) for module in (other, one))
        torch.testing.assert_close(lora.lora_b @ lora.lora_a, expected.lora_b @ expected.lora_a)
        assert other.shortfalls(COVARIANCE, 1e-4) == pytest.approx(one.shortfalls(COVARIANCE, 1e-4), rel=1e-6)


def test_a_gpu_s_groups_are_read_while_the_one_before_is_computed(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, read = emulated(tmp_path, tiny_model_dir("llama")), list[bool]()
    groups = module_groups(job, Adapter(job.adapter_dir).names)
    expected = all_modules(job)
    for reader, name in ((LinearSpec, "read_weight"), (StoredGram, "packed")):
        plain = getattr(reader, name)

        def note(own: Any, *args: Any, plain: Any = plain) -> Any:
            read.append(threading.current_thread() is threading.main_thread())
            return plain(own, *args)

        monkeypatch.setattr(reader, name, note)
    read_groups(Opened(job), groups, "cpu")
    assert read
    assert all(read)  # one linear at a time
    for group in groups:
        group.path.unlink()
    read.clear()
    pretend_device()
    read_groups(Opened(job), groups, "pretend")
    assert read
    assert not any(read)
    made = {module.lora.name: module for group in groups for module in read_modules(group.path)}
    for name, module in expected.items():
        one, other = (each.corrected(COVARIANCE, 1e-4) for each in (module, made[name]))
        torch.testing.assert_close(one.lora_b @ one.lora_a, other.lora_b @ other.lora_a)


def test_what_all_groups_are_read_from_is_opened_once_and_can_be_sent(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, opened = emulated(tmp_path, tiny_model_dir("llama")), []
    groups = module_groups(job, Adapter(job.adapter_dir).names)
    monkeypatch.setattr(stage, "Checkpoint", lambda folder: (opened.append(folder), Checkpoint(folder))[1])

    def here(function: Any, shared: Any, work: Any, *others: Any) -> list[Any]:
        return [function(pickle.loads(pickle.dumps(shared)), *arguments) for _, arguments in work]  # as Ray does

    monkeypatch.setattr("emloc_ray.stages.correct.correct.run_tasks", here)
    correct(job, Resources())
    assert len(groups) > 1
    assert opened == [job.model_dir, job.emulator_dir]


def test_what_is_sent_does_not_grow_with_the_adapter(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    job = emulated(tmp_path, tiny_model_dir("llama"))
    sent = []
    for r in (1, 64):
        folder = tmp_path / f"rank-{r:02d}"
        write_lora(folder, job.specs, r)
        sent.append(len(pickle.dumps(Opened(replace(job, adapter_dir=folder)))))
    assert sent[1] < 1.1 * sent[0]


def test_modules_come_back_from_their_file(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    job = emulated(tmp_path, tiny_model_dir("llama"))
    for group in module_groups(job, Adapter(job.adapter_dir).names):
        made = see_differences(Opened(job), group)
        write_modules(group.path, made)
        for one, other in zip(made, read_modules(group.path), strict=True):
            lora, expected = (module.corrected(COVARIANCE, 1e-4) for module in (other, one))
            assert torch.equal(lora.lora_b, expected.lora_b)
            assert torch.equal(lora.lora_a, expected.lora_a)
            assert other.shortfalls(COVARIANCE, 1e-4) == one.shortfalls(COVARIANCE, 1e-4)
