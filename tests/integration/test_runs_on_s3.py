"""A run on a real S3 server: the same files as on a disk, with faults on the way, and gone on from what is there."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from faulting.s3 import faulty_store, uri
from peft import PeftModel
from safetensors.torch import load_file
from small_runs import GROUP, FinishedRun, Stopping, run_values
from test_calibration import assert_same_grams
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from emloc_ray.errors import Stopped
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.ui.cli import app


def contents(root: Path) -> dict[str, bytes]:
    """What a run is: its tensors, by file."""
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in sorted(root.rglob("*.safetensors"))}


def assert_close_tensors(found: Path, expected: Path) -> None:
    """The same files with the same names in them, and all but the same values."""
    files = contents(expected).keys()
    assert contents(found).keys() == files
    for file in files:
        ours, theirs = load_file(found / file), load_file(expected / file)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-4)


def fetched(place: str, directory: Path, *options: str) -> Path:
    result = CliRunner().invoke(app, ["fetch", place, str(directory), *options])
    assert result.exit_code == 0, result.output
    return directory


@pytest.fixture
def values(llama_run: FinishedRun) -> dict[str, Any]:
    return dict(llama_run.values)


@pytest.mark.deep
def test_a_run_through_a_faulty_store_is_the_run_on_a_disk(
    llama_run: FinishedRun, s3_port: int, node_cache: Path, tmp_path: Path
) -> None:
    values = llama_run.changed(finetune=GROUP)
    with faulty_store(s3_port, share=0.03) as faulty:
        run_values({**values, "run_dir": uri(faulty.port, "faulty/run")})
        assert min(faulty.counts().values()) > 0
    place = uri(s3_port, "faulty/run")
    # What a disk holds, a newcomer's node finds in the store alone.
    shutil.rmtree(node_cache)
    root = fetched(place, tmp_path / "run")
    assert contents(root / "model") == contents(
        llama_run.model_dir
    )  # the run's own, for nodes that do not see that place
    shutil.rmtree(root / "model")
    for folder in ("calibration", "emulator"):
        assert contents(root / folder) == contents(llama_run.root / folder)
    for folder in ("adapter_emulator", "merged"):  # two ranks add in another order
        assert_close_tensors(root / folder, llama_run.root / folder)
    assert RunDirectory(place).holder() is None
    metrics = json.loads((root / "metrics.json").read_text())
    assert metrics["evaluation"].keys() == llama_run.metrics["evaluation"].keys()
    for variant, scores in llama_run.metrics["evaluation"].items():
        assert metrics["evaluation"][variant]["loss"] == pytest.approx(scores["loss"], abs=1e-3)
    model = AutoModelForCausalLM.from_pretrained(llama_run.model_dir)
    assert PeftModel.from_pretrained(model, root / "adapter").peft_config

    shutil.rmtree(node_cache, ignore_errors=True)  # what was fetched lies elsewhere
    again = run_values({**values, "run_dir": place})
    assert again.started == []
    status = CliRunner().invoke(app, ["status", place])
    assert status.exit_code == 0, status.output
    assert "Not running." in status.output


def test_an_import_that_was_broken_off_goes_on(values: dict[str, Any], s3_port: int, node_cache: Path) -> None:
    values |= {"run_dir": uri(s3_port, "import/run")}
    first, *others = sorted(Path(values["model"]["source"]).glob("*.safetensors"))
    assert others
    whole = sum(file.stat().st_size for file in first.parent.iterdir() if file.name <= first.name)
    with pytest.raises(Stopped):
        run_values(values, Stopping("import", whole + 1), until="calibrate")
    store = RunDirectory(values["run_dir"]).store
    assert store is not None
    [before] = [stored for stored in store.below("model") if first.name in stored.path]
    time.sleep(1.1)  # the server's times are whole seconds
    reporter = run_values(values, until="calibrate")
    assert reporter.started == ["import", "data", "calibrate"]
    assert store.versions("model")[first.name] == before
    assert all(other.name in store.versions("model") for other in others)


@pytest.mark.deep
def test_a_streamed_calibration_goes_on_where_its_hidden_states_are(
    llama_run: FinishedRun, s3_port: int, node_cache: Path, tmp_path: Path
) -> None:
    place = uri(s3_port, "streamed/run")
    values = {**llama_run.changed(model={"hold": "block_by_block"}), "run_dir": place}
    with pytest.raises(Stopped):
        run_values(values, Stopping("calibrate", 2), until="calibrate")
    store = RunDirectory(place).store
    assert store is not None
    here = ray.get_runtime_context().get_node_id().encode()
    nodes = [stored.path for stored in store.below("calibration/slots") if "/node/" in stored.path]
    assert {store.read(node) for node in nodes} == {here}
    assert run_values(values, until="calibrate").started == ["calibrate"]
    assert not store.below("calibration/slots")
    assert_same_grams(fetched(place, tmp_path / "run", "--part", "calibration"), llama_run.root)


@pytest.mark.deep
def test_an_altered_object_is_redone_by_name(
    llama_run: FinishedRun, values: dict[str, Any], s3_port: int, node_cache: Path, tmp_path: Path
) -> None:
    place = uri(s3_port, "altered/run")
    values |= {"run_dir": place}
    run_values(values, until="factorize")
    store = RunDirectory(place).store
    assert store is not None
    name, info = next(item for item in store.versions("emulator").items() if item[0].endswith(".safetensors"))
    store.write(info.path, b"x" * info.size)
    shutil.rmtree(node_cache)
    reporter = run_values(values, until="finetune")
    assert reporter.started == ["finetune", "factorize", "finetune"]  # found when it was fetched
    assert any(name in note for note in reporter.notes)
    root = fetched(place, tmp_path / "run", "--part", "emulator", "--part", "adapter_emulator")
    assert contents(root / "emulator") == contents(llama_run.root / "emulator")
    assert contents(root / "adapter_emulator") == contents(llama_run.root / "adapter_emulator")
