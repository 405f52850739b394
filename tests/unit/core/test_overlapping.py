"""A change of settings lasts as long as any of its blocks, in whatever order these end."""

from __future__ import annotations

import contextlib

from hypothesis import given
from hypothesis import strategies as st

from emloc_ray.core.overlapping import Overlapping


@given(st.lists(st.integers(0, 3), max_size=12))
def test_the_change_lasts_until_the_last_block_ends(turns: list[int]) -> None:
    """At its turn a thread enters its block, or leaves it."""
    setting = ["before"]

    def change() -> str:
        before, setting[0] = setting[0], "changed"
        return before

    changed = Overlapping(change, lambda before: setting.__setitem__(0, before))
    blocks: dict[int, contextlib.ExitStack] = {}
    for thread in [*turns, *(number for number in range(4) if turns.count(number) % 2)]:
        if thread in blocks:
            blocks.pop(thread).close()
        else:
            blocks[thread] = contextlib.ExitStack()
            blocks[thread].enter_context(changed.block())
        assert setting == ["changed" if blocks else "before"]
