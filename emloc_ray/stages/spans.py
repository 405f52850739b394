"""Who worked at what, and when: told by Ray's workers with their results, heard by whoever keeps a run's log."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Span:
    """``count`` pieces of a stage's work, ``unit`` where it is one, by one worker; times in seconds since 1970."""

    stage: str
    worker: str
    unit: str
    begun_at: float
    finished_at: float
    count: int = 1


@dataclass(frozen=True)
class Timed:
    """What a task gave, with when it ran and in which process."""

    result: Any
    worker: str
    begun_at: float
    finished_at: float


Listener = Callable[[Span], None]
# Of a thread: a batch has one for each of its tasks.
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def timed(function: Callable[..., Any]) -> Callable[..., Timed]:
    """The function with its result as :class:`Timed`."""

    @functools.wraps(function)
    def run(*arguments: Any, **named: Any) -> Timed:
        begun_at = time.time()
        result = function(*arguments, **named)
        return Timed(result, f"process {os.getpid()} on {socket.gethostname()}", begun_at, time.time())

    return run


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Has the listener hear of all work that this thread hears of while the block runs."""
    token = _listener.set(listener)
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
        found[-1] = replace(last, finished_at=end, count=count)
    return found
