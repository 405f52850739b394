"""Iterates over slow items, such as Ray Data's rows, and looks now and then whether to stop."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")

LOOK_S = 1.0  # between two looks while nothing comes
_END_S = 5.0  # for tasks to be ended; what hangs is not waited for


@contextlib.contextmanager
def polled(
    items: Iterable[Item], look: Callable[[], None], end: Callable[[], None] = lambda: None, look_s: float = LOOK_S
) -> Iterator[Iterator[Item]]:
    """Gives the ``items``, which a thread iterates over. Calls ``look`` after every ``look_s`` seconds without an item; what it
    raises leaves the block. Where the block raises, ``end`` is called in a thread, to end the work, and the iteration stops at
    the next item."""
    given: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    left = threading.Event()

    def take() -> None:
        try:
            for item in items:
                if left.is_set():
                    return
                given.put(("item", item))
            given.put(("over", None))
        except BaseException as error:  # noqa: BLE001  raised again below
            given.put(("error", error))

    def rows() -> Iterator[Item]:
        while True:
            try:
                kind, value = given.get(timeout=look_s)
            except queue.Empty:
                look()
                continue
            if kind == "error":
                raise value
            if kind == "over":
                return
            yield value

    threading.Thread(target=take, daemon=True).start()
    try:
        yield rows()
    except BaseException:
        left.set()
        ending = threading.Thread(target=end, daemon=True)
        ending.start()
        ending.join(_END_S)
        raise
