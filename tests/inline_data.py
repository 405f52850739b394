"""Ray Data's part of tokenizing, done in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from emloc_ray.data import tokenizing

Batch = dict[str, Any]


class Inline:
    """Stands for Ray Data's result: the function, called here, on one unit after the other."""

    def __init__(self, work: list[Batch], function: Callable[[Batch], Batch], num_workers: int) -> None:
        self.batches = [function({"unit": np.array([json.dumps(unit)])}) for unit in work]

    def iter_rows(self) -> list[Batch]:
        return [dict(zip(b, values, strict=True)) for b in self.batches for values in zip(*b.values(), strict=True)]

    def iter_batches(self, **options: Any) -> list[Batch]:
        return self.batches[::-1]  # results come in any order


@contextmanager
def tokenized_here() -> Iterator[None]:
    """Rows are tokenized in this process meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizing, "mapped", Inline)
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        yield
