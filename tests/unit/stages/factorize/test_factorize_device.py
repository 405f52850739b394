"""Factorizing and allocating where a GPU is: what the CPU gives, several groups in one worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from faulting.s3 import uri
from pretend_device import pretend_device
from ray.exceptions import WorkerCrashedError
from safetensors.torch import load_file
from stage_artifacts import Artifacts, gpt2_group
from test_allocate import allocation_job, gradients_dir, stored
from test_factorize import gram_of, job_of
from transformers import AutoConfig

from emloc_ray.data.ahead import read_ahead
from emloc_ray.io.formats.grams import GramStore
from emloc_ray.io.store.atomic import write_bytes
from emloc_ray.io.store.node_cache import mirror
from emloc_ray.io.store.objects import Objects
from emloc_ray.stages.factorize import factorize
from emloc_ray.stages.factorize.allocate import allocate_ranks, group_losses, losses_of_groups
from emloc_ray.stages.factorize.factorize import build_emulator, factorize_group, factorize_groups
from emloc_ray.stages.factorize.group_tensors import GroupTensors
from emloc_ray.stages.factorize.job import FactorizationJob
from emloc_ray.stages.factorize.kept_tensors import copy_rest
from emloc_ray.stages.factorize.layer_reports import read_reports, spectra_file
from emloc_ray.stages.ray.losses import MAX_RESTARTS, Losses
from emloc_ray.stages.ray.tasks import Resources, bundles

__all__ = ["gradients_dir"]
JOBS: dict[str, Callable[[FactorizationJob], FactorizationJob]] = {
    "plain": lambda job: job,
    "weights": lambda job: replace(job, by_weights=True),
    "pivoted": lambda job: replace(job, storage="pivoted"),
}


def products(file: Path) -> list[torch.Tensor]:
    tensors = load_file(file)
    ups = [name for name in tensors if name.endswith(".up.weight")]
    return [tensors[name] @ tensors[name.replace(".up.", ".down.")] for name in sorted(ups)]


@pytest.mark.parametrize("kind", JOBS)
def test_a_group_s_factors_are_the_cpu_s(kind: str, tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    job, group, gram = gpt2_group(tiny_model_dir("gpt2"), tmp_path)
    job = JOBS[kind](job)
    for name, device in (("here", "cpu"), ("there", pretend_device())):
        factorize_group(job, group, gram, tmp_path / name / "factors.safetensors", device)
    here, there = (tmp_path / name / "factors.safetensors" for name in ("here", "there"))
    for expected, found in zip(products(here), products(there), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    for one, other in zip(read_reports(here), read_reports(there), strict=True):
        assert other.relative_error == pytest.approx(one.relative_error, rel=1e-3)


def test_factors_of_predictions_and_spectra_are_the_cpu_s(
    artifacts: Artifacts, gradients_dir: Path, tmp_path: Path
) -> None:
    group = next(group for group in artifacts.groups if len(group) == 2)
    job = replace(job_of(artifacts), gradients_dir=gradients_dir)
    for name, device in (("here", "cpu"), ("there", pretend_device())):
        factorize_group(job, group, gram_of(artifacts, group), tmp_path / name, device)
    for expected, found in zip(products(tmp_path / "here"), products(tmp_path / "there"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    gram = GramStore(artifacts.calibration_dir).stored(group[0].name)
    sums = stored(gradients_dir, [spec.name for spec in group])
    spectra = [
        group_losses(allocation_job(artifacts, gradients_dir), group, gram, sums, device)
        for device in ("cpu", pretend_device())
    ]
    for name, expected in spectra[0].items():
        torch.testing.assert_close(spectra[1][name], expected, rtol=1e-3, atol=1e-5 * float(expected[0]))


@pytest.mark.parametrize("device", ["cpu", "pretend"])
def test_groups_one_after_another_are_each_as_alone_and_those_there_are_kept(
    artifacts: Artifacts, gradients_dir: Path, tmp_path: Path, device: str
) -> None:
    where = "cpu" if device == "cpu" else pretend_device()
    job = replace(job_of(artifacts), gradients_dir=gradients_dir)
    pieces = [(g, gram_of(artifacts, g), tmp_path / f"{k}.safetensors") for k, g in enumerate(artifacts.groups[:3])]
    factorize_group(job, *pieces[1])
    kept = pieces[1][2].stat()
    factorize_groups(job, pieces, where)
    assert pieces[1][2].stat().st_mtime_ns == kept.st_mtime_ns
    for group, gram, file in (pieces[0], pieces[2]):
        factorize_group(job, group, gram, tmp_path / "alone" / file.name, where)
        assert file.read_bytes() == (tmp_path / "alone" / file.name).read_bytes()


def test_a_gpu_s_groups_are_read_ahead_and_a_cpu_s_are_not() -> None:
    pieces, read = ["a", "b"], GroupTensors({}, None, {})
    assert list(read_ahead(pieces, lambda piece: read, torch.device("cpu"))) == [("a", None), ("b", None)]
    assert list(read_ahead(pieces, lambda piece: read, pretend_device())) == [("a", read), ("b", read)]
    assert list(read_ahead(pieces[:1], lambda piece: read, pretend_device())) == [("a", None)]


@pytest.mark.parametrize("device", ["cpu", "pretend"])
def test_spectra_one_after_another_are_each_as_alone(
    artifacts: Artifacts, gradients_dir: Path, tmp_path: Path, device: str
) -> None:
    where = "cpu" if device == "cpu" else pretend_device()
    job, pieces = allocation_job(artifacts, gradients_dir), []
    for number, group in enumerate(artifacts.groups[:3]):
        sums = stored(gradients_dir, [spec.name for spec in group])
        pieces.append((group, gram_of(artifacts, group), sums, tmp_path / f"{number}.safetensors"))
    pieces[1][3].write_bytes(b"there")
    losses_of_groups(job, pieces, where)
    assert pieces[1][3].read_bytes() == b"there"
    for group, gram, sums, file in (pieces[0], pieces[2]):
        expected, found = group_losses(job, group, gram, sums, where), load_file(file)
        assert all(torch.equal(found[name], values) for name, values in expected.items())


def test_a_task_opens_the_model_once(
    artifacts: Artifacts, gradients_dir: Path, tmp_path: Path, opened: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, stores = replace(job_of(artifacts), gradients_dir=gradients_dir), list[Path]()

    def store(directory: Path) -> GramStore:
        stores.append(directory)
        return GramStore(directory)

    monkeypatch.setattr(factorize, "GramStore", store)
    groups = [(group, gram_of(artifacts, group)) for group in artifacts.groups[:3]]
    sums = [stored(gradients_dir, [spec.name for spec in group]) for group, _ in groups]
    for count in (1, 3):
        opened.clear()
        factorize_groups(job, [(*part, tmp_path / f"{count}-{k}.safetensors") for k, part in enumerate(groups[:count])])
        assert opened == [artifacts.model_dir]
        assert stores == [gradients_dir]
        stores.clear()
        opened.clear()
        work = [(*part, sums[k], tmp_path / f"{count}-{k}-spectra") for k, part in enumerate(groups[:count])]
        losses_of_groups(allocation_job(artifacts, gradients_dir), work)
        assert opened == [artifacts.model_dir]


def test_a_task_asks_a_store_once_which_of_its_files_are_written(
    artifacts: Artifacts, gradients_dir: Path, s3_port: int, node_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = mirror(uri(s3_port, "written/run")) / "emulator"
    groups = [(group, gram_of(artifacts, group)) for group in artifacts.groups[:3]]
    files = [folder / f"{number}.safetensors" for number in range(3)]
    for file in files:
        write_bytes(file, b"factors")
        write_bytes(spectra_file(file), b"spectra")
    listed: list[str] = []
    below = Objects.below
    monkeypatch.setattr(Objects, "below", lambda store, path="": (listed.append(path), below(store, path))[1])
    factorize_groups(job_of(artifacts), [(*part, file) for part, file in zip(groups, files, strict=True)])
    assert listed == ["emulator"]
    listed.clear()
    work: list[Any] = [(*part, {}, file) for part, file in zip(groups, files, strict=True)]
    losses_of_groups(allocation_job(artifacts, gradients_dir), work)
    assert listed == ["emulator"]


def test_a_share_that_loses_its_worker_after_each_file_is_made(
    artifacts: Artifacts, gradients_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = []

    def lose(function: Any, shared: Any, name: str, bundle: Any, losses: Losses) -> None:
        largest.append(len(bundle))
        for count in range(1, len(bundle) + 1):
            function(shared, bundle[:count])
            losses.record_lost_worker(name, WorkerCrashedError())

    def run_tasks(function: Any, shared: Any, work: Any, resources: Any, losses: Losses, look: Any) -> None:
        for name, (bundle, device) in work:
            assert device == "cuda"
            lose(function, shared, name, bundle, losses)

    def bounded(submits: Any, limit: int, losses: Losses, *others: Any, **more: Any) -> None:
        for name, submit in submits:
            if name.startswith("shard "):
                copy_rest(*submit.args)
            else:
                shared, bundle, device = submit.args
                assert device == "cuda"
                lose(factorize_groups, shared, name, bundle, losses)

    monkeypatch.setattr("emloc_ray.stages.factorize.allocate.run_tasks", run_tasks)
    monkeypatch.setattr("emloc_ray.stages.factorize.factorize.bounded", bounded)
    monkeypatch.setattr(ray, "put", lambda value: value)
    resources = Resources(gpus_per_worker=1)
    allocate_ranks(allocation_job(artifacts, gradients_dir), tmp_path / "ranks", resources)
    job = replace(job_of(artifacts), out_dir=tmp_path / "emulator")
    build_emulator(job, artifacts.calibration_dir, AutoConfig.from_pretrained(artifacts.model_dir), resources)
    assert largest == [len(artifacts.groups)] * 2
    assert largest[0] > MAX_RESTARTS


def test_a_worker_with_a_gpu_takes_its_share_in_one_task() -> None:
    pieces = [5, 4, 3, 3, 2, 1]
    assert bundles(pieces, float, Resources(num_workers=2)) == [[piece] for piece in pieces]
    shared = bundles(pieces, float, Resources(num_workers=2, gpus_per_worker=1))
    assert [sum(bundle) for bundle in shared] == [9, 9]
    assert len(bundles([1, 1], float, Resources(num_workers=5, gpus_per_worker=1))) == 2


def test_workers_with_cpus_alone_take_a_few_tasks_each_of_equal_cost() -> None:
    """Each reads anew what all share, which of thousands of experts' linears takes a second."""
    pieces = [*range(1, 12_001)]
    shared = bundles(pieces, float, Resources(num_workers=4))
    assert len(shared) <= 64
    assert sorted(piece for bundle in shared for piece in bundle) == pieces
    costs = [sum(bundle) for bundle in shared]
    assert max(costs) - min(costs) < 0.001 * max(costs)
