"""What stages use: wall time, and the peak memory of their workers on all nodes, from their spans, and of all processes on the
driver's machine together, with shared pages counted once (proportional set size)."""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import psutil
import ray

from emloc_ray.stages.ray.spans import Span, listening

# Seconds between samples: short ones first, for short stages; adding up a process's pages costs its time.
_INTERVALS = (0.5,) * 10 + (2.0,)
_FRESH_S = 0.3
# The next sample waits at least so many times what the last took: without, a batch on two cores spent a tenth of one on them.
_COSTS = 30


@dataclass
class Usage:
    """What one stage used: wall time and the peaks of all processes together, of the largest of them, of its largest worker.
    The first two peaks are of all runs on the driver's machine; the last two are the stage's own."""

    stage: str
    wall_s: float = 0.0
    peak_pss_bytes: int = 0
    peak_rss_bytes: int = 0
    largest_worker_bytes: int = 0
    largest_gpu_bytes: int = 0
    largest_above_imports: int = 0

    def hear(self, span: Span) -> None:
        """Takes a span's peak, where it is of this stage."""
        if span.stage == self.stage:
            self.largest_worker_bytes = max(self.largest_worker_bytes, span.peak_bytes)
            self.largest_gpu_bytes = max(self.largest_gpu_bytes, span.gpu_peak_bytes)
            if span.idle_bytes:
                self.largest_above_imports = max(self.largest_above_imports, span.peak_bytes - span.idle_bytes)

    def as_dict(self) -> dict[str, object]:
        """Values for metrics.json; ``peak_rss_bytes`` is that of the largest worker, else of the largest process here."""
        return {
            "wall_s": round(self.wall_s, 2),
            "peak_pss_bytes": self.peak_pss_bytes,
            "peak_rss_bytes": self.largest_worker_bytes or self.peak_rss_bytes,
            **({"peak_gpu_bytes": self.largest_gpu_bytes} if self.largest_gpu_bytes else {}),
            **({"peak_above_imports_bytes": self.largest_above_imports} if self.largest_above_imports else {}),
        }


@contextlib.contextmanager
def measured(stage: str) -> Iterator[Usage]:
    """Samples this process and its children while the block runs, and listens to the spans of the stage's workers."""
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


class Sampler:
    """Shares one sample of all processes between the stages that run side by side: adding up pages costs time."""

    def __init__(self, sizes: Callable[[], Iterable[tuple[int, int]]] | None = None) -> None:
        self._sizes = sizes
        self._lock = threading.Lock()
        self._taken_at = self._due_at = 0.0
        self._latest: list[tuple[int, int]] = []

    def latest(self, since: float) -> list[tuple[int, int]]:
        """Proportional and resident size of each process, sampled at ``since`` (monotonic clock) or later."""
        with self._lock:
            begin = time.monotonic()
            if begin >= self._due_at or self._taken_at < since:
                self._latest, self._taken_at = list((self._sizes or _sizes)()), begin
                end = time.monotonic()
                self._due_at = end + max(_FRESH_S, _COSTS * (end - begin))
            return self._latest


_sampler = Sampler()


def _sample(usage: Usage, begun_at: float) -> None:
    latest = _sampler.latest(begun_at)
    usage.peak_pss_bytes = max(usage.peak_pss_bytes, sum(pss for pss, _ in latest))
    usage.peak_rss_bytes = max([usage.peak_rss_bytes, *(rss for _, rss in latest)])


def _sizes() -> Iterator[tuple[int, int]]:
    for process in _processes():
        with contextlib.suppress(psutil.Error, OSError):
            yield _memory(process)


def _processes() -> list[psutil.Process]:
    own = psutil.Process()
    processes = {process.pid: process for process in [own, *own.children(recursive=True)]}
    # The raylets' command lines hold the session's name.
    session = ray.get_runtime_context().get_session_name() if ray.is_initialized() else ""
    for process in psutil.process_iter(["name"]):  # a Ray that was not started here, but that this process uses
        if process.info["name"] == "raylet" and process.pid not in processes:
            with contextlib.suppress(psutil.Error):
                if session and any(session in part for part in process.cmdline()):
                    processes.update({child.pid: child for child in [process, *process.children(recursive=True)]})
    return list(processes.values())


def _memory(process: psutil.Process) -> tuple[int, int]:
    """Proportional and resident size in bytes; the latter twice where the system does not know the former (only Linux does)."""
    memory = process.memory_full_info() if psutil.LINUX else process.memory_info()
    return getattr(memory, "pss", memory.rss), memory.rss
