"""The number of sampled rows that have a number of tokens, found without tokenizing all rows."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from emloc_ray.data.hash_order import row_hash
from emloc_ray.data.splits import RowSelection

_FIRST_ROWS = 256
_MOST_ROWS = 2**17
_MARGIN = 1.05


def rows_within(
    selection: RowSelection,
    num_tokens: int,
    seed: int,
    lengths: Callable[[RowSelection], NDArray[np.int64]],
    *,
    first_rows: int = _FIRST_ROWS,
    most_rows: int = _MOST_ROWS,
) -> int:
    """The smallest k such that the k rows of smallest hash have ``num_tokens`` tokens; all rows where they have fewer.

    ``lengths`` gives the tokens of a selection's rows, in the order of their numbers. It counts in rounds: a first few rows,
    then as many as their mean says are missing, and a little more, but at most ``most_rows``. k does not depend on the rounds.
    """
    taken, tokens = 0, 0
    while taken < len(selection):
        missing = num_tokens - tokens
        guess = math.ceil(_MARGIN * missing * taken / tokens) if tokens else taken
        more = min(max(guess, first_rows), most_rows)
        rest = selection.sample(taken + more, seed).split(taken, seed)[1]
        order = np.argsort(row_hash(np.concatenate(list(rest.chunks())), seed))
        totals = tokens + np.cumsum(lengths(rest)[order])
        reached = int(np.searchsorted(totals, num_tokens))
        if reached < len(rest):
            return taken + reached + 1
        taken, tokens = taken + len(rest), int(totals[-1])
    return len(selection)
