"""Who worked at what, when, and holding how much: told by Ray's workers with their results, heard by whoever keeps a run's
log and measures its stages."""

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
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Span:
    """``count`` pieces of a stage's work, ``unit`` where it is one, by one worker; times in seconds since 1970, ``peak_bytes``
    the most that its process held meanwhile, 0 where that is not known."""

    stage: str
    worker: str
    unit: str
    begun_at: float
    finished_at: float
    count: int = 1
    peak_bytes: int = 0


@dataclass(frozen=True)
class Timed:
    """What a task gave, with when it ran, in which process, and the most that this held meanwhile."""

    result: Any
    worker: str
    begun_at: float
    finished_at: float
    peak_bytes: int


Listener = Callable[[Span], None]
# Of a thread: a batch has one for each of its tasks.
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def timed(function: Callable[..., Any]) -> Callable[..., Timed]:
    """The function with its result as :class:`Timed`."""

    @functools.wraps(function)
    def run(*arguments: Any, **named: Any) -> Timed:
        _give_back_memory()
        _forget_peak()
        begun_at = time.time()
        result = function(*arguments, **named)
        return Timed(result, f"process {os.getpid()} on {socket.gethostname()}", begun_at, time.time(), _peak())

    return run


def _give_back_memory() -> None:
    """What the process freed of an earlier task, and glibc kept for the next: it would count as this one's (malloc_trim(3))."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _forget_peak() -> None:
    """Has the kernel take what this process holds for its peak: one that serves many tasks tells each its own.

    https://www.kernel.org/doc/html/latest/filesystems/proc.html, ``clear_refs``.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """The most that this process held resident, in bytes, since that was forgotten; since its start where it cannot be."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):  # not Linux
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Has the listener hear of all work that this thread hears of while the block runs, as does who listens already."""
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
    """Tells the thread's listener, where there is one."""
    listener = _listener.get()
    if listener is not None:
        listener(span)


def joined(spans: Iterable[Span], pause_s: float) -> list[Span]:
    """The spans with neighbours of one worker and stage made one where no more than ``pause_s`` lies between them."""
    found: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.worker, span.begun_at)):
        last = found[-1] if found else None
        alike = last is not None and (last.worker, last.stage) == (span.worker, span.stage)
        if last is None or not alike or span.begun_at - last.finished_at > pause_s:
            found.append(span)
            continue
        end, count = max(last.finished_at, span.finished_at), last.count + span.count
        peak = max(last.peak_bytes, span.peak_bytes)
        found[-1] = replace(last, finished_at=end, count=count, peak_bytes=peak)
    return found
