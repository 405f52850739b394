"""Peak memory of each stage: of its workers on all nodes, as they tell it, and of all processes on the driver's machine
together, counting shared pages once (proportional set size)."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import ray

from emloc_ray.stages.ray.spans import Span, listening

# Often at first, for short stages; then seldom, because adding up a process's pages costs its time.
_INTERVALS = (0.5,) * 10 + (2.0,)
_FRESH_S = 0.3
# A look is not taken again before so many times what it took: a batch on two cores spent a tenth of one on looks.
_COSTS = 30


@dataclass
class Usage:
    """What one stage used: wall time, the peaks of all processes together, of each kind of process, and of its largest worker.

    The first two are of all that goes on on the driver's machine, other runs of a batch too; the last is the stage's own.
    """

    stage: str
    wall_s: float = 0.0
    peak_pss_bytes: int = 0
    peak_rss_bytes: int = 0
    processes: dict[str, int] = field(default_factory=dict)
    largest_worker_bytes: int = 0

    def hear(self, span: Span) -> None:
        """A worker tells what it held; while one stage goes on, others may do some of their work."""
        if span.stage == self.stage:
            self.largest_worker_bytes = max(self.largest_worker_bytes, span.peak_bytes)

    def as_dict(self) -> dict[str, object]:
        """As metrics.json has it; ``peak_rss_bytes`` is the largest worker, or where none told, the largest process here."""
        return {
            "wall_s": round(self.wall_s, 2),
            "peak_pss_bytes": self.peak_pss_bytes,
            "peak_rss_bytes": self.largest_worker_bytes or self.peak_rss_bytes,
            "processes": dict(sorted(self.processes.items(), key=lambda item: -item[1])),
        }


@contextlib.contextmanager
def measured(stage: str) -> Iterator[Usage]:
    """Samples this process and what it started while the block runs, and hears what the stage's workers tell."""
    usage, over = Usage(stage), threading.Event()

    def sample_until_over() -> None:
        for interval in itertools.chain(_INTERVALS, itertools.repeat(_INTERVALS[-1])):
            with contextlib.suppress(Exception):  # such as a Ray that ends right now: the next look may succeed
                _sample(usage, begin)
            if over.wait(interval):
                return

    begin = time.monotonic()
    thread = threading.Thread(target=sample_until_over, daemon=True)
    thread.start()
    try:
        with listening(usage.hear):
            yield usage
    finally:
        over.set()
        thread.join()
        usage.wall_s = time.monotonic() - begin


class _Sampler:
    """One look at all processes for however many stages go on side by side: adding up pages costs them time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken_at = self._due_at = 0.0
        self._latest: list[tuple[str, int, int]] = []

    def latest(self, since: float) -> list[tuple[str, int, int]]:
        """Kind, proportional and resident size of each process, ``since`` then or later by the monotonic clock, and older than a
        fraction of a second only where looks are slow."""
        with self._lock:
            begin = time.monotonic()
            if begin >= self._due_at or self._taken_at < since:
                self._latest, self._taken_at = list(_sizes()), begin
                end = time.monotonic()
                self._due_at = end + max(_FRESH_S, _COSTS * (end - begin))
            return self._latest


_sampler = _Sampler()


def _sample(usage: Usage, begun_at: float) -> None:
    latest = _sampler.latest(begun_at)
    usage.peak_pss_bytes = max(usage.peak_pss_bytes, sum(pss for _, pss, _ in latest))
    usage.peak_rss_bytes = max([usage.peak_rss_bytes, *(rss for _, _, rss in latest)])
    for kind, pss, _ in latest:
        usage.processes[kind] = max(usage.processes.get(kind, 0), pss)


def _sizes() -> Iterator[tuple[str, int, int]]:
    for process in _processes():
        with contextlib.suppress(psutil.Error, OSError):
            pss, rss = _memory(process)
            yield _kind(process), pss, rss


def _processes() -> list[psutil.Process]:
    own = psutil.Process()
    found = {process.pid: process for process in [own, *own.children(recursive=True)]}
    session = _session()
    for process in psutil.process_iter(["name"]):  # a Ray that was not started here, but that this process uses
        if process.info["name"] == "raylet" and process.pid not in found:
            with contextlib.suppress(psutil.Error):
                if session and any(session in part for part in process.cmdline()):
                    found.update({child.pid: child for child in [process, *process.children(recursive=True)]})
    return list(found.values())


def _session() -> str:
    """The name of the Ray session that this process is connected to, as its raylets' command lines hold it."""
    return ray.get_runtime_context().get_session_name() if ray.is_initialized() else ""


def _memory(process: psutil.Process) -> tuple[int, int]:
    rollup = Path(f"/proc/{process.pid}/smaps_rollup")
    if not rollup.exists():  # not Linux
        size = process.memory_info().rss
        return size, size
    lines = rollup.read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines[1:] if ":" in line}
    return sizes.get("Pss", 0), sizes.get("Rss", 0)


def _kind(process: psutil.Process) -> str:
    """A process's name as people know it: a Ray worker by its actor or its task's stage, else by its program."""
    if process.pid == psutil.Process().pid:
        return "driver"
    line = process.cmdline()
    if line and line[0].startswith("ray::"):
        return line[0].split()[0].removeprefix("ray::").split(".")[0].split("(")[0].rstrip(":")
    return process.name()
