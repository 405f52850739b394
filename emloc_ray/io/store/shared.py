"""What many tasks of a process ask for, made once."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar
from weakref import WeakValueDictionary

Value = TypeVar("Value")


class Shared(Generic[Value]):
    """The ``most`` values that were asked for last, by their keys; for several threads."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._made: OrderedDict[Hashable, Value] = OrderedDict()
        self._turns: WeakValueDictionary[Hashable, threading.Lock] = WeakValueDictionary()
        self._guard = threading.Lock()  # of both above

    def get(
        self, key: Hashable, make: Callable[[], Value], keeps: Callable[[Value], bool] = lambda value: True
    ) -> Value:
        """The key's value: made by the first thread that asks, while others that ask for the same wait as long as that one is
        at work. What it raises is raised to it alone: the next one tries again. ``keeps``: whether a value is for others too."""
        with self._guard:
            turn = self._turns.setdefault(key, threading.Lock())
        with turn:
            with self._guard:
                if key in self._made:
                    self._made.move_to_end(key)
                    return self._made[key]
            value = make()
            with self._guard:
                if keeps(value):
                    self._made[key] = value
                if len(self._made) > self._most:
                    self._made.popitem(last=False)
        return value
