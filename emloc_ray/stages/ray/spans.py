"""Spans of work: which worker did what, when, with how much memory. Ray's workers send them with their results; a run's
trace and the measures of its stages listen."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Span:
    """``count`` pieces of a stage's work, ``unit`` where it is one, by one worker; times in seconds since 1970, ``peak_bytes``
    the most that its process held meanwhile, ``gpu_peak_bytes`` what torch reserved of its GPU; 0 where that is not known."""

    stage: str
    worker: str
    unit: str
    begun_at: float
    finished_at: float
    count: int = 1
    peak_bytes: int = 0
    gpu_peak_bytes: int = 0


@dataclass(frozen=True)
class Timed:
    """A task's result, with its time, its process and the most that this held meanwhile, of a GPU too."""

    result: Any
    worker: str
    begun_at: float
    finished_at: float
    peak_bytes: int
    gpu_peak_bytes: int = 0


Listener = Callable[[Span], None]
# One a thread: a batch has a thread for each task.
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def timed(function: Callable[..., Any]) -> Callable[..., Timed]:
    """The function, returning its result as :class:`Timed`."""

    @functools.wraps(function)
    def run(*arguments: Any, **named: Any) -> Timed:
        _give_back_memory()
        _forget_peak()
        _let_segments_grow()
        if cuda := _cuda():
            cuda.reset_peak_memory_stats()
        begun_at = time.time()
        result = function(*arguments, **named)
        gpu_peak = cuda.max_memory_reserved() if (cuda := _cuda()) else 0
        where = f"process {os.getpid()} on {socket.gethostname()}"
        return Timed(result, where, begun_at, time.time(), _peak(), gpu_peak)

    return run


def _cuda() -> Any:
    """torch.cuda where this process uses a GPU; asking must not begin to."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def _let_segments_grow() -> None:
    """Has torch's CUDA allocator grow its segments, which keeps batches of many lengths from splitting a GPU's memory; it
    reads the variable at its first allocation, and what the node sets itself stays."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        renamed = tuple(map(int, version("torch").split(".")[:2])) >= (2, 9)
        os.environ["PYTORCH_ALLOC_CONF" if renamed else "PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def _give_back_memory() -> None:
    """Has glibc return what an earlier task freed: it would count as this one's (malloc_trim(3))."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _forget_peak() -> None:
    """Resets the kernel's peak of this process, so that each of its many tasks has its own.

    https://www.kernel.org/doc/html/latest/filesystems/proc.html, ``clear_refs``.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """The most resident bytes of this process since the last reset; since its start where the system has none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):  # not Linux
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Calls the listener with every span of this thread while the block runs, beside listeners from outside the block."""
    outer = _listener.get()

    def hear(span: Span) -> None:
        listener(span)
        if outer is not None:
            outer(span)

    token = _listener.set(hear)
    try:
        yield
    finally:
        _listener.reset(token)


def tell_span(span: Span) -> None:
    """Calls the thread's listener, where there is one."""
    listener = _listener.get()
    if listener is not None:
        listener(span)


def joined(spans: Iterable[Span], pause_s: float) -> list[Span]:
    """Joins neighbouring spans of one worker and stage where at most ``pause_s`` lies between them."""
    merged: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.worker, span.begun_at)):
        last = merged[-1] if merged else None
        alike = last is not None and (last.worker, last.stage) == (span.worker, span.stage)
        if last is None or not alike or span.begun_at - last.finished_at > pause_s:
            merged.append(span)
            continue
        end, count = max(last.finished_at, span.finished_at), last.count + span.count
        peak = max(last.peak_bytes, span.peak_bytes)
        gpu_peak = max(last.gpu_peak_bytes, span.gpu_peak_bytes)
        merged[-1] = replace(last, finished_at=end, count=count, peak_bytes=peak, gpu_peak_bytes=gpu_peak)
    return merged
