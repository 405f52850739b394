"""The same done to many files, by a few threads."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from emloc_ray.errors import Stopped

Item = TypeVar("Item")
Result = TypeVar("Result")


def by_threads(
    count: int,
    function: Callable[[Item], Result],
    items: Iterable[Item],
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Result]:
    """What a function gives for each item, in their order, by so many threads. Raises Stopped, and begins no other item, where
    ``stopped`` turns true: Ctrl-C reaches the main thread alone, and no process ends before such threads are done."""

    def one(item: Item) -> Result:
        if stopped():
            raise Stopped("Stopped before all files were seen to.")
        return function(item)

    with ThreadPoolExecutor(count) as pool:
        yield from pool.map(one, items)
