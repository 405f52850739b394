"""Work of other threads: the same done to many files, and items made before they are asked for."""

from collections.abc import Callable, Generator, Iterable, Iterator
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


def one_ahead(items: Iterator[Item]) -> Generator[Item, None, None]:
    """The same items; a thread of its own makes each, while the one before it is used."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item  # type: ignore[misc]
