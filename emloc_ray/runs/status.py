"""The status of a run, alive or dead, from its lock and its log."""

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from emloc_ray.config.steps import STEP_NAMES
from emloc_ray.io.runs.directory import CONFIG, RunDirectory
from emloc_ray.io.runs.manifest import confirmed_at
from emloc_ray.io.runs.secret_values import HIDDEN, leaves
from emloc_ray.runs.log import RUN_EVENTS, read_events
from emloc_ray.text import duration, version_changes

Event = Mapping[str, Any]


def asked_steps(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """The steps of a run's config, in order; for a run of an older version those that are done."""
    return tuple(manifest.get("steps") or (step for step in STEP_NAMES if step in manifest.get("stages", {})))


def older_stages(manifest: Mapping[str, Any]) -> list[str]:
    """Finished stages that may be out of date: they or an earlier stage have other inputs by the config that was written since,
    or an earlier stage was done after they were last confirmed, or is missing."""
    done, asked, outdated = manifest.get("stages", {}), asked_steps(manifest), manifest.get("outdated")
    older, newest = [], 0.0
    for stage in STEP_NAMES:
        if stage not in done:
            newest = math.inf if stage in asked else newest
            continue
        newest = math.inf if stage == outdated else newest
        if confirmed_at(done[stage]) < newest:
            older.append(stage)
        newest = max(newest, confirmed_at(done[stage]))
    return older


def current_stages(manifest: Mapping[str, Any]) -> list[str]:
    """Finished stages of the config that the manifest holds, in order, without those that may be out of date."""
    done, older = manifest.get("stages", {}), older_stages(manifest)
    return [step for step in asked_steps(manifest) if step in done and step not in older]


def begun_stage(events: Iterable[Mapping[str, Any]]) -> tuple[str | None, tuple[int, int] | None]:
    """The last stage that the log has begun and not ended, with the number of its units that are done, and of all."""
    stage, progress = None, None
    for event in events:
        if event["event"] == "started":
            stage, progress = event["stage"], None
        elif event["event"] == "finished":
            stage, progress = None, None
        elif event["event"] == "progress":
            progress = (event["done"], event["total"])
    return stage, progress


def newest_try(events: Sequence[Event]) -> Sequence[Event]:
    """The events since the log's last begin of a run."""
    return events[max((n for n, event in enumerate(events) if event["event"] == "run_started"), default=0) :]


def status_lines(run: RunDirectory, now: datetime | None = None) -> list[str]:
    """Sentences on a run's newest try, how it goes or ended, and on its last failure, unless a later try finished. ``now`` is
    the clock for the events' ages."""
    now, holder, events = now or datetime.now(timezone.utc), run.holder(), read_events(run)
    newest = newest_try(events)
    is_starting = bool(newest) and holder not in (None, "another process", newest[0].get("process", holder))
    if is_starting:  # Ray starts, and the log is still that of earlier tries
        newest = []
    end = next((event["event"] for event in reversed(newest) if event["event"] in RUN_EVENTS[1:]), None)
    stage, progress = begun_stage(newest)
    place = stage or "no stage"
    if stage and progress:
        place += f", {progress[0]} of {progress[1]}"
    if is_starting:
        lines = [f"Running: {holder}; it has begun no stage yet"]
    elif holder is not None:
        lines = [f"Running: {holder}, in {place}" if stage else f"Running: {holder}"]
    elif events and end is None:
        lines = [f"Not running: its process was killed in {place}, or its machine was lost."]
    else:
        lines = [f"Not running: stopped, in {place}." if end == "run_stopped" else "Not running."]
    outcomes = [event for event in events if event["event"] in ("run_failed", "run_finished")]
    failure = outcomes[-1] if outcomes and outcomes[-1]["event"] == "run_failed" else None
    if events and failure is not events[-1]:
        last = "Last event of an earlier try" if is_starting else "Last event"
        lines.append(f"{last}, {_age(events[-1], now)}: {events[-1]['message']}")
    if failure is not None:
        failed = "An earlier try failed" if failure not in newest else "Failed"
        where = f" in {failure['stage']}" if "stage" in failure else ""
        lines.append(f"{failed}{where}, {_age(failure, now)}: {failure['message']}")
    lines += _accepted(run.manifest()["stages"])
    if holder is None and end != "run_finished":
        command = _command(run, newest[0] if newest else {})
        again = f", with the values for which {HIDDEN} stands" if HIDDEN in command else ""
        lines.append(f"To continue, give the same command{again}: {command}")
    return lines


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
    """The command that began a run, without ``--fresh`` and ``--from``; for a run from Python, one that continues it."""
    words = shlex.split(begun.get("command", ""))
    if not words or words[0] != "emloc-ray":
        if run.store:
            return "the call that began it"
        config = leaves(run.manifest()["config"])
        hidden = [f"{'.'.join(path)}={HIDDEN}" for path, value in config if value == HIDDEN]
        again = shlex.join(["emloc-ray", "run", str(run.path(CONFIG).absolute()), *hidden])
        return _in_directory(begun, again)
    pairs = zip(["", *words], words, strict=False)
    kept = [
        word for before, word in pairs if before != "--from" and word.partition("=")[0] not in ("--fresh", "--from")
    ]
    return _in_directory(begun, shlex.join(kept))


def _in_directory(begun: Event, command: str) -> str:
    """The command from where the run began, as paths of its config are relative to that."""
    return f"cd {shlex.quote(begun['directory'])} && {command}" if "directory" in begun else command


def _age(event: Event, now: datetime) -> str:
    return f"{duration(max(0.0, (now - datetime.fromisoformat(event['time'])).total_seconds()))} ago"
