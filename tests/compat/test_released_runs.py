"""What released versions wrote opens as they left it, or is refused in a sentence.

``0.1.0/`` holds what that version wrote: a tiny Llama's finished run with the model, rows and config that it came from, a
batch's state, and in ``logits.safetensors`` what it computed for ``input_ids``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_calls import invoke
from peft import PeftModel
from safetensors.torch import load_file
from small_runs import RecordingReporter, redone
from transformers import AutoModelForCausalLM

import emloc_ray  # noqa: F401  (the emulator's type)
from emloc_ray.config.reading import load_config, read_values
from emloc_ray.errors import ArtifactError, ConfigError
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.planning.prepared import prepare
from emloc_ray.runs.batch.state import read_state

RELEASE = Path(__file__).parent / "0.1.0"


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, which is the working directory: its config's paths are relative."""
    copy = tmp_path / RELEASE.name
    shutil.copytree(RELEASE, copy)
    monkeypatch.chdir(copy)
    return copy


def load(place: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(RELEASE / place)


def assert_gives(model: Any, name: str) -> None:
    stored = load_file(RELEASE / "logits.safetensors")
    with torch.no_grad():
        logits = model.eval()(stored["input_ids"]).logits
    torch.testing.assert_close(logits, stored[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["emulator", "merged"])
def test_a_model_gives_the_logits_it_gave(name: str) -> None:
    assert_gives(load(f"run/{name}"), name)


def test_the_adapter_gives_the_logits_it_gave_on_the_original() -> None:
    assert_gives(PeftModel.from_pretrained(load("model"), RELEASE / "run/adapter"), "adapter")


def test_status_shows_the_finished_run(release: Path) -> None:
    shown = invoke("status", "run")
    assert shown.exit_code == 0, shown.output
    assert "Not running." in shown.stdout
    assert "To continue" not in shown.stdout
    losses = json.loads((release / "run/metrics.json").read_text())["evaluation"]
    assert len(losses) == 6
    assert all(f"{variant['loss']:.4f}" in shown.stdout for variant in losses.values())


def test_report_is_written(release: Path) -> None:
    shown = invoke("report", "run")
    assert shown.exit_code == 0, shown.output
    page = (release / "run/report.html").read_text()
    metrics = json.loads((release / "run/metrics.json").read_text())
    assert all(f"{variant['loss']:.4f}" in page for variant in metrics["evaluation"].values())
    assert all(name.removeprefix("model.layers.") in page for name in metrics["emulator"]["layers"])


def test_the_same_config_goes_on_or_says_what_it_does_again(release: Path) -> None:
    reporter = RecordingReporter()
    stages = redone(read_values(release / "config.yaml"), reporter=reporter, accept_versions=True)
    said = [note for note in reporter.notes if "redone" in note]
    assert [note.split()[0] for note in said] == stages[:1]


def test_what_recorded_no_versions_is_refused_until_it_is_accepted(release: Path) -> None:
    before = (release / "run/manifest.json").read_bytes()
    shown = invoke("run", "config.yaml")
    assert shown.exit_code == 2
    stages = "data, calibrate, factorize, finetune, correct, merge, evaluate"
    assert f"{stages} were made with versions that are not recorded: give --accept-versions to" in shown.stderr
    assert f"or --fresh to redo {stages}." in shown.stderr
    assert (release / "run/manifest.json").read_bytes() == before


def test_the_config_as_written_names_the_removed_key_and_its_successor() -> None:
    with pytest.raises(
        ConfigError, match=r"convergence_tolerance was removed: set calibration\.num_calibration_tokens"
    ):
        load_config(RELEASE / "run/config.yaml")


@pytest.mark.parametrize("number", [1, 99, None, "2"])
def test_a_manifest_of_another_format_is_refused(release: Path, number: object) -> None:
    path = release / "run/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": number}))
    before = sorted(release.rglob("*"))
    with pytest.raises(ConfigError, match=rf"manifest\.json has format {number!r}, and this version reads 2: "):
        prepare(load_config(release / "config.yaml"))
    for verb in ("status", "report"):
        shown = invoke(verb, "run")
        assert shown.exit_code == 2
        assert f"has format {number!r}" in shown.stderr
    assert sorted(release.rglob("*")) == before


def test_a_batch_state_of_format_1_is_refused(release: Path) -> None:
    assert json.loads((release / "batch/batch.json").read_text())["format"] == 1
    with pytest.raises(
        ArtifactError, match=r"batch\.json is of another version of emloc_ray, or damaged: remove it, and the"
    ):
        read_state(RunDirectory(release / "batch"))
    for verb in ("status", "report"):
        shown = invoke(verb, "batch")
        assert shown.exit_code == 1
        assert "remove it, and the batch checks every task again." in shown.stderr
