"""What other threads make ahead."""

import threading
from collections.abc import Iterator

import pytest

from emloc_ray.io.store.threads import one_ahead


def test_the_next_item_is_made_while_one_is_used_in_order_by_another_thread() -> None:
    made, makers = [threading.Event() for _ in range(4)], set[str]()

    def items() -> Iterator[int]:
        for number, event in enumerate(made):
            makers.add(threading.current_thread().name)
            event.set()
            yield number

    for number, item in enumerate(one_ahead(items())):
        assert item == number
        assert all(event.wait(10) for event in made[: number + 2])
        assert not any(event.is_set() for event in made[number + 2 :])
    assert len(makers) == 1
    assert threading.current_thread().name not in makers


def test_what_making_raises_comes_after_what_was_made() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("no other")

    ahead = one_ahead(items())
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="no other"):
        next(ahead)
