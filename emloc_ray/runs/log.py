"""A run's own log: one JSON line an event, through standard logging.

Each line holds ``time`` (ISO 8601, UTC), ``run``, ``event`` and ``message``; where they apply ``stage``, ``done``,
``total``, and what belongs to the event. Events are :data:`RUN_EVENTS` of the whole run, and of its stages ``started``,
``progress``, ``finished``, ``skipped`` and ``note``. Figures of single layers are in ``metrics.json``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from emloc_ray.errors import EmlocError, Stopped
from emloc_ray.io.formats.json_lines import append_line, end_last_line, read_objects
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.io.runs.secret_values import hide_secrets, without_secret
from emloc_ray.io.store.node_cache import ensure, publish
from emloc_ray.runs.reporter import Reporter
from emloc_ray.text import Rate

LOG = "log.jsonl"
RUN_EVENTS = ("run_started", "run_finished", "run_failed", "run_stopped")
# Between two lines of progress: a share of the stage's time, as each put to an object store holds the whole log, up to a bound.
_PROGRESS_SHARE, _LONGEST_S = 0.05, 300.0

_LOGGER = logging.Logger("emloc_ray.run", logging.INFO)  # its records go to whoever handles those of the library
_LOGGER.parent = logging.getLogger("emloc_ray")
_LOGGER.addHandler(logging.NullHandler())


class RunLog(Reporter):
    """A reporter that appends to ``log.jsonl`` in the run's directory; each run of a process writes to its own.

    It writes a stage's progress at most every ``interval_s`` seconds. Records also go to the handlers of the logger
    ``emloc_ray``, with ``fields`` as their attribute. As a context it logs how the run ends: a log without an end, and
    without a live process, is a killed run's.
    """

    def __init__(self, run: RunDirectory, interval_s: float = 10.0) -> None:
        self.run, self.interval_s = run, interval_s
        self._stage: str | None = None
        self._units: dict[str, int] = {}
        self._detail = ""
        self._begun = 0.0

    def __enter__(self) -> RunLog:
        path = self.run.path(LOG)
        ensure(path)
        end_last_line(path)
        self._write(
            "run_started",
            "The run begins.",
            process=f"process {os.getpid()} on {socket.gethostname()}",
            command=shlex.join(_command(Path(sys.argv[0]).name)),
            directory=str(Path.cwd()),
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        where: dict[str, Any] = {} if self._stage is None else {"stage": self._stage}
        if error is None:
            self._write("run_finished", "The run has ended well.")
        elif isinstance(error, (KeyboardInterrupt, SystemExit, Stopped)):  # Ray makes a SystemExit of SIGTERM
            self._write("run_stopped", "The run was stopped.", **where)
        else:
            self._write("run_failed", str(error) or type(error).__name__, logging.ERROR, **where)

    def start(self, stage: str) -> Callable[[int, int], None]:
        """A stage begins."""
        self._stage, self._units, self._detail = stage, {}, ""
        self._begun, pace = time.monotonic(), Rate()
        self._write("started", f"{stage} begins.", stage=stage)
        next_time = 0.0

        def progress(done: int, total: int) -> None:
            nonlocal next_time
            self._units = {"done": done, "total": total}
            now = time.monotonic()
            if now >= next_time:
                next_time = now + max(self.interval_s, min(_PROGRESS_SHARE * (now - self._begun), _LONGEST_S))
                said = ", ".join(filter(None, [f"{done} of {total}", self._detail, pace.left(done, total, now)]))
                self._write("progress", f"{stage}: {said}", stage=stage, **self._units)

        return progress

    def finish(self, stage: str, result: dict[str, Any], usage: dict[str, Any]) -> None:
        """A stage has finished: logs what it used."""
        self._stage = None
        self._write("finished", f"{stage} has ended.", stage=stage, **self._units, **usage)

    def skip(self, stage: str) -> None:
        """A stage was done before."""
        self._write("skipped", f"{stage} was done before, its inputs are unchanged.", stage=stage)

    def note(self, text: str) -> None:
        """A remark for the user."""
        self._write("note", text, logging.WARNING, **({} if self._stage is None else {"stage": self._stage}))

    def detail(self, text: str) -> None:
        """Keeps a few words on the running stage, which are logged with its progress."""
        self._detail = text

    def _write(self, event: str, message: str, level: int = logging.INFO, **fields: Any) -> None:
        fields, message = {"run": self.run.name, "event": event, **fields}, hide_secrets(message)
        when = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = json.dumps({"time": when, **fields, "message": message})
        # A disk or a store that fails ends the run at its next own write.
        with contextlib.suppress(EmlocError, OSError):
            self.run.check_held()
            append_line(self.run.path(LOG), line)
            publish(self.run.path(LOG))
        _LOGGER.log(level, "%s", message, extra={"fields": fields})


def _command(program: str) -> list[str]:
    """The command line without its secrets; of another program than our own, whose words may be any, its name alone."""
    return [program, *(map(without_secret, sys.argv[1:]) if program == "emloc-ray" else ())]


def _read(run: RunDirectory) -> bytes:
    """The log's bytes; from a store itself, as the run may be writing into this node's copy."""
    if run.store is not None:
        return run.store.read(LOG) or b""
    path = run.path(LOG)
    return path.read_bytes() if path.is_file() else b""


def read_events(run: RunDirectory) -> list[dict[str, Any]]:
    """The log's events, oldest first, without unfinished lines; empty where there is no log."""
    return [event for event in read_objects(_read(run)) if {"time", "event", "message"} <= event.keys()]
