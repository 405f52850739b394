"""Settings of the whole process that blocks of code change while they last, in one thread or in several."""

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

Saved = TypeVar("Saved")


@dataclass(eq=False)
class _Block(Generic[Saved]):
    before: Saved


class Overlapping(Generic[Saved]):
    """A change of settings that lasts as long as any of its blocks does. ``change`` makes it and returns what was set before,
    ``restore`` sets that again.

    Blocks of two threads need not end in the order in which they began. One that ends sets again what it came upon; where a later
    one lasts, it leaves that to it.
    """

    def __init__(self, change: Callable[[], Saved], restore: Callable[[Saved], None]) -> None:
        self._change, self._restore = change, restore
        self._lock = threading.Lock()
        self._blocks: list[_Block[Saved]] = []  # by their begin

    @contextlib.contextmanager
    def block(self) -> Iterator[None]:
        """While it lasts, the change does."""
        with self._lock:
            block = _Block(self._change())
            self._blocks.append(block)
        try:
            yield
        finally:
            with self._lock:
                place = self._blocks.index(block)
                later = self._blocks[place + 1 : place + 2]
                del self._blocks[place]
                if later:
                    later[0].before = block.before
                else:
                    self._restore(block.before)


def silenced(name: str) -> contextlib.AbstractContextManager[None]:
    """While it lasts, a library's logger gives critical records alone."""
    return _silence(name).block()


@functools.cache
def _silence(name: str) -> Overlapping[int]:
    logger = logging.getLogger(name)

    def change() -> int:
        before = logger.level
        logger.setLevel(logging.CRITICAL)
        return before

    return Overlapping(change, logger.setLevel)
