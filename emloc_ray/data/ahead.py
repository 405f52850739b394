"""What a thread of its own makes or reads while a model or a GPU computes on the piece before: batches with images, weights."""

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from emloc_ray.data.formats import Tokens
from emloc_ray.data.token_shards import ImagesToInputs, collate

Item = TypeVar("Item")
Made = TypeVar("Made")

_AHEAD = 2  # batches that wait


def made_ahead(
    items: Iterable[Item], make: Callable[[Item], Made], ahead: bool = True, most: int = _AHEAD
) -> Generator[Made, None, None]:
    """``make(item)`` of each item, in order; ``ahead``: made in a thread before it is asked for, ``most`` of them at most.
    Raises what ``make`` raises, when that item's turn comes."""
    if not ahead:
        yield from map(make, items)
        return
    threads, left, waiting = torch.get_num_threads(), iter(items), deque[Future[Made]]()
    # A thread begins with torch's own number of threads.
    pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,))
    try:
        while True:
            waiting.extend(pool.submit(make, item) for item in itertools.islice(left, most + 1 - len(waiting)))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def read_ahead(
    pieces: Sequence[Item], read: Callable[[Item], Made], device: torch.device
) -> Iterator[tuple[Item, Made | None]]:
    """Yields each piece of a task for a GPU with its tensors, and reads the next one's meanwhile. A task's only piece, and all
    that a CPU computes, come without tensors: their layers are read one by one, in less memory."""
    if len(pieces) == 1 or device.type == "cpu":
        yield from ((piece, None) for piece in pieces)
        return
    yield from zip(pieces, made_ahead(pieces, read, most=1), strict=True)


def batches_by_length(
    rows: Sequence[Tokens], batch_size: int, pad_token_id: int, images: ImagesToInputs | None = None
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Padded and pinned batches of rows of like length, each after the numbers of its rows in ``rows``. They depend on the
    rows alone, and are made ahead where rows show images."""
    numbers = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    parts = [numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)]

    def make(part: list[int]) -> tuple[list[int], dict[str, Tensor]]:
        return part, pinned(collate([rows[number] for number in part], pad_token_id, images))

    return made_ahead(parts, make, ahead=images is not None and any(row.images for row in rows))


def pinned(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch in pinned memory, from which it is copied to a GPU while that computes; itself where there is no GPU."""
    if not torch.cuda.is_available():
        return batch
    return {key: value.pin_memory() if isinstance(value, Tensor) else value for key, value in batch.items()}
