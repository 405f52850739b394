"""A teacher's logits on disk, read back by row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from emloc_ray.errors import ArtifactError
from emloc_ray.io.formats.teacher_shards import (
    TeacherShards,
    TopRow,
    teacher_shard,
    write_teacher_index,
    write_teacher_shard,
)


def top(labels: int, seed: int) -> TopRow:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 300, (labels, 4), generator=generator, dtype=torch.int32)
    return ids, -5 * torch.rand(labels, 4, generator=generator)


def test_rows_are_read_back_from_the_shard_that_holds_them(tmp_path: Path) -> None:
    rows = {3: top(5, 0), 10: top(0, 1), 11: top(2, 2), 40: top(7, 3)}
    for number, part in enumerate(([3, 10], [11, 40])):
        write_teacher_shard(teacher_shard(tmp_path, number), part, [rows[row] for row in part])
    write_teacher_index(tmp_path, [3, 11])
    stored = TeacherShards(tmp_path)
    for row, (ids, log_probs) in rows.items():
        found = stored.row(row)
        assert torch.equal(found[0], ids)
        assert torch.equal(found[1], log_probs.half())


@pytest.mark.parametrize("row", [2, 4, 41])
def test_a_row_that_is_not_there_is_named(tmp_path: Path, row: int) -> None:
    write_teacher_shard(teacher_shard(tmp_path, 0), [3, 40], [top(1, 0), top(1, 1)])
    write_teacher_index(tmp_path, [3])
    with pytest.raises(ArtifactError, match=f"row {row}"):
        TeacherShards(tmp_path).row(row)


def test_no_index_no_shards(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"index\.json"):
        TeacherShards(tmp_path)
