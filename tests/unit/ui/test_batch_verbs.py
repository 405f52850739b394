"""A batch's state as it is read, and what its verbs say: true sentences, and no traceback, whatever they are given."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pyarrow.parquet as pq
import pytest
from cli_calls import Call, invoke
from faulting.s3 import uri
from rich.console import Console
from typer.testing import Result

from emloc_ray.errors import ArtifactError
from emloc_ray.io.formats.yaml_text import write_yaml
from emloc_ray.io.runs.cache import ArtifactCache
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.io.store.places import below
from emloc_ray.runs.batch import driver, summary
from emloc_ray.runs.batch.config import BatchConfig, TaskKeys
from emloc_ray.runs.batch.state import STATE, BatchState, TaskState, read_cancelled, read_state, write_state
from emloc_ray.runs.batch.tasks import read_batch
from emloc_ray.text import duration, size_up
from emloc_ray.ui import batch_verbs, page
from emloc_ray.ui.batch_table import BatchView, at_rest, batch_table, status_text

BEGIN = 1.8e9
TASKS = (
    TaskState("good", "done", "evaluate", seconds=60.0, train_loss=2.5, taken=("data",)),
    TaskState("bad", "failed", "finetune", reason="row 7 is bad."),
    TaskState("cut", "running", "finetune", (3, 10), active=True, started_at=BEGIN, seconds=90.0),
    TaskState("next"),
    TaskState("left", "cancelled"),
)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A batch's directory, as a driver that was killed leaves it."""
    run = RunDirectory(tmp_path / "sweep")
    run.create({}, kind="batch")
    write_state(run, BatchState(BEGIN, TASKS))
    return run


def refused(result: Result) -> str:
    assert result.exit_code == 2, (result.exception, result.output)
    return " ".join(result.stderr.split())


# What is written, and what may stand there instead.


def test_a_state_comes_back(run: RunDirectory) -> None:
    assert read_state(run) == BatchState(BEGIN, TASKS)


def test_only_the_parts_that_changed_are_written_again(run: RunDirectory) -> None:
    before = BatchState(BEGIN, tuple(TaskState(f"t{number}") for number in range(120)))
    write_state(run, before)
    inodes = {file.name: file.stat().st_ino for file in run.root.glob("batch*.json")}
    after = replace(before, tasks=(*before.tasks[:70], TaskState("t70", "done"), *before.tasks[71:]))
    write_state(run, after, before)
    assert read_state(run) == after
    assert {file.name for file in run.root.glob("batch*.json") if file.stat().st_ino != inodes[file.name]} == {
        "batch-001.json"
    }
    run.path("batch-002.json").unlink()
    with pytest.raises(ArtifactError, match="damaged"):
        read_state(run)


@pytest.mark.parametrize(
    "values",
    [
        {"units": []},
        {"status": "late"},
        {"started_at": "yesterday"},
        {"train_loss": "low"},
        {"planned_bytes": "many"},
        {"taken": None},
        {"name": None},
    ],
)
def test_a_state_of_other_values_is_told(run: RunDirectory, values: dict[str, Any]) -> None:
    path = run.path(STATE if "started_at" in values else "batch-000.json")
    written = json.loads(path.read_text())
    (written if "started_at" in values else written[0]).update(values)
    path.write_text(json.dumps(written))
    with pytest.raises(ArtifactError, match="is of another version of emloc_ray, or damaged"):
        read_state(run)
    result = invoke("status", str(run.root))
    assert (result.exit_code, type(result.exception)) == (1, SystemExit), result.output


# The table.


def shown(state: BatchState, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(batch_table(state, now=BEGIN + 1e6, width=width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_what_nobody_runs_is_not_running(run: RunDirectory) -> None:
    output = invoke("status", str(run.root)).stdout
    (line,) = (line for line in output.splitlines() if line.strip().startswith("cut"))
    assert "interrupted in finetune" in line
    assert duration(90).replace(" ", "\u00a0") in line  # not the time since
    assert "running" not in output.replace("Not running.", "")
    run.lock()
    try:
        assert "1 running" in invoke("status", str(run.root)).stdout
    finally:
        run.unlock()
    assert at_rest(BatchState(BEGIN, TASKS)).count("running") == 0


def test_a_running_task_s_time_is_that_of_its_stages_without_its_waits() -> None:
    waits = TaskState("waits", "running", "finetune", started_at=BEGIN, seconds=100.0, stage_began_at=BEGIN)
    works = replace(waits, name="works", active=True, stage_began_at=BEGIN + 1e6 - 200)
    lines = shown(BatchState(BEGIN, (waits, works)), 200)
    took = {line.split()[0]: line for line in lines if line.split()[:1] in (["waits"], ["works"])}
    assert duration(100).replace(" ", "\u00a0") in took["waits"]
    assert duration(300).replace(" ", "\u00a0") in took["works"]


def test_who_waits_for_another_task_says_so() -> None:
    waits = TaskState("a", "running", "calibrate", waits_for="another")
    assert status_text(waits) == "waits for another's calibrate"
    assert status_text(replace(waits, waits_for="resources")) == "waits for calibrate"
    assert status_text(replace(waits, status="cancelled")) == "cancelled in calibrate"


def test_a_batch_whose_ray_starts_is_one(tmp_path: Path) -> None:
    starting = RunDirectory(tmp_path / "sweep")
    starting.create({}, kind="batch")
    assert "no tasks yet" in invoke("status", str(starting.root)).stdout
    assert "has no tasks yet: try again once" in refused(invoke("cancel", str(starting.root), "a"))
    assert invoke("report", str(starting.root)).exit_code == 0
    assert "emloc_ray batch" in starting.path("report.html").read_text()


def test_a_long_name_takes_few_lines() -> None:
    name = "compression_ratio=0.5-" * 5
    state = TaskState(name, "running", "calibrate", (10, 99), active=True, stage_began_at=BEGIN)
    tasks = (replace(state, train_loss=2.5, planned_bytes=2**30),)
    lines = shown(BatchState(BEGIN, tasks), 80)
    below = next(number for number, line in enumerate(lines) if "──" in line) + 1
    rows = [line.split()[0] for line in lines[below:] if line.strip()]
    assert "".join(rows) == name
    assert len(rows) <= 4
    assert "remarks" in " ".join(shown(BatchState(BEGIN, tasks), 200))


def test_a_place_that_is_a_file_or_lies_below_one_is_no_batch_s(call: Call, tmp_path: Path) -> None:
    (tmp_path / "afile").touch()
    call.config.write_text(write_yaml(call.values))
    for place in (tmp_path / "afile", tmp_path / "afile" / "sweep"):
        many = tmp_path / "many.yaml"
        many.write_text(write_yaml({"base": str(call.config), "run_dir": str(place), "tasks": [{"name": "a"}]}))
        assert f"{tmp_path}/afile is a file, not a directory" in refused(invoke("batch", str(many)))
        assert "is no batch's directory" in refused(invoke("cancel", str(place), "a"))


def test_a_line_says_what_a_task_became_and_not_what_it_was_before() -> None:
    console = Console(file=io.StringIO(), width=200)
    with BatchView(console) as view:
        for status in ("done", "running", "done"):
            view.show(BatchState(BEGIN, (TaskState("a", status), TaskState("b"))))
    assert console.file.getvalue().splitlines() == ["… a begins", "✓ a done in 0 s"]  # type: ignore[attr-defined]


def test_the_table_that_was_watched_is_left_once(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(batch_verbs, "console", Console(file=screen, force_terminal=True, width=200))
    batch_verbs.show_batch(run, watch=True)
    before, _, after = screen.getvalue().rpartition("\x1b[2K")  # what erases a line of the live table
    assert before
    assert after.count("interrupted in finetune") == 1


# What is cancelled.


def test_a_batch_nobody_runs_leaves_out_what_is_cancelled_and_takes_it_up_again(run: RunDirectory) -> None:
    for name in ("bad", "cut", "next"):
        stdout = invoke("cancel", str(run.root), name).stdout
        assert f"{name}: the next emloc-ray batch skips it." in stdout
    assert "cut: the next emloc-ray batch runs it." in invoke("cancel", str(run.root), "cut", "--undo").stdout
    assert read_cancelled(run) == {"bad", "next"}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("good", "good is done already: there is nothing to cancel."),
        ("bad", "bad is failed already: there is nothing to cancel."),
        ("left", "left is cancelled already: there is nothing to cancel."),
        ("nobody", "has no task nobody"),
    ],
)
def test_what_is_over_is_not_cancelled_in_a_batch_that_runs(run: RunDirectory, name: str, sentence: str) -> None:
    run.lock()
    try:
        assert sentence in refused(invoke("cancel", str(run.root), "next", name))
        assert read_cancelled(run) == set()
        result = invoke("cancel", str(run.root), "cut")
        assert "cut: cancelled; a running task ends as soon as its stage can stop." in result.stdout
        assert "undo once that is over" in refused(invoke("cancel", str(run.root), "cut", "--undo"))
    finally:
        run.unlock()


def test_what_is_not_cancelled_is_not_taken_up_again(run: RunDirectory) -> None:
    assert "good is done, not cancelled" in refused(invoke("cancel", str(run.root), "good", "--undo"))


def test_what_is_no_batch_has_no_tasks_to_cancel(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "plain").create({})
    for place in (tmp_path, tmp_path / "plain"):
        assert "is no batch's directory" in refused(invoke("cancel", str(place), "a"))


def test_a_batch_that_runs_is_not_run_twice(write: Write, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "runs" / "many")
    run.create({}, kind="batch")
    run.lock()
    try:
        assert "stop that with Ctrl-C, then give this command again" in refused(invoke(*write()[:2]))
        assert "The batch is valid" in invoke(*write()).stdout
    finally:
        run.unlock()


# A batch that is checked.

Write = Callable[..., tuple[str, ...]]


@pytest.fixture
def write(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> Write:
    """``batch`` with a good batch file of one task and these values."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"add {i}: ", "completion": f"it is {i}"}) + "\n" for i in range(20)))
    base = {
        "run_dir": "unused",
        "model": {"source": str(tiny_model_dir("llama"))},
        "data": {"train": {"path": str(rows)}, "format": "prompt_completion", "max_seq_length": 64},
    }
    (tmp_path / "base.yaml").write_text(json.dumps(base))

    def get(**values: Any) -> tuple[str, ...]:
        batch = {"base": "base.yaml", "run_dir": str(tmp_path / "runs" / "many"), "tasks": [{"name": "a"}], **values}
        (tmp_path / "batch.yaml").write_text(json.dumps(batch))
        return "batch", str(tmp_path / "batch.yaml"), "--dry-run"

    return get


@pytest.mark.parametrize("name", ["x[red]y", "x[b]y", "[", "x\\"])
def test_a_dry_run_says_that_all_is_good(write: Write, tmp_path: Path, name: str) -> None:
    result = invoke(*write(run_dir=str(tmp_path / "runs" / name)))
    assert result.exit_code == 0, (result.exception, result.output)
    assert f"{name}: 1 task, about" in result.stdout
    assert f"in {tmp_path}/runs/{name}" in result.stdout
    assert "The batch is valid; nothing was started." in result.stdout
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_looks_at_first_rows_and_remarks_once_with_the_tasks(write: Write) -> None:
    short = {"name": "short", "data.max_seq_length": 2}
    assert "task short: data.max_seq_length 2 leaves none of the first" in refused(
        invoke(*write(tasks=[{"name": "a"}, short]))
    )
    grouped = [{"name": name, "emulator.group_size": 32} for name in ("b", "c")]
    said = invoke(*write(tasks=[{"name": "a"}, *grouped])).stdout
    assert said.count("emulator.group_size") == 1
    assert "task b, c: emulator.group_size" in said


def test_a_dry_run_says_what_each_task_copies_in_a_bucket(write: Write, s3_port: int, node_cache: Path) -> None:
    def copied(count: int) -> float:
        tasks = [{"name": f"t{number}"} for number in range(count)]
        said = invoke(*write(run_dir=uri(s3_port, "copied/many"), tasks=tasks)).stdout
        number, unit = said.partition("of what tasks share, ")[2].split()[:2]
        return float(number) * {"KiB": 2**10, "MiB": 2**20}[unit]

    assert copied(3) == pytest.approx(3 * copied(1), rel=0.1) != 0
    assert "of what tasks share" not in invoke(*write()).stdout


def test_tasks_that_fill_a_disk_together_are_told_before_any_begins(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [{"name": f"t{number}"} for number in range(3)]
    assert "together" not in invoke(*write(tasks=tasks)).stdout
    one = driver.prepare_batch(read_batch(write(tasks=tasks[:1])[1]))
    fits = one.work.own_disk(one.batch.tasks[0])
    monkeypatch.setattr(driver, "free_disk", lambda run: fits)
    assert "together" not in invoke(*write(tasks=tasks[:1])).stdout
    said = invoke(*write(tasks=tasks)).stdout
    assert f"! All tasks together write about {size_up(3 * fits)} besides what they share, and the disk" in said
    assert "The batch is valid" in said


def test_a_full_disk_at_the_end_hides_no_reason(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_full(path: Path) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(driver, "run_batch", lambda *_, **__: BatchState(BEGIN, TASKS))
    monkeypatch.setattr(summary, "atomic_file", is_full)
    monkeypatch.setattr(page, "write_bytes", lambda path, content: is_full(path))
    result = invoke(*write()[:2])
    assert "good" in result.stdout
    assert result.exit_code == 1
    said = " ".join(result.stderr.split())
    assert "bad: failed in finetune: row 7 is bad." in said
    assert said.count("the disk is full at") == 2
    assert "1 of 5 tasks failed: the same command tries again." in said


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (SystemExit(15), 143)])
def test_a_stopped_batch_has_its_results_so_far(
    write: Write, monkeypatch: pytest.MonkeyPatch, stop: BaseException, code: int
) -> None:
    def run_batch(prepared: driver.PreparedBatch, *_: Any, **__: Any) -> NoReturn:
        prepared.run.create({}, kind="batch")
        write_state(prepared.run, BatchState(BEGIN, TASKS))
        raise stop

    monkeypatch.setattr(driver, "run_batch", run_batch)
    called = write()
    assert invoke(*called[:2]).exit_code == code
    root = Path(json.loads(Path(called[1]).read_text())["run_dir"])
    rows = pq.read_table(root / summary.SUMMARY).to_pylist()
    assert [row["status"] for row in rows] == ["done", "failed", "waiting", "waiting", "cancelled"]
    assert (root / "report.html").exists()


def test_a_report_renews_the_summary(run: RunDirectory) -> None:
    assert invoke("report", str(run.root)).exit_code == 0
    assert [row["name"] for row in pq.read_table(run.path(summary.SUMMARY)).to_pylist()] == [
        task.name for task in TASKS
    ]


def test_a_tag_across_a_path_is_text(write: Write, tmp_path: Path) -> None:
    result = invoke(*write(run_dir=str(tmp_path / "runs" / "x[" / "b]y")))
    assert "x[/b]y" in result.stdout, result.exception


def test_a_dry_run_finds_places_that_cannot_be_had(write: Write, tmp_path: Path) -> None:
    assert "cannot be written" in refused(invoke(*write(cache={"path": "/proc/emloc-ray-cache"})))
    RunDirectory(tmp_path / "runs" / "many").create({})
    assert "holds a run, no batch" in refused(invoke(*write()))


def test_a_task_s_key_on_the_command_line_is_told(write: Write) -> None:
    assert "each task has for itself: set it in tasks or grid" in refused(invoke(*write(), "priority=3"))


def test_the_help_names_every_key() -> None:
    words = invoke("batch", "--help").stdout.replace("(", " ").replace(")", " ").replace(",", " ").split()
    assert {*BatchConfig.model_fields, *TaskKeys.model_fields} <= set(words)


def test_a_batch_is_fetched_beside_what_is_no_task_of_it(
    s3_port: int, node_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = RunDirectory(uri(s3_port, "fetched/many"))
    batch.create({}, kind="batch")
    RunDirectory(below(batch.place, "tasks", "new")).create({"model": {}, "data": {}})
    (tmp_path / "many" / "tasks" / "removed").mkdir(parents=True)
    (tmp_path / "many" / "tasks" / "notes.txt").touch()
    cards: list[str] = []
    monkeypatch.setattr("emloc_ray.ui.cards.write_cards", lambda run, copy: cards.append(run.manifest() and copy.name))
    fetched = invoke("fetch", batch.place, str(tmp_path / "many"))
    assert fetched.exit_code == 0, (fetched.output, fetched.exception)
    assert cards == ["new"]


# A cache.


def test_a_place_that_is_no_cache_is_told(tmp_path: Path) -> None:
    for call in (["list"], ["prune", "--max-size", "0"]):
        assert "holds no artifact cache" in refused(invoke("cache", call[0], str(tmp_path / "mistyped"), *call[1:]))


def test_an_origin_is_text(tmp_path: Path) -> None:
    cache = ArtifactCache(str(tmp_path / "cache"))
    assert cache.add("data", ArtifactCache.key("data", 1), tmp_path / "[b]x", {}, {}, {}) is None
    result = invoke("cache", "list", cache.place)
    assert "[b]x" in result.stdout, result.exception
    assert "1 entry, " in result.stdout
