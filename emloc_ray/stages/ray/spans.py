"""Spans of work: which worker did what, when, with how much memory. Ray's workers send them with their results; a run's
trace and the measures of its stages listen."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emloc_ray.io.store.turns import own_name

_EVERY_S = 0.02


@dataclass(frozen=True)
class Span:
    """A piece of a stage's work, its ``unit``, by one worker.

    Times are in seconds since 1970. ``peak_bytes``: the most that its process held meanwhile, without mapped models.
    ``idle_bytes``: what it held before, which is what its imports take. ``gpu_peak_bytes``: what torch reserved of its GPU. 0
    where a value is not known.
    """

    stage: str
    worker: str
    unit: str
    begun_at: float
    finished_at: float
    peak_bytes: int = 0
    gpu_peak_bytes: int = 0
    idle_bytes: int = 0


@dataclass(frozen=True)
class Timed:
    """A task's result and its span, whose stage and unit the driver names."""

    result: Any
    span: Span


Listener = Callable[[Span], None]
# One a thread: a batch has a thread for each task.
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


_idle_bytes = [0]  # what this process held when its latest work began
_left_alone = [0]  # how many modules were imported when the collector was last told to leave alone what there is


def timed(function: Callable[..., Any], goes_on: bool = False) -> Callable[..., Timed]:
    """The function, returning its result as :class:`Timed`; ``goes_on``: what it holds already is its work's own."""

    @functools.wraps(function)
    def run(*arguments: Any, **named: Any) -> Timed:
        if not goes_on:
            _leave_imports_alone()
        _give_back_memory()
        _forget_peak()
        os.environ.update(growing_segments(os.environ))
        if cuda := _cuda():
            cuda.reset_peak_memory_stats()
        begun_at = time.time()
        if not goes_on:
            _idle_bytes[0] = _own_bytes()
        with _OwnPeak() as own:
            result = function(*arguments, **named)
        gpu_peak = cuda.max_memory_reserved() if (cuda := _cuda()) else 0
        peak = min(_peak(), own.bytes or sys.maxsize)
        return Timed(result, Span("", own_name(), "", begun_at, time.time(), peak, gpu_peak, _idle_bytes[0]))

    return run


def _cuda() -> Any:
    """torch.cuda where this process uses a GPU; asking must not begin to."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def growing_segments(variables: Mapping[str, str]) -> dict[str, str]:
    """The variable that has torch's CUDA allocator grow its segments, which keeps batches of many lengths from splitting a
    GPU's memory; empty where ``variables`` say already what it does. A process reads it when it first uses CUDA."""
    if {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & variables.keys():
        return {}
    return {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def _leave_imports_alone() -> None:
    """Has the garbage collector pass over the some 650,000 imported objects, which stay as long as the process does: each
    collection took 0.2 to 0.4 s of them, several a stage. Between two works nothing else is held that a collection would have
    to find."""
    if len(sys.modules) > 1.05 * _left_alone[0]:
        gc.collect()
        gc.freeze()
        _left_alone[0] = len(sys.modules)


def _give_back_memory() -> None:
    """Has glibc return what an earlier task freed: it would count as this one's (malloc_trim(3))."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _forget_peak() -> None:
    """Resets the kernel's peak of this process, so that each of its many tasks has its own (proc(5), ``clear_refs``)."""
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


class _OwnPeak:
    """The most that this process held while the block ran. Pages of models' files do not count: they are mapped, and the kernel
    takes them back when it needs them.

    The kernel keeps no peak without them, so the value is read every ``_EVERY_S``. 0 where the system does not tell.
    """

    def __init__(self) -> None:
        self.bytes = self._most = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> _OwnPeak:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        with contextlib.suppress(OSError, ValueError, IndexError):  # not Linux
            resident, shared = _pages()
            self.bytes = max(self._most, resident - shared) + shared - _of_models()

    def _look(self) -> None:
        with contextlib.suppress(OSError, ValueError, IndexError):
            while not self._over.wait(_EVERY_S):
                resident, shared = _pages()
                self._most = max(self._most, resident - shared)


def _own_bytes() -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return _pages()[0] - _of_models()
    return 0


def _pages() -> tuple[int, int]:
    """Resident bytes, and those of them that a file or shared memory backs (proc(5), ``statm``)."""
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return resident * resource.getpagesize(), shared * resource.getpagesize()


def _of_models() -> int:
    """Resident bytes of mapped safetensors files."""
    if ".safetensors" not in Path("/proc/self/maps").read_text():  # which is quick: the other file counts every page
        return 0
    total, is_model = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *rest = line.split(maxsplit=1)
        if not key.endswith(":"):
            is_model = line.endswith(".safetensors")
        elif is_model and key == "Rss:":
            total += int(rest[0].split()[0]) * 1024
    return total


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
