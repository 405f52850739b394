"""Batches whose images are processed by a thread of their own while a model computes on the batch before."""

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


def made_batches(
    parts: Sequence[Sequence[Tokens]], pad_token_id: int, images: ImagesToInputs | None
) -> Iterator[dict[str, Tensor]]:
    """A padded batch of each part's rows, pinned; made ahead where rows show images."""
    shows = images is not None and any(row.images for part in parts for row in part)
    return made_ahead(parts, lambda part: pinned(collate(part, pad_token_id, images)), ahead=shows)


def pinned(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch in pinned memory, from which it is copied to a GPU while that computes; itself where there is no GPU."""
    if not torch.cuda.is_available():
        return batch
    return {key: value.pin_memory() if isinstance(value, Tensor) else value for key, value in batch.items()}
