"""How a run is, alive or dead, from its lock and its log."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from emloc_ray.config.steps import STEPS
from emloc_ray.io.runs.directory import CONFIG, RunDirectory, confirmed_at
from emloc_ray.io.runs.secret_values import HIDDEN, leaves
from emloc_ray.runs.log import RUN_EVENTS, read_events
from emloc_ray.text import duration

Event = dict[str, Any]


@dataclass(frozen=True)
class RunStatus:
    """Who holds a run, where it is or where it ended, and what failed last."""

    holder: str | None
    stage: str | None
    progress: tuple[int, int] | None
    last: Event | None
    end: Event | None
    failure: Event | None
    go_on: str

    @property
    def is_lost(self) -> bool:
        """Whether its process ended without a word."""
        return self.holder is None and self.end is None and self.last is not None

    def lines(self, now: datetime | None = None) -> list[str]:
        """In sentences; ``now`` is the clock that the events' ages are told by."""
        now = now or datetime.now(timezone.utc)
        told = [f"Running: {self.holder}" if self.holder else "Not running."]
        if self.holder and self.stage:
            told[0] += f", in {self._place()}"
        elif self.is_lost:
            told[0] = (
                f"Not running: its process ended without a word, in {self._place()}: killed, or its machine was lost."
            )
        elif self.end is not None and self.end["event"] == "run_stopped":
            told[0] = f"Not running: stopped, in {self._place()}."
        if self.last is not None:
            told.append(f"Last event, {_age(self.last, now)}: {self.last['message']}")
        if self.failure is not None:
            where = f" in {self.failure['stage']}" if "stage" in self.failure else ""
            told.append(f"Failed{where}, {_age(self.failure, now)}: {self.failure['message']}")
        if not self.holder and (self.end is None or self.end["event"] != "run_finished"):
            again = f", with the values given again for which {HIDDEN} stands" if HIDDEN in self.go_on else ""
            told.append(f"It goes on by the same command{again}: {self.go_on}")
        return told

    def _place(self) -> str:
        if self.stage is None:
            return "no stage"
        return self.stage if self.progress is None else f"{self.stage}, {self.progress[0]} of {self.progress[1]}"


def asked_steps(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """The steps that a run's config asks for, in order; of a run of an older version those that it has done."""
    return tuple(manifest.get("steps") or (step for step in STEPS if step in manifest.get("stages", {})))


def older_stages(manifest: Mapping[str, Any]) -> list[str]:
    """Stages that were last known to be right before one ahead of them was done, or that one ahead of them is missing for."""
    done, asked = manifest.get("stages", {}), asked_steps(manifest)
    older, newest = [], 0.0
    for stage in STEPS:
        if stage not in done:
            newest = math.inf if stage in asked else newest
            continue
        if confirmed_at(done[stage]) < newest:
            older.append(stage)
        newest = max(newest, confirmed_at(done[stage]))
    return older


def read_status(run: RunDirectory) -> RunStatus:
    """The status of a run's newest try, with the last failure of any that no later one made up for."""
    events = read_events(run)
    begin = max((n for n, event in enumerate(events) if event["event"] == "run_started"), default=0)
    newest = events[begin:]
    stage, progress = None, None
    for event in newest:
        if event["event"] == "started":
            stage, progress = event["stage"], None
        elif event["event"] == "finished":
            stage, progress = None, None
        elif event["event"] == "progress":
            progress = (event["done"], event["total"])
    ends = [event for event in newest if event["event"] in RUN_EVENTS[1:]]
    outcomes = [event for event in events if event["event"] in ("run_failed", "run_finished")]
    failed = outcomes[-1] if outcomes and outcomes[-1]["event"] == "run_failed" else None
    return RunStatus(
        holder=run.holder(),
        stage=stage,
        progress=progress,
        last=events[-1] if events else None,
        end=ends[-1] if ends else None,
        failure=failed,
        go_on=_command(run, newest[0] if newest else {}),
    )


def _command(run: RunDirectory, begun: Event) -> str:
    """The command line that began a run, without what would undo its work; where it was none, one that goes on as well."""
    words = shlex.split(begun.get("command", ""))
    if not words or words[0] != "emloc-ray":
        if run.store:
            return "the call that began it"
        config = leaves(run.manifest()["config"])
        hidden = [f"{'.'.join(path)}={HIDDEN}" for path, value in config if value == HIDDEN]
        return shlex.join(["emloc-ray", "run", str(run.path(CONFIG)), *hidden])
    return f"cd {shlex.quote(begun['directory'])} && {shlex.join(word for word in words if word != '--fresh')}"


def _age(event: Event, now: datetime) -> str:
    return f"{duration(max(0.0, (now - datetime.fromisoformat(event['time'])).total_seconds()))} ago"
