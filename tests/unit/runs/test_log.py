from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import shlex
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest
from faulting.s3 import uri

from emloc_ray.errors import DataError, NumericsError, Stopped
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.runs import log as run_log
from emloc_ray.runs.log import LOG, RunLog, read_events
from emloc_ray.runs.reporter import Reporter, Reporters
from emloc_ray.stages.ray.spans import timed

USAGE = {"wall_s": 2.5, "peak_pss_bytes": 10}
LAYER = "model.layers.3.mlp.gate_proj"


def fail(run: RunDirectory, stage: str, error: BaseException) -> None:
    """A try that an error ends in a stage."""
    with contextlib.suppress(type(error)), RunLog(run) as log:
        log.start(stage)
        raise error


def test_a_run_tells_its_stages_a_line_each(run: RunDirectory) -> None:
    result = {"layers": {LAYER: {"rank": 8}}}  # which may be thousands
    with RunLog(run) as log:
        log.skip("data")
        log.start("factorize")
        log.note("Thin data.")
        log.finish("factorize", result, USAGE)
    lines = [json.loads(line) for line in run.path(LOG).read_text().splitlines()]
    assert [line["event"] for line in lines] == [
        "run_started",
        "skipped",
        "started",
        "note",
        "finished",
        "run_finished",
    ]
    assert {line["run"] for line in lines} == {"mine"}
    assert [line.get("stage") for line in lines] == [None, "data", *["factorize"] * 3, None]
    assert lines[4]["wall_s"] == 2.5
    age = datetime.now(timezone.utc) - datetime.fromisoformat(lines[0]["time"])
    assert 0 <= age.total_seconds() < 60


def test_progress_does_not_flood(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunLog(run, interval_s=3600) as log:
        for stage in ("calibrate", "merge"):
            progress = log.start(stage)
            for done in range(1000):
                progress(done + 1, 1000)
            log.finish(stage, {}, USAGE)
    told = [(e["stage"], e["done"], e["total"]) for e in read_events(run) if e["event"] == "progress"]
    assert told == [("calibrate", 1, 1000), ("merge", 1, 1000)]
    ends = [(e["stage"], e["done"], e["total"]) for e in read_events(run) if e["event"] == "finished"]
    assert ends == [("calibrate", 1000, 1000), ("merge", 1000, 1000)]
    monkeypatch.setattr(run_log.time, "monotonic", lambda: 1000.0)  # each line costs some time, which is waited for
    with RunLog(run, interval_s=0) as log:
        progress = log.start("evaluate")
        progress(1, 3)
        progress(2, 3)
    told = [(e["stage"], e["done"], e["total"]) for e in read_events(run) if e["event"] == "progress"]
    assert told[2:] == [("evaluate", 1, 3), ("evaluate", 2, 3)]


def test_progress_says_how_it_is_going(run: RunDirectory) -> None:
    with RunLog(run, interval_s=0) as log:
        progress = log.start("finetune")
        log.detail("loss 1.5")
        progress(1, 3)
    assert [e["message"] for e in read_events(run) if e["event"] == "progress"] == ["finetune: 1 of 3, loss 1.5"]


def test_progress_of_a_long_stage_is_told_more_seldom(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(run_log.time, "monotonic", lambda: now)
    with RunLog(run, interval_s=10) as log:
        progress = log.start("calibrate")
        for second in range(0, 20_000, 5):
            now = 1000.0 + second
            progress(second, 20_000)
    told = [event["done"] for event in read_events(run) if event["event"] == "progress"]
    gaps = [after - before for before, after in itertools.pairwise(told)]
    assert gaps[:10] == [10] * 10
    assert max(gaps) == 300 == gaps[-1]
    assert len(told) < 150


def test_a_failure_is_told_with_its_stage(run: RunDirectory) -> None:
    fail(run, "factorize", NumericsError(f"{LAYER}: the Gram holds NaN: fix the data."))
    failed = read_events(run)[-1]
    assert (failed["event"], failed["stage"]) == ("run_failed", "factorize")
    assert failed["message"] == f"{LAYER}: the Gram holds NaN: fix the data."


def test_who_lost_the_run_adds_no_line(run: RunDirectory) -> None:
    run.lock()
    with RunLog(run) as log:
        log.note("mine")
        (run.root / ".lock").write_text("process 2 on here\nanother\n")
        log.note("late")
    assert [event["message"] for event in read_events(run) if event["event"] == "note"] == ["mine"]
    run.unlock()


def test_no_secret_is_told(run: RunDirectory) -> None:
    class Heard(Reporter):
        def note(self, text: str) -> None:
            notes.append(text)

    notes: list[str] = []
    token = "hf_" + "aBcDeFgHiJkLmNoPq" * 2
    Reporters(Heard()).note(f"{token} is refused.")
    assert notes == ["(hidden) is refused."]
    fail(run, "tokens", DataError(f"https://host/a.png?sig=aBc of {token}: fix it."))
    assert read_events(run)[-1]["message"] == "https://host/a.png?sig=(hidden) of (hidden): fix it."


def test_of_another_program_s_command_its_name_is_logged(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/home/me/sweep.py", "--db-password", "hunter2"])
    with RunLog(run):
        pass
    assert read_events(run)[0]["command"] == "sweep.py"


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(15), Stopped("at 3 of 50.")], ids=["Ctrl-C", "SIGTERM", "cancelled"]
)
def test_an_interrupt_is_no_failure(run: RunDirectory, error: BaseException) -> None:
    fail(run, "merge", error)
    assert read_events(run)[-1]["event"] == "run_stopped"


@pytest.mark.parametrize(
    "text", ["row 3 holds \u2028 and \x85", "row 3 holds \ud83d", "M\udcfcller/my.yaml is missing"]
)
def test_whatever_text_an_event_quotes_it_is_logged(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr("sys.argv", ["emloc-ray", "run", text])
    monkeypatch.setattr(logging.getLogger("emloc_ray"), "propagate", False)  # to pytest, which cannot send it on
    fail(run, "data", DataError(text))
    begun, _, failed = read_events(run)
    assert (shlex.split(begun["command"])[-1], failed["event"], failed["message"]) == (text, "run_failed", text)


def test_half_a_line_of_a_killed_process_spoils_no_other(run: RunDirectory) -> None:
    run.path(LOG).write_text('{"time": "2026-01-01T00:00:00+00:00", "event": "started", "mess')
    with RunLog(run):
        pass
    assert [event["event"] for event in read_events(run)] == ["run_started", "run_finished"]


def test_a_full_disk_is_not_told_by_the_log(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    run.path(LOG).symlink_to("/dev/full")
    with RunLog(run) as log:
        log.note("Something.")
    assert capsys.readouterr().err == ""


def test_records_reach_the_handlers_of_the_library_too(run: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), RunLog(run) as log:
        log.note("Something.")
    assert [(r.name, r.getMessage()) for r in caplog.records if r.levelno == logging.WARNING] == [
        ("emloc_ray.run", "Something.")
    ]


def test_a_log_on_a_store_is_read_elsewhere_while_it_grows(
    s3_port: int, node_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = uri(s3_port, "logs/mine")
    here = RunDirectory(place)
    here.create({})
    with RunLog(here, interval_s=0) as log:
        log.start("merge")(1, 2)
        monkeypatch.setenv("EMLOC_RAY_CACHE", str(tmp_path / "elsewhere"))
        elsewhere = RunDirectory(place)
        assert [e["event"] for e in read_events(elsewhere)] == ["run_started", "started", "progress"]
    with RunLog(elsewhere):
        pass
    assert [e["event"] for e in read_events(here)][3:] == ["run_finished", "run_started", "run_finished"]


def test_several_reporters_hear_all(run: RunDirectory, tmp_path: Path) -> None:
    other = RunDirectory(tmp_path / "other")
    other.create({})
    with RunLog(run, interval_s=0) as first, RunLog(other, interval_s=0) as second:
        both = Reporters(first, second)
        both.start("merge")(1, 2)
        both.note("Something.")
        both.finish("merge", {}, USAGE)
        both.skip("evaluate")
    heard = [[(e["event"], e["message"]) for e in read_events(directory)] for directory in (run, other)]
    assert heard[0] == heard[1]
    assert [event for event, _ in heard[0]][1:-1] == ["started", "progress", "note", "finished", "skipped"]
    assert {e["run"] for e in read_events(other)} == {"other"}


def test_a_tasks_time_comes_with_its_result() -> None:
    found = timed(math.hypot)(3, 4)
    assert found.result == 5
    assert found.span.begun_at <= found.span.finished_at <= time.time()
    assert found.span.worker.startswith(f"process {os.getpid()} on ")
