"""The rows of each split: a function of the files, the seed and the asked sizes, the same on any cluster."""

from __future__ import annotations

import functools
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emloc_ray.data.hash_order import Rows, row_chunks, row_hash, rows_at
from emloc_ray.data.reading import Place, Row, SourceFile, read_rows
from emloc_ray.data.row_formats import columns_of

SPLITS = ("train", "calibration", "selection", "eval")
"""The splits of every run; ``healing`` joins them where the config names rows to heal on, ``validation`` where the emulator
is scored while it is trained."""
CALIBRATION_SEED = 3
"""Added to the run's seed to draw calibration rows."""
MIXTURE_SEED = 6
"""Added to the run's seed to draw the rows of several sources."""
_HELD_OUT_SEEDS = {"eval": 1, "selection": 2, "validation": 7}  # added to the run's seed to draw them from train

_LARGEST = 2**64 - 1


@dataclass(frozen=True)
class HashRange:
    """The rows whose hash under ``seed`` is from ``low`` to ``high``, both included; and all that are not in
    ``[begin, end)``, where that is given."""

    seed: int
    low: int
    high: int
    begin: int = 0
    end: int | None = None

    def holds(self, rows: Rows) -> NDArray[np.bool_]:
        """Which of the rows are in it."""
        hashes = row_hash(rows, self.seed)
        inside = (hashes >= np.uint64(self.low)) & (hashes <= np.uint64(self.high))
        return inside if self.end is None else inside | (rows < self.begin) | (rows >= self.end)


def counts_in_shares(rows: Mapping[int, int], weights: Sequence[float]) -> dict[int, int]:
    """How many ``rows`` of each part are taken, so that they have the shares ``weights``: all of the part that ends first."""
    most = min(count / weights[part] for part, count in rows.items())
    return {part: min(max(1, round(weights[part] * most)), count) for part, count in rows.items()}


@dataclass(frozen=True)
class RowSelection:
    """Rows of a list of files, by ascending number in the files' concatenation: those whose hashes are in all ``ranges``. A
    selection of 10⁷ rows is a few numbers, from which every worker finds any part of it."""

    sources: tuple[SourceFile, ...]
    ranges: tuple[HashRange, ...]
    num_rows: int

    @classmethod
    def all_rows(cls, sources: Sequence[SourceFile]) -> RowSelection:
        """Every row of every file."""
        return cls(tuple(sources), (), sum(source.num_rows for source in sources))

    @classmethod
    def mixed(cls, sources: Sequence[SourceFile], weights: Sequence[float], seed: int) -> RowSelection:
        """As many rows as have the shares ``weights`` of each source's part, none twice: the part that ends first is taken
        whole. Files of a part are neighbours."""
        whole, start = cls.all_rows(sources), 0
        spans: dict[int, tuple[int, int]] = {}
        for source in sources:
            spans[source.part] = (spans.get(source.part, (start, 0))[0], start + source.num_rows)
            start += source.num_rows
        counts = counts_in_shares({part: end - begin for part, (begin, end) in spans.items()}, weights)
        ranges = []
        for part, (begin, end) in spans.items():
            count = counts[part]
            border = int(
                row_hash(rows_at(functools.partial(whole.chunks, begin, end), seed, count - 1, count), seed)[0]
            )
            ranges.append(HashRange(seed, 0, border, begin, end))
        return cls(tuple(sources), tuple(ranges), sum(counts.values()))

    def __len__(self) -> int:
        return self.num_rows

    def chunks(self, begin: int = 0, end: int | None = None) -> Iterator[Rows]:
        """The selection's rows in ``[begin, end)`` of the concatenation, ascending, at most 65,536 at once."""
        whole = sum(source.num_rows for source in self.sources)
        for rows in row_chunks(begin, whole if end is None else end):
            for part in self.ranges:
                rows = rows[part.holds(rows)]
            yield rows

    def sample(self, count: int | None, seed: int) -> RowSelection:
        """The ``count`` rows of smallest hash; all for None, or where there are fewer."""
        if count is None or count >= len(self):
            return self
        return self.split(count, seed)[0]

    def split(self, count: int, seed: int) -> tuple[RowSelection, RowSelection]:
        """The ``count`` rows of smallest hash, and the others."""
        count = min(count, len(self))
        if count == 0:
            below, above = HashRange(seed, 1, 0), HashRange(seed, 0, _LARGEST)
        else:
            border = int(row_hash(rows_at(self.chunks, seed, count - 1, count), seed)[0])
            below = HashRange(seed, 0, border)
            above = HashRange(seed, border + 1, _LARGEST) if border < _LARGEST else HashRange(seed, 1, 0)
        return (
            RowSelection(self.sources, (*self.ranges, below), count),
            RowSelection(self.sources, (*self.ranges, above), len(self) - count),
        )

    def bounds(self, rows_per_shard: int) -> Rows:
        """The begin of each shard of ``rows_per_shard`` rows in the concatenation, and the last one's end: ``(shards + 1,)``."""
        starts, seen = [], 0
        for rows in self.chunks():
            starts.append(rows[-seen % rows_per_shard :: rows_per_shard])
            seen += len(rows)
        return np.concatenate([*starts, [sum(source.num_rows for source in self.sources)]]).astype(np.int64)

    def read(
        self, begin: int, end: int, format: str = "auto", columns: Mapping[str, str] | None = None
    ) -> Iterator[tuple[Place, Row]]:
        """Yields ``(file and row, row)`` for the selection's rows in ``[begin, end)``, as one stream through each file.

        Reads only the columns of a Parquet file's ``format``, under the file's own names; all of them where that is not known.
        A line that is no row comes as :class:`emloc_ray.data.reading.BadRow`. Raises DataError where one cannot be read.
        """
        start = 0
        for source in self.sources:
            stop = start + source.num_rows
            if begin < stop and start < end:
                chunks = self.chunks(max(begin, start), min(end, stop))
                numbers = (number for rows in chunks for number in (rows - start).tolist())
                needed, optional = columns_of(source.format or format, columns or {})
                for number, row in read_rows(source, numbers, needed, optional, keep_bad=True):
                    yield Place.of(source, number), row
            start = stop


def held_out(
    num_rows: int,
    given: Container[str],
    *,
    num_selection_samples: int,
    num_eval_samples: int | None,
    num_validation_samples: int | None = None,
) -> dict[str, int]:
    """How many of ``num_rows`` rows to train on are taken out for each split that is not ``given``: at most a tenth for each.
    None are taken for validation where no number is asked for."""
    tenth = max(1, num_rows // 10)
    asked = {
        "eval": num_eval_samples or tenth,
        "selection": num_selection_samples,
        **({} if num_validation_samples is None else {"validation": num_validation_samples}),
    }
    return {name: min(count, tenth) for name, count in asked.items() if name not in given}


def assign_splits(
    given: dict[str, RowSelection],
    *,
    num_calibration_samples: int | None,
    num_selection_samples: int,
    num_eval_samples: int | None,
    seed: int,
    num_validation_samples: int | None = None,
) -> dict[str, RowSelection]:
    """Makes the splits that were not given from the training rows.

    Rows of :func:`held_out` are taken *out of* train, so that nothing is chosen or reported on a trained row. Calibration rows
    are sampled from the rest of train. Other splits stay as given.
    """
    splits = dict(given)
    counts = held_out(
        len(given["train"]),
        given,
        num_selection_samples=num_selection_samples,
        num_eval_samples=num_eval_samples,
        num_validation_samples=num_validation_samples,
    )
    for name, count in counts.items():
        splits[name], splits["train"] = splits["train"].split(count, seed + _HELD_OUT_SEEDS[name])
    return {
        "train": splits["train"],
        "calibration": splits.get("calibration", splits["train"]).sample(
            num_calibration_samples, seed + CALIBRATION_SEED
        ),
        "selection": splits["selection"].sample(num_selection_samples, seed + 4),
        "eval": splits["eval"].sample(num_eval_samples, seed + 5),
        **{name: rows for name, rows in splits.items() if name not in SPLITS},
    }
