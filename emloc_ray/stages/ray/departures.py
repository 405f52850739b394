"""Nodes that are about to leave: a cloud that takes one back says so a little before, and Ray drains it."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable

import ray
from ray._private.state import state

ASK_S = 5.0
_ANSWER_S = 1.0


def draining() -> set[str]:
    """The ids of the nodes that Ray drains."""
    with contextlib.suppress(Exception):  # a head that does not answer now is asked again
        return {*state.get_draining_nodes()}
    return set()


class Departures:
    """Remembers which nodes were about to leave; asks Ray every ``every_s`` seconds at most."""

    def __init__(self, find: Callable[[], Iterable[str]] = draining, every_s: float = ASK_S) -> None:
        self.find, self.every_s = find, every_s
        self.nodes: set[str] = set()
        self._due_at = 0.0  # by the monotonic clock
        self._looking: threading.Thread | None = None

    def look(self) -> None:
        """Asks Ray, when it is time to, and waits a second at most: where the head is dead, Ray never answers."""
        if time.monotonic() >= self._due_at and (self._looking is None or not self._looking.is_alive()):
            self._due_at = time.monotonic() + self.every_s
            self._looking = threading.Thread(target=lambda: self.nodes.update(self.find()), daemon=True)
            self._looking.start()
            self._looking.join(_ANSWER_S)

    def named_in(self, text: str) -> bool:
        """Whether a text names one of them by its id."""
        return any(node in text for node in tuple(self.nodes))

    def here(self) -> bool:
        """Whether this process's own node is one of them."""
        self.look()
        return bool(self.nodes) and ray.get_runtime_context().get_node_id() in self.nodes
