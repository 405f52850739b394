"""Ctrl-C on the real command, as a terminal sends it: to every process of the foreground group; SIGTERM, as Kubernetes does."""

from __future__ import annotations

import json
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
from emloc_ray.runs.status import status_lines

SECONDS = 240
STEPS, SAVE_STEPS = 600, 50  # a stop is seen within a second, which is some hundred steps of a fast machine


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


def works(process: psutil.Process) -> bool:
    """Whether it has not ended; one that has may stay a zombie, as who adopted it may not wait for it."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def logged(training: Path) -> list[int]:
    """The steps in a training's log, those twice that were done again."""
    lines = (line for log in training.glob("*.log.jsonl") for line in log.read_text().splitlines())
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def saved(training: Path) -> int:
    """The newest checkpoint's step."""
    return max(int(place.name.removeprefix("checkpoint-")) for place in training.glob("*/finetune-*/checkpoint-*"))


def interrupt(sent: signal.Signals, arguments: list[str], log: Path, run: Path) -> int:
    """Starts the command, stops it once it has logged some steps after a checkpoint, and gives the last of these."""
    training = run / "training"
    due = max(len(logged(training)), SAVE_STEPS) + 5
    process = start(arguments, log)
    own: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + SECONDS
        while len(logged(training)) < due:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        own = descendants(process)
        assert any(p.name().startswith("ray::") for p in own)
        step = logged(training)[-1]
        (os.kill if sent == signal.SIGTERM else os.killpg)(process.pid, sent)
        assert process.wait(60) == 128 + sent
    finally:
        process.kill()
    assert log.read_text().splitlines()[-1] == ("Stopped. Finished stages stay; the same command continues from there.")
    assert "Traceback" not in log.read_text()
    deadline = time.monotonic() + 15
    while (alive := [process.name() for process in own if works(process)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert alive == []
    assert RunDirectory(run).holder() is None
    told = status_lines(RunDirectory(run))
    assert told[0].startswith("Not running: stopped, in finetune, ")
    assert told[-1].startswith(f"To continue, give the same command: cd {Path.cwd()} && emloc-ray run ")
    assert set(RunDirectory(run).manifest()["stages"]) == {"data", "calibrate", "factorize"}
    return step


@pytest.mark.deep  # three starts of Ray
def test_an_interrupted_training_goes_on_with_the_same_command(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], task_file: Path
) -> None:
    run, log, config = tmp_path / "run", tmp_path / "log.txt", tmp_path / "config.yaml"
    values = make_values(
        run,
        tiny_model_dir("llama"),
        task_file,
        finetune={"num_workers": 1, "max_steps": STEPS, "save_steps": SAVE_STEPS},
        calibration={"num_workers": 1},
        ray={"num_cpus": 2},
    )
    config.write_text(write_yaml(values))
    arguments = ["finetune", str(config)]

    interrupt(signal.SIGINT, arguments, log, run)
    assert SAVE_STEPS <= saved(run / "training") < STEPS
    # SIGTERM has the training save a checkpoint, as soon as it looks.
    step = interrupt(signal.SIGTERM, arguments, log, run)
    assert SAVE_STEPS < step <= saved(run / "training") < STEPS

    process = start(arguments, log)
    try:
        assert process.wait(SECONDS) == 0, log.read_text()
    finally:
        process.kill()
    assert "Fine-tuning" in log.read_text()
    assert log.read_text().count("done before, inputs unchanged") == 3
    history = RunDirectory(run).metrics()["finetune"]["history"]
    assert [line["step"] for line in history] == list(range(1, STEPS + 1))
    assert (run / "adapter_emulator" / "adapter_model.safetensors").is_file()
