"""A run's own log: one JSON line an event, through standard logging.

Each line holds ``time`` (ISO 8601, UTC), ``run``, ``event`` and ``message``; where they apply ``stage``, ``done``,
``total``, ``layer``, and what belongs to the event. Events are :data:`RUN_EVENTS` of the whole run, and of its stages
``started``, ``progress``, ``finished``, ``skipped``, ``layer``, ``note`` and ``work``, whose ``spans`` are lists of a worker,
a unit, when it was begun and finished (seconds since 1970) and how many units that were.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from emloc_ray.errors import EmlocError
from emloc_ray.io.formats.json_lines import end_last_line, read_objects
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.io.runs.secret_values import without_secret
from emloc_ray.io.store.node_cache import ensure, publish
from emloc_ray.stages.ray.spans import Span, joined, listening

LOG = "log.jsonl"
RUN_EVENTS = ("run_started", "run_finished", "run_failed", "run_stopped")
_LAYER_KEYS = ("rank", "relative_error", "solver", "before", "after")
_MOST_SPANS = 50  # at a time; more are told as one a worker
_LONGEST_S = 300.0  # between two lines of progress
_WORK_SHARE = 0.05  # of a stage's time, after which its work is told again: so a long one takes no more lines


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        fields: dict[str, Any] = record.__dict__["fields"]
        return json.dumps({"time": when, **fields, "message": record.getMessage()}, ensure_ascii=False)


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk stops a run by what the run itself writes, and is told then."""


class RunLog:
    """A reporter that writes ``log.jsonl`` in the run's directory, after what earlier tries wrote there.

    A stage's progress is written at most every ``interval_s`` seconds, and with its end; what its workers did as seldom; both
    the more seldom, the longer a stage takes. Records also go to the handlers of the logger ``emloc_ray``, with ``fields`` as
    their attribute. As a context it tells how the run ends; where neither an end nor a live process is to be found, the run
    was killed.
    """

    def __init__(self, run: RunDirectory, layers: Sequence[str] = (), interval_s: float = 10.0) -> None:
        """``layers``: names to find in the sentence of an error."""
        self.run, self.interval_s = run, interval_s
        self._layers = set(layers)
        self._stage: str | None = None
        self._units: dict[str, int] = {}
        self._spans: list[Span] = []
        self._begun = self._told_work = 0.0
        self._listening = contextlib.ExitStack()
        # Of its own rather than the process's: two runs side by side do not write into each other's log.
        self._logger = logging.Logger("emloc_ray.run", logging.INFO)
        self._logger.parent = logging.getLogger("emloc_ray")
        self._handler: logging.Handler | None = None

    def __enter__(self) -> RunLog:
        path = self.run.path(LOG)
        ensure(path)
        end_last_line(path)
        self._handler = _LogFile(path, encoding="utf-8")
        self._handler.setFormatter(_JsonLines())
        self._logger.addHandler(self._handler)
        self._listening.enter_context(listening(self.work))
        self._tell(
            "run_started",
            "The run begins.",
            process=f"process {os.getpid()} on {socket.gethostname()}",
            command=shlex.join([Path(sys.argv[0]).name, *map(without_secret, sys.argv[1:])]),
            directory=os.getcwd(),
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._listening.close()
        self._tell_work()
        where: dict[str, Any] = {} if self._stage is None else {"stage": self._stage}
        if error is None:
            self._tell("run_finished", "The run has ended well.")
        elif isinstance(error, (KeyboardInterrupt, SystemExit)):  # Ray makes a SystemExit of SIGTERM
            self._tell("run_stopped", "The run was stopped.", **where)
        else:
            sentence = str(error) or type(error).__name__
            named = [word for word in re.findall(r"[\w.]+", sentence) if word.rstrip(".") in self._layers]
            layer: dict[str, Any] = {"layer": named[0].rstrip(".")} if named else {}
            self._tell("run_failed", sentence, logging.ERROR, **where, **layer)
        if self._handler is not None:
            self._logger.removeHandler(self._handler)
            with contextlib.suppress(OSError):
                self._handler.close()

    def start(self, stage: str) -> Callable[[int, int], None]:
        """A stage begins."""
        self._stage, self._units = stage, {}
        self._begun = self._told_work = time.monotonic()
        self._tell("started", f"{stage} begins.", stage=stage)
        next_time = 0.0

        def progress(done: int, total: int) -> None:
            nonlocal next_time
            self._units = {"done": done, "total": total}
            now = time.monotonic()
            if now >= next_time:
                # The longer a stage takes, the more seldom: the log is whole in every put to an object store.
                next_time = now + max(self.interval_s, min(_WORK_SHARE * (now - self._begun), _LONGEST_S))
                self._tell("progress", f"{stage}: {done} of {total}", stage=stage, **self._units)

        return progress

    def finish(self, stage: str, result: dict[str, Any], usage: dict[str, Any]) -> None:
        """A stage has ended well: its layers, then what it took."""
        self._tell_work()
        self._stage = None
        layers: dict[str, Any] = result.get("layers") or result.get("modules") or {}
        for layer, values in layers.items():
            shown = {key: values[key] for key in _LAYER_KEYS if key in values}
            self._tell("layer", f"{stage}: {layer}", stage=stage, layer=layer, **shown)
        used = {key: value for key, value in usage.items() if key != "processes"}
        self._tell("finished", f"{stage} has ended.", stage=stage, **self._units, **used)

    def skip(self, stage: str) -> None:
        """A stage was found done."""
        self._tell("skipped", f"{stage} was done before, its inputs are unchanged.", stage=stage)

    def work(self, span: Span) -> None:
        """A worker has done something: told with what others did, now and then."""
        self._spans.append(span)
        now = time.monotonic()
        if now - self._told_work >= max(self.interval_s, _WORK_SHARE * (now - self._begun)):
            self._tell_work()

    def _tell_work(self) -> None:
        self._told_work = time.monotonic()
        spans = self._spans if len(self._spans) <= _MOST_SPANS else joined(self._spans, math.inf)
        self._spans = []
        for stage in dict.fromkeys(span.stage for span in spans):
            own = [span for span in spans if span.stage == stage]
            told = [[s.worker, s.unit, round(s.begun_at, 3), round(s.finished_at, 3), s.count] for s in own]
            self._tell("work", f"{stage}: {sum(s.count for s in own)} done by its workers", stage=stage, spans=told)

    def note(self, text: str) -> None:
        """Something that a reader should know."""
        self._tell("note", text, logging.WARNING, **({} if self._stage is None else {"stage": self._stage}))

    def _tell(self, event: str, message: str, level: int = logging.INFO, **fields: Any) -> None:
        self._logger.log(level, "%s", message, extra={"fields": {"run": self.run.name, "event": event, **fields}})
        if event != "layer":  # a stage's end follows, and takes them with it
            with contextlib.suppress(EmlocError, OSError):  # what the run itself writes tells of a store that fails
                self.run.check_held()
                publish(self.run.path(LOG))


def _read(run: RunDirectory) -> bytes:
    """From a store, past this node's copy, into which the run itself may be writing."""
    if run.store is not None:
        return run.store.read(LOG) or b""
    path = run.path(LOG)
    return path.read_bytes() if path.is_file() else b""


def read_events(run: RunDirectory) -> list[dict[str, Any]]:
    """The log's events, oldest first, without lines that a killed process left unfinished; empty where there is none."""
    return [event for event in read_objects(_read(run)) if {"time", "event", "message"} <= event.keys()]
