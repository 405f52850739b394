"""A driver in a process of its own, which writes down how far it is."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from emloc_ray.config.schema import RunConfig
from emloc_ray.io.formats.yaml_text import write_yaml
from emloc_ray.runs.batch.driver import prepare_batch, run_batch
from emloc_ray.runs.batch.tasks import read_batch
from emloc_ray.runs.reporter import Reporter
from emloc_ray.ui import api

Event = dict[str, Any]
Drive = Callable[[RunConfig, str, Path, Path | None], None]
TASKS = ("a", "b")


class _Over(Exception):
    """The stage up to which the driver was asked to go has ended."""


class EventReporter(Reporter):
    """Writes each event as a JSON line."""

    def __init__(self, path: Path, until: str, snapshots: Path | None, run_dir: Path) -> None:
        self.path, self.until, self.snapshots, self.run_dir = path, until, snapshots, run_dir

    def write(self, event: str, **details: Any) -> None:
        """One line, at once."""
        with self.path.open("a") as file:
            file.write(json.dumps({"event": event, "time": time.time(), **details}) + "\n")

    def start(self, stage: str) -> Callable[[int, int], None]:
        """A stage begins."""
        self.write("start", stage=stage)
        return lambda done, total: self.write("progress", stage=stage, done=done)

    def finish(self, stage: str, result: dict[str, Any], usage: dict[str, Any]) -> None:
        """A stage has ended; the run is copied as it is now where that is wanted."""
        self.write("finish", stage=stage, seconds=usage["wall_s"])
        if self.snapshots is not None:
            shutil.copytree(self.run_dir, self.snapshots / stage / self.run_dir.name)
        if stage == self.until:
            raise _Over

    def note(self, text: str) -> None:
        """Writes a remark."""
        self.write("note", text=text)


def drive(config: RunConfig, until: str, events: Path, snapshots: Path | None) -> None:
    """The driver's whole life."""
    reporter = EventReporter(events, until, snapshots, Path(config.run_dir))
    try:
        api.run(config, reporter=reporter)
    except _Over:
        pass
    except Exception as error:
        reporter.write("error", text=f"{type(error).__name__}: {error}")
        raise SystemExit(1) from error


def drive_batch(config: RunConfig, until: str, events: Path, snapshots: Path | None) -> None:
    """As :func:`drive`, of a batch of :data:`TASKS`, all of this config, in its ``run_dir``; each goes to its end."""
    base, batch_file = events.with_name("base.yaml"), events.with_name("batch.yaml")
    base.write_text(write_yaml(config.model_dump(mode="json", exclude={"run_dir"})))
    tasks = [{"name": name} for name in TASKS]
    batch_file.write_text(write_yaml({"base": str(base), "run_dir": config.run_dir, "tasks": tasks}))
    reporter = EventReporter(events, "", None, Path(config.run_dir))
    try:
        state = run_batch(prepare_batch(read_batch(batch_file), reporter=reporter))
    except Exception as error:
        reporter.write("error", text=f"{type(error).__name__}: {error}")
        raise SystemExit(1) from error
    if state.count("done") < len(TASKS):
        reporter.write("error", text=str([(task.status, task.reason) for task in state.tasks]))
        raise SystemExit(1)


class Driver:
    """A driver that has been started; it begins as a copy of a process that has imported everything already."""

    def __init__(
        self, config: RunConfig, until: str, events: Path, snapshots: Path | None = None, run: Drive = drive
    ) -> None:
        self.config, self.path = config, events
        events.unlink(missing_ok=True)
        events.touch()
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["emloc_ray.stages.order", "emloc_ray.stages.ray.session"])
        self.process = context.Process(target=run, args=(config, until, events, snapshots))
        self.process.start()

    def events(self) -> list[Event]:
        """What it has written so far, whole lines."""
        return [json.loads(line) for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def find(self, event: str, **details: Any) -> Event | None:
        """The first event of a kind with these details."""
        wanted = {"event": event, **details}.items()
        return next((e for e in self.events() if wanted <= e.items()), None)

    def progress(self, stage: str, since: float = 0) -> list[int]:
        """How far the stage has said it was, each time since then."""
        progress = [event for event in self.events() if event["event"] == "progress" and event["time"] >= since]
        return [event["done"] for event in progress if event["stage"] == stage]

    def poll(self, seconds: float) -> Iterator[None]:
        """Yields now and then until the driver has ended, or the time is over."""
        end = time.monotonic() + seconds
        while self.process.is_alive() and time.monotonic() < end:
            yield
            time.sleep(0.02)

    def wait(self, seconds: float) -> bool:
        """Whether it ended well within the time; it is killed where it is still there."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.kill()
            return False
        return bool(self.process.exitcode == 0)

    def kill(self) -> None:
        """SIGKILL, and waits."""
        self.process.kill()
        self.process.join()
