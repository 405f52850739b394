"""Ctrl-C on the real command, as a terminal sends it: to every process of the foreground group; SIGTERM, as Kubernetes does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from small_runs import make_values

from emloc_ray.io.formats.yaml_text import write_yaml
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.runs.status import read_status

SECONDS = 240
STEPS = 150  # in a process that is there already, a few take no time


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from emloc_ray.ui.cli import main; main()", *arguments]
    with log.open("wb") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_heed_interrupts
        )


def _heed_interrupts() -> None:
    """What a shell without job control begins in the background ignores them, and so would all that it begins."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def descendants(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_an_interrupted_training_goes_on_with_the_same_command(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], task_file: Path, sent: signal.Signals
) -> None:
    terminated = sent == signal.SIGTERM  # which has the training save a checkpoint, as soon as it looks
    steps = 3 * STEPS if terminated else STEPS
    values = make_values(
        tmp_path / "run",
        tiny_model_dir("llama"),
        task_file,
        finetune={"num_workers": 1, "max_steps": steps, "save_steps": steps if terminated else 1},
        calibration={"num_workers": 1},
        ray={"num_cpus": 2},
    )
    config = tmp_path / "config.yaml"
    config.write_text(write_yaml(values))
    arguments, log = ["finetune", str(config)], tmp_path / "log.txt"
    training = tmp_path / "run" / "training"

    process = start(arguments, log)
    own: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + SECONDS
        while not any(file.read_text().count("\n") >= 5 for file in training.glob("*.log.jsonl")):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        own = descendants(process)
        assert any(p.name().startswith("ray::") for p in own)
        (os.kill if terminated else os.killpg)(process.pid, sent)
        assert process.wait(60) == 128 + sent
    finally:
        process.kill()
    assert log.read_text().splitlines()[-1] == ("Stopped. Finished stages stay; the same command continues from there.")
    assert "Traceback" not in log.read_text()
    _, alive = psutil.wait_procs(own, timeout=15)
    assert [p.name() for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
    run = RunDirectory(tmp_path / "run")
    assert run.holder() is None
    told = read_status(run).lines()
    assert told[0].startswith("Not running: stopped, in finetune, ")
    assert told[-1].startswith("To continue, give the same command: emloc-ray run ")
    assert set(run.manifest()["stages"]) == {"data", "calibrate", "factorize"}
    saved = [int(place.name.removeprefix("checkpoint-")) for place in training.glob("finetune-*/checkpoint-*")]
    assert 1 <= max(saved) < steps  # from which it goes on

    process = start(arguments, log)
    try:
        assert process.wait(SECONDS) == 0, log.read_text()
    finally:
        process.kill()
    assert "Fine-tuning" in log.read_text()
    assert log.read_text().count("done before, inputs unchanged") == 3
    assert [line["step"] for line in run.metrics()["finetune"]["history"]] == list(range(1, steps + 1))
    assert (tmp_path / "run" / "adapter_emulator" / "adapter_model.safetensors").is_file()
