"""The status of a run, alive or dead, from its lock and its log."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from emloc_ray.config.steps import STEP_NAMES
from emloc_ray.io.runs.directory import CONFIG, RunDirectory
from emloc_ray.io.runs.manifest import confirmed_at
from emloc_ray.io.runs.secret_values import HIDDEN, leaves
from emloc_ray.runs.log import RUN_EVENTS, read_events
from emloc_ray.text import duration, version_changes

Event = dict[str, Any]


@dataclass(frozen=True)
class RunStatus:
    """Who holds a run, where it is or ended, what failed last, and what of other versions was ``accepted``."""

    holder: str | None
    stage: str | None
    progress: tuple[int, int] | None
    last: Event | None
    end: Event | None
    failure: Event | None
    go_on: str
    accepted: tuple[str, ...] = ()

    @property
    def is_lost(self) -> bool:
        """Whether its process ended without writing so."""
        return self.holder is None and self.end is None and self.last is not None

    def lines(self, now: datetime | None = None) -> list[str]:
        """The status in sentences; ``now`` is the clock for the events' ages."""
        now = now or datetime.now(timezone.utc)
        state = f"Running: {self.holder}" if self.holder else "Not running."
        if self.holder and self.stage:
            state += f", in {self._place()}"
        elif self.is_lost:
            state = f"Not running: its process was killed in {self._place()}, or its machine was lost."
        elif self.end is not None and self.end["event"] == "run_stopped":
            state = f"Not running: stopped, in {self._place()}."
        sentences = [state]
        if self.last is not None:
            sentences.append(f"Last event, {_age(self.last, now)}: {self.last['message']}")
        if self.failure is not None:
            where = f" in {self.failure['stage']}" if "stage" in self.failure else ""
            sentences.append(f"Failed{where}, {_age(self.failure, now)}: {self.failure['message']}")
        sentences += self.accepted
        if not self.holder and (self.end is None or self.end["event"] != "run_finished"):
            again = f", with the values for which {HIDDEN} stands" if HIDDEN in self.go_on else ""
            sentences.append(f"To continue, give the same command{again}: {self.go_on}")
        return sentences

    def _place(self) -> str:
        if self.stage is None:
            return "no stage"
        return self.stage if self.progress is None else f"{self.stage}, {self.progress[0]} of {self.progress[1]}"


def asked_steps(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """The steps of a run's config, in order; for a run of an older version those that are done."""
    return tuple(manifest.get("steps") or (step for step in STEP_NAMES if step in manifest.get("stages", {})))


def older_stages(manifest: Mapping[str, Any]) -> list[str]:
    """Finished stages that may be out of date: an earlier stage was done after they were last confirmed, or is missing."""
    done, asked = manifest.get("stages", {}), asked_steps(manifest)
    older, newest = [], 0.0
    for stage in STEP_NAMES:
        if stage not in done:
            newest = math.inf if stage in asked else newest
            continue
        if confirmed_at(done[stage]) < newest:
            older.append(stage)
        newest = max(newest, confirmed_at(done[stage]))
    return older


def begun_stage(events: Iterable[Mapping[str, Any]]) -> tuple[str | None, tuple[int, int] | None]:
    """The stage that began last and has no end in the log, and how many of its units are done, of how many."""
    stage, progress = None, None
    for event in events:
        if event["event"] == "started":
            stage, progress = event["stage"], None
        elif event["event"] == "finished":
            stage, progress = None, None
        elif event["event"] == "progress":
            progress = (event["done"], event["total"])
    return stage, progress


def read_status(run: RunDirectory) -> RunStatus:
    """The status of a run's newest try, and the last failure, where no later try finished."""
    events = read_events(run)
    begin = max((n for n, event in enumerate(events) if event["event"] == "run_started"), default=0)
    newest = events[begin:]
    stage, progress = begun_stage(newest)
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
        accepted=tuple(_accepted(run.manifest()["stages"])),
    )


def _accepted(stages: Mapping[str, Any]) -> list[str]:
    """A sentence for all stages that were taken as they are though made with the same other versions."""
    kinds: dict[str, list[str]] = {}
    for name in (step for step in STEP_NAMES if stages.get(step, {}).get("accepted")):
        kinds.setdefault(version_changes(stages[name].get("versions"), stages[name]["accepted"]), []).append(name)
    return [
        f"Taken as {'they are' if len(names) > 1 else 'it is'} by --accept-versions: {', '.join(names)}, made with {others}."
        for others, names in kinds.items()
    ]


def _command(run: RunDirectory, begun: Event) -> str:
    """The command that began a run, without ``--fresh``; for a run from Python, one that continues it."""
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
