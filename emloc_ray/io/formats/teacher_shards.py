"""A teacher's top log-probabilities at label positions, on disk: safetensors with fixed ranges of rows, read by row.

A label takes k float16 log-probabilities and k int32 ids: 6 k bytes. float16 rounds a log-probability by at most 2⁻¹¹ of itself
(bfloat16: 2⁻⁸), so that probabilities near 1 are the most exact.
"""

import bisect
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from emloc_ray.errors import ArtifactError, DamagedArtifactError
from emloc_ray.io.formats.checkpoint import TensorEntry, read_shard
from emloc_ray.io.formats.shards import write_tensors
from emloc_ray.io.store.atomic import read_json, write_json
from emloc_ray.io.store.node_cache import ensure

_INDEX = "index.json"
BYTES_PER_LOGIT = 6
_OPEN = 64  # shards whose headers and rows a reader remembers
MAX_ROWS, _SHARD_BYTES = 64, 2**28  # of a shard
_DTYPES = {"rows": torch.int64, "ends": torch.int64, "ids": torch.int32, "log_probs": torch.float16}

TopRow = tuple[Tensor, Tensor]  # of one row: ids and log-probabilities, (labels, k) each


def rows_per_shard(row_tokens: float, num_logits: int) -> int:
    """Rows of a shard, at ``row_tokens`` a row on average; the writer holds a shard twice in memory."""
    return max(1, min(MAX_ROWS, int(_SHARD_BYTES // max(1.0, BYTES_PER_LOGIT * num_logits * row_tokens))))


def teacher_shard(directory: Path, number: int) -> Path:
    """The file of one shard."""
    return directory / f"logits-{number:05d}.safetensors"


def write_teacher_shard(path: Path, rows: Sequence[int], tops: Sequence[TopRow]) -> None:
    """Writes what the teacher says of ``rows``, ascending positions of the split, atomically."""
    counts = torch.tensor([len(ids) for ids, _ in tops])
    tensors = {
        "rows": torch.tensor(rows, dtype=torch.int64),
        "ends": counts.cumsum(0),
        "ids": torch.cat([ids for ids, _ in tops]).to("cpu", torch.int32),
        "log_probs": torch.cat([log_probs for _, log_probs in tops]).to("cpu", torch.float16),
    }
    write_tensors(path, tensors)


def write_teacher_index(directory: Path, first_rows: Sequence[int]) -> None:
    """Writes which row each shard begins with, once all of them are there."""
    write_json(directory / _INDEX, {"first_rows": list(first_rows)})


class TeacherShards:
    """What a teacher says of a split's rows, by their positions. Raises ArtifactError where the index is missing, a row is in
    no shard, or a shard holds something else."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        index = read_json(directory / _INDEX)
        if index is None:
            raise ArtifactError(f"{directory} holds no {_INDEX}: run the heal stage again.")
        self._first_rows: list[int] = index["first_rows"]
        self._shard = functools.lru_cache(maxsize=_OPEN)(self._open)

    def _open(self, number: int) -> tuple[dict[str, TensorEntry], dict[int, tuple[int, int]]]:
        """A shard's tensors, and the labels of each of its rows: from where to where in these."""
        path = teacher_shard(self.directory, number)
        ensure(path)
        entries = {entry.name: entry for entry in read_shard(path).entries}
        dtypes = {name: entry.dtype for name, entry in entries.items()}
        if dtypes != _DTYPES:
            name = min(name for name, _ in dtypes.items() ^ _DTYPES.items())
            raise DamagedArtifactError(
                f"{path} is not as the heal stage writes it (tensor {name!r}): delete it and run the same command again."
            )
        rows, ends = entries["rows"].read_rows().tolist(), entries["ends"].read_rows().tolist()
        return entries, {row: (begin, end) for row, begin, end in zip(rows, [0, *ends], ends, strict=False)}

    def row(self, position: int) -> TopRow:
        """The teacher's ids (int32) and log-probabilities (float16) at each label of a row, ``(labels, k)`` both."""
        number = bisect.bisect_right(self._first_rows, position) - 1
        entries, places = self._shard(number) if number >= 0 else ({}, {})
        if position not in places:
            raise ArtifactError(f"{self.directory} holds nothing of row {position}: run the heal stage again.")
        return entries["ids"].read_rows(*places[position]), entries["log_probs"].read_rows(*places[position])
