from __future__ import annotations

import contextlib
import json
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from emloc_ray.errors import StageError
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.runs.log import LOG, RunLog
from emloc_ray.runs.status import asked_steps, status_lines
from emloc_ray.ui.cli import app

BEGUN = datetime(2026, 5, 1, 12, 0, tzinfo=timezone.utc)
COMMAND = "emloc-ray run my.yaml finetune.max_steps=5 --fresh --from merge --from=correct"


def write(run: RunDirectory, *events: dict[str, Any]) -> None:
    """Events a second apart, after one that begins the run."""
    first = {"event": "run_started", "message": "The run begins.", "command": COMMAND, "directory": "/home/me"}
    with run.path(LOG).open("a") as file:
        for number, event in enumerate([first, *events]):
            when = (BEGUN + timedelta(seconds=number)).isoformat()
            file.write(json.dumps({"time": when, "message": "Something.", **event}) + "\n")


def lines(run: RunDirectory, seconds: float = 60) -> list[str]:
    return status_lines(run, BEGUN + timedelta(seconds=seconds))


def test_a_live_run_shows_who_holds_it_and_how_far_it_is(run: RunDirectory) -> None:
    progress = {"event": "progress", "stage": "calibrate", "done": 3, "total": 8, "message": "calibrate: 3 of 8"}
    write(run, {"event": "started", "stage": "calibrate"}, progress)
    run.lock()
    try:
        first, second = lines(run)
    finally:
        run.unlock()
    assert first.startswith("Running: process ")
    assert first.endswith(", in calibrate, 3 of 8")
    assert second == "Last event, 58 s ago: calibrate: 3 of 8"


def test_a_run_that_is_started_again_is_in_none_of_the_stages_of_the_tries_before(run: RunDirectory) -> None:
    """From its lock on, while Ray starts."""
    stage = {"stage": "finetune"}
    died = {"event": "run_failed", "message": "finetune: no.", **stage}
    write(run, {"event": "run_started", "process": "process 0 on elsewhere"}, {"event": "started", **stage}, died)
    run.lock()
    try:
        first, second = lines(run)
    finally:
        run.unlock()
    assert first.startswith("Running: process ")
    assert first.endswith("; it has begun no stage yet")
    assert second == "An earlier try failed in finetune, 57 s ago: finetune: no."


def test_a_killed_run_says_where_it_was_and_how_it_goes_on(run: RunDirectory) -> None:
    write(run, {"event": "started", "stage": "merge"})
    first, last, go_on = lines(run, 7200)
    assert first == "Not running: its process was killed in merge, or its machine was lost."
    assert last == "Last event, 2.0 h ago: Something."
    assert go_on == "To continue, give the same command: cd /home/me && emloc-ray run my.yaml finetune.max_steps=5"


def test_a_failed_run_says_its_sentence(run: RunDirectory) -> None:
    with contextlib.suppress(StageError), RunLog(run) as log:
        log.start("finetune")
        raise StageError("finetune: the disk is full: free some and run the same command again.")
    told = status_lines(run)
    assert told[0] == "Not running."
    assert told[1].startswith("Failed in finetune, ")
    assert told[1].endswith(": finetune: the disk is full: free some and run the same command again.")
    config = run.path("config.yaml").absolute()  # begun from Python, not by a command line
    assert told[2] == f"To continue, give the same command: cd {Path.cwd()} && emloc-ray run {config}"


@pytest.mark.parametrize(
    "override",
    [
        "ray.runtime_env.env_vars.WANDB_KEY=hush",
        "ray.runtime_env.env_vars={WANDB_KEY: hush}",
        "ray={runtime_env: {env_vars: {WANDB_KEY: hush}}}",
        "ray.runtime_env.env_vars.WANDB_KEY={hush",
    ],
)
def test_secrets_of_the_command_are_hidden_and_asked_for(
    run: RunDirectory, override: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["/bin/emloc-ray", "run", "my.yaml", "finetune.max_steps=5", override])
    with contextlib.suppress(KeyboardInterrupt), RunLog(run):
        raise KeyboardInterrupt
    assert "hush" not in run.path(LOG).read_text()
    told = lines(run)[-1]
    assert told.startswith("To continue, give the same command, with the values for which (hidden) stands: cd ")
    assert "emloc-ray run my.yaml finetune.max_steps=5 'ray" in told
    assert "WANDB_KEY" in told


def test_secrets_of_a_call_are_asked_for(run: RunDirectory) -> None:
    run.create({"ray": {"runtime_env": {"env_vars": {"WANDB_KEY": "hush"}}}})
    told = lines(run)[-1]
    assert "with the values for which (hidden) stands: emloc-ray run " in told
    assert told.endswith("config.yaml 'ray.runtime_env.env_vars.WANDB_KEY=(hidden)'")


def test_what_a_later_try_made_good_is_no_failure(run: RunDirectory) -> None:
    write(run, {"event": "run_failed", "stage": "merge", "message": "merge: no."})
    write(run, {"event": "started", "stage": "merge"})
    assert any(line.startswith("An earlier try failed in merge") for line in lines(run))
    write(run, {"event": "finished", "stage": "merge"}, {"event": "run_finished", "message": "The run has ended well."})
    assert lines(run) == ["Not running.", "Last event, 58 s ago: The run has ended well."]


def test_a_stopped_run(run: RunDirectory) -> None:
    write(run, {"event": "started", "stage": "merge"}, {"event": "run_stopped", "message": "The run was stopped."})
    assert lines(run)[0] == "Not running: stopped, in merge."
    assert "To continue" in lines(run)[-1]


def test_a_run_without_a_log(run: RunDirectory) -> None:
    assert lines(run)[0] == "Not running."
    assert len(lines(run)) == 2


def test_the_steps_are_those_that_the_run_wrote_down() -> None:
    """Or those that it has done, where an older version wrote none down."""
    assert asked_steps({"stages": {"merge": {}}, "steps": ["data", "merge"]}) == ("data", "merge")
    assert asked_steps({"stages": {"merge": {}, "data": {}}}) == ("data", "merge")


def test_the_verb_lists_what_is_done_and_what_is_asked_for(run: RunDirectory) -> None:
    steps = ("import", "data", "calibrate", "gradients", "merge")
    run.create({}, steps=steps)
    run.commit("import", "", [], {"usage": {"wall_s": 2.0, "peak_pss_bytes": 2**30}})
    run.commit("data", "", [], {"usage": {"wall_s": 12.5, "peak_pss_bytes": 2**30}})
    told = CliRunner().invoke(app, ["status", str(run.root)], env={"COLUMNS": "200"})
    assert told.exit_code == 0, told.output
    marks = [line.split()[:2] for line in told.output.splitlines() if line[:1] in "✓·"]
    done = {"import", "data"}
    assert marks == [["✓" if step in done else "·", step] for step in steps]
    assert "12 s" in told.output


def test_the_verb_names_the_trace(run: RunDirectory) -> None:
    run.create({})
    before = CliRunner().invoke(app, ["status", str(run.root)]).output
    run.path("trace.json").write_text("{}")
    after = CliRunner().invoke(app, ["status", str(run.root)]).output
    assert [f"{run.place}/trace.json" in output for output in (before, after)] == [False, True]
