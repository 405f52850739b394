"""Which rows each split takes: a function of the files, the seed and the sizes asked, the same on any cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emloc_ray.data.reading import SourceFile

SPLITS = ("train", "calibration", "selection", "eval")


@dataclass(frozen=True)
class RowSelection:
    """Rows of a list of files, by their numbers in the files' concatenation, ascending."""

    sources: tuple[SourceFile, ...]
    rows: NDArray[np.int64]

    @classmethod
    def all_rows(cls, sources: Sequence[SourceFile]) -> RowSelection:
        """Every row of every file."""
        return cls(tuple(sources), np.arange(sum(source.num_rows for source in sources)))

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, count: int | None, seed: int) -> RowSelection:
        """The ``count`` rows of smallest hash (all where None or more than there are)."""
        if count is None or count >= len(self):
            return self
        return self.split(count, seed)[0]

    def split(self, count: int, seed: int) -> tuple[RowSelection, RowSelection]:
        """The ``count`` rows of smallest hash, and the others."""
        order = np.argsort(row_hash(self.rows, seed), kind="stable")
        first, rest = np.sort(self.rows[order[:count]]), np.sort(self.rows[order[count:]])
        return RowSelection(self.sources, first), RowSelection(self.sources, rest)

    def units(self, rows_per_unit: int) -> list[list[tuple[int, list[int]]]]:
        """Consecutive runs of rows as work units: for each, ``(file index, row numbers in that file)``."""
        starts = np.cumsum([0, *(source.num_rows for source in self.sources)])
        units = []
        for begin in range(0, len(self), rows_per_unit):
            rows = self.rows[begin : begin + rows_per_unit]
            files = np.searchsorted(starts, rows, side="right") - 1
            parts = [(int(file), (rows[files == file] - starts[file]).tolist()) for file in np.unique(files)]
            units.append(parts)
        return units


def row_hash(rows: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """A 64-bit mix of row number and seed (splitmix64, https://prng.di.unimi.it/splitmix64.c)."""
    with np.errstate(over="ignore"):
        z = rows.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def assign_splits(
    given: dict[str, RowSelection],
    *,
    num_calibration_samples: int,
    num_selection_samples: int,
    num_eval_samples: int | None,
    seed: int,
) -> dict[str, RowSelection]:
    """Completes the splits that were not given from the training rows.

    Held-out and selection rows are taken *out of* train (a tenth of it at most each), so that nothing is chosen or
    reported on a trained row; calibration is sampled from what is left to train on.
    """
    train = given["train"]
    tenth = max(1, len(train) // 10)
    evaluation, selection, calibration = given.get("eval"), given.get("selection"), given.get("calibration")
    if evaluation is None:
        evaluation, train = train.split(min(num_eval_samples or tenth, tenth), seed + 1)
    if selection is None:
        selection, train = train.split(min(num_selection_samples, tenth), seed + 2)
    if calibration is None:
        calibration = train
    return {
        "train": train,
        "calibration": calibration.sample(num_calibration_samples, seed + 3),
        "selection": selection.sample(num_selection_samples, seed + 4),
        "eval": evaluation.sample(num_eval_samples, seed + 5),
    }
