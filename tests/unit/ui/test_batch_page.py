"""A batch's report.html: self-contained, escaped, small for hundreds of tasks, and right for those that never began."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path

import pytest
from pages import LOADING, Page
from typer.testing import CliRunner

from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.runs.batch.state import BatchState, TaskState, write_state
from emloc_ray.ui import batch_page as report
from emloc_ray.ui.cli import app
from emloc_ray.ui.timeline import StageRun

BEGIN = 1.8e9
SECONDS = {
    "import": 2,
    "data": 3,
    "calibrate": 20,
    "factorize": 10,
    "finetune": 60,
    "correct": 5,
    "merge": 4,
    "evaluate": 30,
}
EVIL = '"><script>alert(1)</script><s title="x'


def stages(begin: float, *names: str, taken: tuple[str, ...] = ()) -> tuple[StageRun, ...]:
    """One after another, those that are taken in no time."""
    found = []
    for name in names or SECONDS:
        end = begin + (0 if name in taken else SECONDS[name])
        found.append(StageRun(name, begin, end, name in taken))
        begin = end
    return tuple(found)


def done(name: str, corrected: float = 3.0, begun: float = BEGIN, notes: int = 0) -> TaskState:
    times: dict[str, float] = {"started_at": begun, "ended_at": begun + 134, "seconds": 134.0}
    losses = {"original_loss": 4.0, "served_loss": corrected}
    return TaskState(name, "done", "evaluate", notes=notes, **times, **losses)  # type: ignore[arg-type]


def many(count: int) -> tuple[BatchState, dict[str, tuple[StageRun, ...]]]:
    names = [f"compression_ratio=0.5-learning_rate={number / 1000:.4f}" for number in range(count)]
    found = {name: stages(BEGIN + 10 * number, taken=("import", "data")) for number, name in enumerate(names)}
    tasks = (done(name, 3 + number / count, notes=1) for number, name in enumerate(names))
    return BatchState(BEGIN, tuple(tasks)), found


@pytest.fixture
def mixed() -> str:
    tasks = (
        done("first", 3.25, notes=2),
        done("second", 4.5),
        TaskState("third", "failed", "finetune", reason="row 7 is bad.", started_at=BEGIN, ended_at=BEGIN + 70),
        TaskState("fourth", "cancelled"),
    )
    found = {
        "first": stages(BEGIN),
        "second": stages(BEGIN + 10, taken=("import", "data", "calibrate")),
        "third": stages(BEGIN, "import", "data"),
    }
    return report.render_batch("sweep", BatchState(BEGIN, tasks), found)


def table(page: str) -> list[str]:
    rows = re.search(r"<tbody>(.*)</tbody>", page, re.DOTALL)
    assert rows
    return [" ".join(re.sub("<[^>]*>", " ", row).split()) for row in rows[1].split("</tr>")[:-1]]


def test_a_batch_is_told_in_a_sentence_and_a_table(mixed: str) -> None:
    page = Page(mixed)
    assert page.sections == ["timeline", "tasks"]
    assert (
        "4 tasks: 1 failed, 2 done, 1 cancelled; 2 min, in which stages worked for 4 min."
        " 3 of 18 finished stages came from the cache, where another run had put the same."
    ) in page.text
    assert "median gain+0.125" in page.text
    assert "largest gain+0.750 first" in page.text
    assert table(mixed) == [
        "third failed in finetune",
        "row 7 is bad.",
        "first done 4.0000 → 3.2500 +0.7500 2 min 2",
        "second done 4.0000 → 4.5000 −0.5000 2 min import, data, calibrate",
        "fourth cancelled",
    ]


def test_tasks_that_began_are_linked_by_relative_paths(mixed: str) -> None:
    links = [attributes["href"] for tag, attributes in Page(mixed).tags if tag == "a"]
    assert links == [f"tasks/{name}/report.html" for name in ("third", "first", "second")]


def test_the_page_loads_nothing_and_suits_screens_and_paper(mixed: str) -> None:
    page = Page(mixed)
    assert {tag for tag, attributes in page.tags if LOADING & attributes.keys()} == {"a"}
    assert not {"script", "link", "img", "iframe", "object", "image", "use"} & {tag for tag, _ in page.tags}
    style = re.search(r"<style>(.*)</style>", mixed, re.DOTALL)
    assert style
    assert not re.search(r"url\(|@import|@font-face|https?://", style[1])
    for wanted in ("prefers-color-scheme: dark", "@media print", "max-width: 36rem"):
        assert wanted in style[1]
    assert "default-src 'none'" in mixed
    assert "width=device-width" in mixed


def paths(page: str, name: str) -> dict[str, tuple[float, float]]:
    """Where a task's stages begin and how long they are, in per cent."""
    line = re.search(rf"<g><title>{name}</title>(.*?)</g>", page)
    assert line
    found = re.findall(r'class="(\w+)" d="M([\d.]+) [\d.]+h([\d.]+)"', line[1])
    return {kind: (float(x), float(width)) for kind, x, width in found}


def test_the_timeline_shows_when_stages_ran_and_where_tasks_ended(mixed: str) -> None:
    first, third = paths(mixed, "first"), paths(mixed, "third")
    assert list(first) == list(SECONDS)
    assert first["import"][0] == 0
    assert first["evaluate"][0] + first["evaluate"][1] == pytest.approx(100, abs=0.02)
    assert first["finetune"] == pytest.approx((100 * 35 / 134, 100 * 60 / 134), abs=0.01)
    assert third["lost"][0] == pytest.approx(100 * 70 / 134, abs=0.01)
    assert "lost" not in first
    assert "fourth" not in re.findall("<title>(.*?)</title>", mixed)
    assert '<span class="x" style="left: 0.00%">0 s</span>' in mixed


def test_what_is_shorter_than_a_hair_is_still_seen(mixed: str) -> None:
    assert paths(mixed, "second")["calibrate"][1] > 0.1


def test_days_in_which_nothing_ran_take_no_room() -> None:
    later = BEGIN + 3 * 86400
    found = {"a": stages(BEGIN), "b": stages(later)}
    state = BatchState(BEGIN, (done("a"), done("b", begun=later)))
    page = report.render_batch("sweep", state, found)
    assert paths(page, "b")["import"][0] == pytest.approx(50)
    assert "4 min, in which stages worked for 4 min" in Page(page).text
    assert "nothing ran for 3.0 days" in page


def test_five_hundred_tasks_are_a_small_page_made_fast() -> None:
    state, found = many(500)
    before = time.process_time()
    page = report.render_batch("sweep", state, found)
    assert time.process_time() - before < 5  # a bound for the absurd: it takes a tenth of a second
    assert len(page.encode()) < 600_000
    parsed = Page(page)
    assert sum(tag == "g" for tag, _ in parsed.tags) == 500
    assert len(table(page)) == 500
    assert not any(tag == "li" for tag, _ in parsed.tags)  # lines are too thin for names
    height = re.search(r"--lines: (\d+); --line-rem: ([\d.]+)", page)
    assert height
    assert int(height[1]) * float(height[2]) == pytest.approx(60, rel=0.01)


def test_thousands_of_tasks_are_cut_and_it_is_said() -> None:
    state, found = many(2100)
    parsed = Page(report.render_batch("sweep", state, found))
    assert sum(tag == "g" for tag, _ in parsed.tags) == 1000
    assert "the first 1,000 of 2,100" in parsed.text
    assert "The first 2,000 tasks, failed ones first; summary.parquet has all." in parsed.text


def test_few_tasks_have_their_names_beside_their_lines() -> None:
    state, found = many(20)
    page = Page(report.render_batch("sweep", state, found))
    named = [attributes["title"] for tag, attributes in page.tags if tag == "li"]
    assert named == [task.name for task in state.tasks]


def test_names_reasons_and_stages_are_escaped() -> None:
    task = TaskState(
        EVIL, "failed", EVIL, reason=f"{EVIL}\x00\ud800" + "é" * 1000, started_at=BEGIN, ended_at=BEGIN + 9
    )
    page = report.render_batch(EVIL, BatchState(BEGIN, (task,)), {EVIL: (StageRun(EVIL, BEGIN, BEGIN + 5, True),)})
    parsed = Page(page)
    assert not {"script", "s"} & {tag for tag, _ in parsed.tags}
    assert [attributes["href"] for tag, attributes in parsed.tags if tag == "a"] == [
        "tasks/%22%3E%3Cscript%3Ealert%281%29%3C%2Fscript%3E%3Cs%20title=%22x/report.html"
    ]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", page)
    assert page.count("é") < 500


def test_losses_that_are_no_numbers() -> None:
    state = BatchState(BEGIN, (done("a", math.nan), done("b", math.inf), done("c", 3.5)))
    page = report.render_batch("sweep", state, {"a": stages(BEGIN)})
    assert "median gain+0.500" in Page(page).text
    assert not re.search(r'(width|d)="[^"]*(nan|inf)', page)


def test_a_batch_of_which_nothing_has_run() -> None:
    page = Page(report.render_batch("sweep", BatchState(BEGIN, (TaskState("a"), TaskState("b"))), {}))
    assert "2 tasks: 2 waiting." in page.text
    assert "No stage has finished yet" in page.text
    assert page.sections == ["tasks"]
    assert Page(report.render_batch("sweep", BatchState(BEGIN), {})).sections == []


@pytest.fixture
def batch(tmp_path: Path) -> RunDirectory:
    """A batch's directory with one task that has a stage, one whose manifest is broken and one that never began."""
    run = RunDirectory(tmp_path / "sweep")
    run.create({}, kind="batch")
    write_state(run, BatchState(BEGIN, (done("a"), TaskState("broken"), TaskState("never"))))
    task = RunDirectory(run.path("tasks", "a"))
    task.create({})
    manifest = task.manifest()
    result = {"taken_from": "another", "usage": {"wall_s": 2.5}}
    manifest["stages"]["data"] = {"inputs": "", "finished_at": BEGIN + 10, "outputs": {}, "result": result}
    task.path("manifest.json").write_text(json.dumps(manifest))
    run.path("tasks", "broken").mkdir()
    run.path("tasks", "broken", "manifest.json").write_text("{")
    return run


def test_stages_are_read_from_the_tasks_manifests(batch: RunDirectory) -> None:
    state = BatchState(BEGIN, (done("a"), TaskState("broken"), TaskState("never")))
    assert report.read_stages(batch, state) == {"a": (StageRun("data", BEGIN + 7.5, BEGIN + 10, True),)}


def test_the_reports_verb_knows_a_batch(batch: RunDirectory) -> None:
    called = CliRunner().invoke(app, ["report", str(batch.root)], env={"COLUMNS": "300"})
    assert called.exit_code == 0, called.output
    page = batch.path("report.html").read_bytes().decode("utf-8")
    assert called.output.strip() == str(batch.path("report.html"))
    assert "1 of 1 finished stages came from the cache" in Page(page).text
