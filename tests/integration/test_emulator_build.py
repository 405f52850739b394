"""Building an emulator on Ray: shard by shard, after a kill, and under a full disk."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import FinishedRun, RecordingReporter, run_values
from stage_artifacts import tensors_in

from emloc_ray.config.reading import parse_config
from emloc_ray.errors import NumericsError, StageError
from emloc_ray.modeling.architecture import load_config
from emloc_ray.planning.prepared import prepare
from emloc_ray.stages.context import Context
from emloc_ray.stages.factorize.factorize import build_emulator
from emloc_ray.stages.factorize.stage import factorization_job
from emloc_ray.stages.ray.tasks import Resources


def assert_same_emulator(found: Path, expected: Path) -> None:
    ours, theirs = tensors_in(found), tensors_in(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def build(run: FinishedRun, out_dir: Path, model_dir: Path | None = None) -> list[tuple[int, int]]:
    """Builds the run's emulator anew; gives the progress that was told."""
    job = factorization_job(Context(prepare(parse_config(run.values)), model_dir or run.model_dir))
    told: list[tuple[int, int]] = []
    build_emulator(
        replace(job, out_dir=out_dir),
        run.root / "calibration",
        load_config(job.model_dir),
        Resources(2),
        lambda done, total: told.append((done, total)),
    )
    return told


def test_a_build_that_was_killed_keeps_its_shards_and_ends_the_same(llama_run: FinishedRun, tmp_path: Path) -> None:
    out_dir = tmp_path / "emulator"
    shutil.copytree(llama_run.root / "emulator", out_dir)
    files = sorted(out_dir.glob("model-*.safetensors"))
    lost, kept = files[1::2], files[::2]
    for file in [*lost, out_dir / "config.json"]:
        file.unlink()
    before = {file: file.stat().st_mtime_ns for file in kept}
    told = build(llama_run, out_dir)
    assert told[0][0] >= len(kept)
    assert told[-1] == (len(files), len(files))
    assert {file: file.stat().st_mtime_ns for file in kept} == before
    assert_same_emulator(out_dir, llama_run.root / "emulator")


def test_a_poisoned_layer_is_named(llama_run: FinishedRun, tmp_path: Path) -> None:
    model_dir = tmp_path / "model"
    shutil.copytree(llama_run.model_dir, model_dir)
    for file in model_dir.glob("*.safetensors"):
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        if "model.layers.0.self_attn.o_proj.weight" in tensors:
            tensors["model.layers.0.self_attn.o_proj.weight"][0, 0] = torch.nan
            save_file(tensors, file, {"format": "pt"})
    with pytest.raises(NumericsError, match=r"model\.layers\.0\.self_attn\.o_proj"):
        build(llama_run, tmp_path / "emulator", model_dir)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB; skipped where this user may not mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


class FillingReporter(RecordingReporter):
    """Fills the disk when a stage begins, but for some bytes."""

    def __init__(self, disk: Path, stage: str, left: int) -> None:
        super().__init__()
        self.disk, self.stage, self.left = disk, stage, left
        self.ballast = disk / "ballast"

    def start(self, stage: str) -> Callable[[int, int], None]:
        if stage == self.stage:
            free = shutil.disk_usage(self.disk).free
            with self.ballast.open("wb") as file:
                file.write(b"\0" * (free - self.left))
        return super().start(stage)


def test_a_disk_that_fills_up_stops_the_run_and_the_same_command_goes_on(
    llama_run: FinishedRun, small_disk: Path
) -> None:
    values: dict[str, Any] = {**llama_run.values, "run_dir": str(small_disk / llama_run.root.name)}
    page = os.sysconf("SC_PAGE_SIZE")
    emulator = sum(f.stat().st_size for f in (llama_run.root / "emulator").glob("model-*"))
    reporter = FillingReporter(small_disk, "factorize", emulator // 2 // page * page)
    with pytest.raises(StageError, match=r"factorize: the disk is full.*run the same command again"):
        run_values(values, reporter, until="factorize")
    run = small_disk / llama_run.root.name
    done = {file: file.stat().st_mtime_ns for file in (run / "emulator").glob("model-*.safetensors")}
    assert 0 < len(done) < len(list((llama_run.root / "emulator").glob("model-*.safetensors")))
    assert not list((run / "emulator").glob(".*.tmp"))
    reporter.ballast.unlink()
    again = run_values(values, until="factorize")
    assert again.started == ["factorize"]
    assert {file: file.stat().st_mtime_ns for file in done} == done
    assert_same_emulator(run / "emulator", llama_run.root / "emulator")
