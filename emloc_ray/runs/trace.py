"""trace.json: what a run's workers did, when, and their peak memory, for https://ui.perfetto.dev.

In the Trace Event Format: a complete event for each piece of work. ``pid`` is the node, ``tid`` the worker; ``args`` hold the
number of pieces and the peak bytes of the process. Times are microseconds since 1970. Of a run with more than 50,000 pieces
the shortest are left out: ``otherData`` says how many.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from typing import Any

from emloc_ray.errors import ArtifactError, EmlocError
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.io.store.atomic import write_bytes
from emloc_ray.io.store.node_cache import ensure
from emloc_ray.runs.reporter import Reporter
from emloc_ray.stages.ray.spans import Span, listening

TRACE = "trace.json"
_LEFT_OUT = "shortest pieces left out"
_NO_NODE = "training group"  # whose ranks do not name their nodes
_MOST = 50_000  # spans: some 10 MB
_INTERVAL_S, _WORK_SHARE = 10.0, 0.05  # of a stage's time, before the file is written again


class WorkerTrace(Reporter):
    """Writes ``trace.json`` in the run's directory, and keeps what earlier tries wrote there. As a context it records the work
    that its thread hears of; it writes at the end of every stage, at its own end, and in between."""

    def __init__(self, run: RunDirectory, interval_s: float = _INTERVAL_S, most: int = _MOST) -> None:
        self.run, self.interval_s, self.most = run, interval_s, most
        self._spans: list[Span] = []
        self._num_left_out = 0
        self._begun = self._written = time.monotonic()
        self._listening = contextlib.ExitStack()

    def __enter__(self) -> WorkerTrace:
        self._spans, self._num_left_out = read_trace(self.run)
        self._listening.enter_context(listening(self.hear))
        return self

    def __exit__(self, *error: object) -> None:
        self._listening.close()
        self._write()

    def hear(self, span: Span) -> None:
        """A worker has done something."""
        self._spans.append(span)
        now = time.monotonic()
        if now - self._written >= max(self.interval_s, _WORK_SHARE * (now - self._begun)):
            self._write()

    def finish(self, stage: str, result: dict[str, Any], usage: dict[str, Any]) -> None:
        """Writes what the stage's workers did."""
        self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        if not self._spans:
            return
        if (over := len(self._spans) - self.most) > 0:
            self._spans = sorted(self._spans, key=lambda span: span.finished_at - span.begun_at)[over:]
            self._num_left_out += over
        content: dict[str, Any] = {"traceEvents": trace_events(self._spans), "displayTimeUnit": "ms"}
        if self._num_left_out:
            content["otherData"] = {_LEFT_OUT: self._num_left_out}
        with contextlib.suppress(EmlocError, OSError):  # a store that fails ends the run at its next own write
            self.run.check_held()
            write_bytes(self.run.path(TRACE), json.dumps(content, ensure_ascii=False).encode(errors="replace"))


def trace_events(spans: Sequence[Span]) -> list[dict[str, Any]]:
    """The spans as events, ordered by their begin, after the names of nodes and workers."""
    pids: dict[str, int] = {}
    tids: dict[tuple[str, str], int] = {}
    names, events = [], []
    for span in sorted(spans, key=lambda span: span.begun_at):
        worker, _, node = span.worker.partition(" on ")
        node = node or _NO_NODE
        if node not in pids:
            pids[node] = len(pids) + 1
            names.append(_named("process_name", node, pids[node], 0))
        if (node, worker) not in tids:
            tids[node, worker] = len(tids) + 1
            names.append(_named("thread_name", worker, pids[node], tids[node, worker]))
        begin, end = (round(1e6 * moment) for moment in (span.begun_at, span.finished_at))
        events.append(
            {
                "name": span.unit,
                "cat": span.stage,
                "ph": "X",
                "ts": begin,
                "dur": max(end - begin, 0),
                "pid": pids[node],
                "tid": tids[node, worker],
                "args": {
                    "stage": span.stage,
                    "peak_bytes": span.peak_bytes,
                    **({"gpu_peak_bytes": span.gpu_peak_bytes} if span.gpu_peak_bytes else {}),
                },
            }
        )
    return [*names, *events]


def _named(kind: str, name: str, node: int, worker: int) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": node, "tid": worker, "args": {"name": name}}


def read_trace(run: RunDirectory) -> tuple[list[Span], int]:
    """The spans of a run's ``trace.json``, and how many were left out; none where there is none, or it has another form than
    :func:`trace_events` gives."""
    try:
        ensure(run.path(TRACE))
        content = json.loads(run.path(TRACE).read_text())
        events = content["traceEvents"]
        names = {(e["name"], e["pid"], e["tid"]): e["args"]["name"] for e in events if e["ph"] == "M"}
        spans = [_span(event, names) for event in events if event["ph"] == "X"]
        return spans, content.get("otherData", {}).get(_LEFT_OUT, 0)
    except (ArtifactError, OSError, ValueError, KeyError, TypeError):
        return [], 0


def _span(event: dict[str, Any], names: dict[tuple[str, int, int], str]) -> Span:
    worker = names["thread_name", event["pid"], event["tid"]]
    node = names["process_name", event["pid"], 0]
    begin, end = event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6
    args = event["args"]
    peaks = args["peak_bytes"], args.get("gpu_peak_bytes", 0)
    return Span(event["cat"], f"{worker} on {node}", event["name"], begin, end, *peaks)
