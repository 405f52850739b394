"""The command line: what its verbs show, and what a run that fails or is stopped tells."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cli_calls import VERBS, Call, invoke

import emloc_ray
from emloc_ray.config.reading import load_config
from emloc_ray.errors import NumericsError
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.io.store.turns import own_name
from emloc_ray.planning.alternatives import Choice
from emloc_ray.runs import run as pipeline
from emloc_ray.runs.log import RunLog

pytestmark = pytest.mark.usefixtures("no_ray")


def test_a_bad_call_is_code_2(call: Call) -> None:
    assert call("run", "--until", "sometime").exit_code == 2
    assert invoke("run").exit_code == 2
    assert invoke("dance").exit_code == 2


@pytest.mark.parametrize("verb", [*VERBS, "status", "report"])
def test_every_verb_has_help(verb: str) -> None:
    result = invoke(verb, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout
    assert verb in invoke("--help").stdout


def test_validate_says_what_it_found_and_writes_nothing(call: Call) -> None:
    result = call("validate", "emulator.target_modules=[q_proj, down_proj]")
    assert result.exit_code == 0, result.output
    assert "4 of 14 linears compressed, 14 adapted" in " ".join(result.stdout.split())
    assert not call.run_dir.parent.exists()


def test_plan_shows_shapes_ranks_parameters_and_stages(call: Call) -> None:
    result = call("plan")
    assert result.exit_code == 0, result.output
    lines = {line.split("│")[1].strip(): line for line in result.stdout.splitlines() if line.count("│") > 3}
    # 64 × 64 at half its parameters: ⌊0.5 · 4096 / 128⌋ = 16; down_proj 64 × 128: ⌊0.5 · 8192 / 192⌋ = 21.
    assert [part.strip() for part in lines["q_proj"].split("│")[2:6]] == ["64 × 64", "2", "16", "8,192"]
    assert [part.strip() for part in lines["down_proj"].split("│")[2:6]] == ["64 × 128", "2", "21", "16,384"]
    for stage in ("calibrate", "factorize", "finetune", "correct", "merge", "evaluate", "together"):
        assert stage in lines
    assert not call.run_dir.parent.exists()


def test_the_overrides_that_plan_recommends_are_a_shell_s_words(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["memory_budget=24GiB", "emulator.budget=2 bits", "emulator.target_modules=[q_proj]"]
    monkeypatch.setattr(Choice, "overrides", property(lambda choice: overrides))
    said = call("plan", "adapter.r=2", "--memory-budget", "2GiB").stdout.splitlines()
    assert shlex.split(said[-1]) == ["adapter.r=2", *overrides]  # what it was planned with is part of the run


def test_plan_at_ratio_one_keeps_everything_dense(call: Call) -> None:
    result = call("plan", "emulator.compression_ratio=1.0")
    assert result.exit_code == 0, result.output
    assert "dense" in result.stdout
    assert "1.000" in result.stdout


def test_within_a_budget_plan_shows_what_else_could_be_trained_on(call: Call) -> None:
    result = call("plan", "--memory-budget", "2GiB")
    assert result.exit_code == 0, result.output
    assert "the original, its blocks offloaded" in result.stdout
    assert "train on the original, " in result.stdout
    assert "no emulator is needed" in result.stdout
    assert "memory_budget=2GiB emulator.compression_ratio=1 " in result.stdout
    assert "The stages above are those of what is recommended; emloc-ray run " in result.stdout
    assert "The stages above are the config's own;" in call("plan", "memory_budget=2GiB").stdout
    planned = emloc_ray.plan(load_config(call.config), memory_budget="2GiB")
    assert planned.choice is not None
    assert planned.choice.sentence in result.stdout
    assert planned.prepared.config.emulator.compression_ratio == 1
    assert [stage.name for stage in planned.stages] == ["data", "factorize", "finetune", "correct", "merge", "evaluate"]
    as_written = emloc_ray.plan(planned.choice.asked)
    assert as_written.choice is not None
    assert as_written.prepared.config.emulator.compression_ratio == 0.5
    assert emloc_ray.plan(load_config(call.config)).choice is None


def test_status_of_no_run_and_of_one_that_has_begun(call: Call, tmp_path: Path) -> None:
    result = invoke("status", str(tmp_path))
    assert result.exit_code == 2
    assert "it is no run directory" in result.stderr
    run = RunDirectory(call.run_dir)
    run.create({}, steps=["data", "merge"])
    usage = {"wall_s": 12.5, "peak_pss_bytes": 2**30, "peak_rss_bytes": 2**30, "peak_gpu_bytes": 2**31}
    run.commit("data", "abc", [], {"usage": usage, "splits": {}})
    result = invoke("status", str(call.run_dir))
    assert result.exit_code == 0, result.output
    done = next(line for line in result.stdout.splitlines() if "data" in line)
    assert "12 s" in done
    assert done.endswith("1.00 GiB, 2.00 GiB of a GPU")
    assert "merge" in result.stdout
    assert "not done" in result.stdout
    assert "Not running." in result.stdout
    run.write_metrics({"planned_memory": {"data": 3 * 2**30}, "planned_imports_bytes": 2**29})
    assert "planned" not in invoke("status", str(call.run_dir)).stdout  # of which the GPU's part is not known
    run.write_metrics({"planned_memory": {"data": 3 * 2**30}, "planned_gpu_bytes": {"data": 5 * 2**29}})
    assert "2.00 GiB of a GPU (planned 2.50 GiB)" in invoke("status", str(call.run_dir)).stdout
    run.lock()
    try:
        assert "Running: process" in invoke("status", str(call.run_dir)).stdout
    finally:
        run.unlock()


def test_status_of_a_run_whose_ray_is_starting(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(call.run_dir)
    call.config.write_text(f"run_dir: {run.place}")
    assert (
        f"{call.config} has no run in {run.place} yet: emloc-ray run {call.config} starts one"
        in invoke("status", str(call.config)).stderr
    )
    run.lock()
    try:
        shown, refused = invoke("status", run.place), invoke("report", run.place)
        monkeypatch.setattr(time, "sleep", lambda seconds: run.create({}) or run.unlock())
        watched = invoke("status", "--watch", run.place)
    finally:
        run.unlock()
    assert (shown.exit_code, shown.stdout) == (0, f"Running: {own_name()}; no stage has begun.\n")
    assert f"{own_name()} starts it, and no stage has begun: ask again later." in refused.stderr
    assert watched.stdout.splitlines()[1] == "Not running.", watched.output


def test_status_of_a_run_whose_ray_did_not_start(call: Call) -> None:
    run = RunDirectory(call.run_dir)
    run.lock()
    run.unlock()
    assert "is of a run that did not start: give its command again" in invoke("status", run.place).stderr


def test_report_of_a_run_that_has_only_begun(tmp_path: Path) -> None:
    place = tmp_path / ("run" * 70)
    RunDirectory(place).create({})
    result = invoke("report", str(place))
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.stdout == f"{place}/report.html\n"
    assert "<html" in (place / "report.html").read_text()
    assert invoke("report", str(tmp_path)).exit_code == 2


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/r/report.html"),
            "the disk is full at /r/report.html: free some and run the same command again.",
        ),
        (
            PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/r/report.html"),
            "/r/report.html cannot be read or written (Permission denied): see to it, then run the same command again.",
        ),
        (
            ConnectionError("https://me:secret@host\nis gone"),
            "A file or a host cannot be reached (https://(hidden)@host is gone): see to it, then run the same command again.",
        ),
    ],
    ids=["full", "closed", "no file"],
)
def test_what_the_system_refuses_is_one_sentence_and_code_1(
    call: Call, monkeypatch: pytest.MonkeyPatch, error: OSError, told: str
) -> None:
    def refuse(run: RunDirectory) -> None:
        raise error

    RunDirectory(call.run_dir).create({})
    monkeypatch.setattr("emloc_ray.ui.page.write_report", refuse)
    result = invoke("report", str(call.run_dir))
    assert (result.exit_code, result.stderr) == (1, f"Error: {told}\n")


def test_a_failed_run_is_one_sentence_and_code_1(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise NumericsError("model.layers.0 holds NaN [in row 3].")

    monkeypatch.setattr(pipeline, "run", fail)
    result = call("run")
    assert result.exit_code == 1
    first, second = result.stderr.splitlines()
    assert first == "Error: model.layers.0 holds NaN [in row 3]."
    assert second.endswith(f"Finished stages stay in {call.run_dir}; the same command continues from there.")
    second = call("run", "--fresh", "--from", "calibrate").stderr.splitlines()[1]
    assert second.endswith("; the same command without --fresh, --from continues from there.")


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (SystemExit(15), 143)])
def test_a_stopped_run_is_no_failure(
    call: Call, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(pipeline, "run", interrupt)
    result = call("run")
    assert result.exit_code == code
    assert result.stderr.splitlines() == ["Stopped. Finished stages stay; the same command continues from there."]
    for verb, option in (("run", "--fresh"), ("merge", "--fresh"), ("run", "--from=merge")):
        left_out = option.partition("=")[0]
        assert f"; the same command without {left_out} continues" in call(verb, option).stderr


def test_who_stops_watching_stops_no_run(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    run = RunDirectory(call.run_dir)
    run.create({})
    run.lock()
    monkeypatch.setattr(time, "sleep", interrupt)
    try:
        stopped = invoke("status", "--watch", run.place)
    finally:
        run.unlock()
    assert (stopped.exit_code, stopped.stderr) == (130, "")


def test_half_of_a_character_that_an_error_quotes_is_shown_as_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("emloc_ray"), "propagate", False)  # to pytest, which cannot send it on
    run = RunDirectory(tmp_path / "run")
    run.create({})
    with contextlib.suppress(NumericsError), RunLog(run):
        raise NumericsError("row 3 holds \ud83d.")
    program = "import sys; from emloc_ray.ui.cli import main; main()"
    shown = subprocess.run([sys.executable, "-c", program, "status", run.place], capture_output=True, check=True)
    assert rb": row 3 holds \ud83d." in shown.stdout


def test_the_stages_verbs_say_how_far_to_go(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def note(config: Any, **options: Any) -> dict[str, Any]:
        asked.append((options["begin"], options["until"], options["fresh"], config.seed))
        return {"stages": {"data": {"peak_pss_bytes": 0, "wall_s": 0.0}}, "disk_bytes": {}}

    monkeypatch.setattr(pipeline, "run", note)
    assert call("factorize", "seed=7").exit_code == 0
    assert call("run", "--from", "calibrate", "--until", "merge", "--fresh").exit_code == 0
    assert asked == [(None, "factorize", False, 7), ("calibrate", "merge", True, 0)]


def test_an_empty_budget_is_told(call: Call) -> None:
    result = call("plan", "--memory-budget", "")
    assert result.exit_code == 2
    assert "--memory-budget is empty" in result.output


def test_keys_of_a_section_are_shown() -> None:
    shown = invoke("keys", "emulator")
    assert shown.exit_code == 0
    assert "uniform | sensitivity" in shown.stdout
    assert "num_teacher_logits" in shown.stdout  # of emulator.healing
    assert "lora_alpha" in invoke("keys").stdout
    unknown = invoke("keys", "tuning")
    assert unknown.exit_code == 2
    assert unknown.stderr.startswith("Error: There is no section or key tuning: take one of the sections model, data,")
