"""Units of work on rows: few of a huge row group; in one process where data are small, which ends when it is told to."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
from faulting.s3 import uri
from small_runs import task_rows, write_jsonl

from emloc_ray.data import units
from emloc_ray.data.reading import scan
from emloc_ray.data.splits import RowSelection
from emloc_ray.io.store.atomic import write_bytes
from emloc_ray.io.store.node_cache import mirror


def all_rows(path: Path) -> RowSelection:
    return RowSelection.all_rows([scan(path)])


def test_a_huge_row_group_is_read_by_few_units(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x"] * 100_000}), path)
    cut = list(units.shard_units("train", all_rows(path), 1024))
    assert len(cut) <= 16
    assert [unit["first"] for unit in cut] == [7 * number for number in range(len(cut))]
    assert sum(len(unit["bounds"]) - 1 for unit in cut) == 98


def test_each_unit_is_given_as_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[int] = []
    monkeypatch.setattr(
        "ray.data.from_items", lambda items, override_num_blocks=200: (blocks.append(override_num_blocks), Mock())[1]
    )
    units.ByRayData([{"number": number} for number in range(1000)], lambda batch: batch, 4, 0)
    assert blocks == [1000]


def test_ray_data_is_set_up_for_our_work_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """And as it was for what else its process does."""

    def state() -> list[Any]:
        context: Any = ray.data.DataContext.get_current()
        keys = ("raise_original_map_exception", "enable_progress_bars", "print_on_execution_start")
        return [logging.getLogger("ray.data").level, *(getattr(context, key) for key in keys)]

    seen: list[list[Any]] = []
    made: Any = Mock()
    made.map_batches.return_value.iter_batches = lambda **options: iter(
        [{"level": logging.getLogger("ray.data").level}]
    )
    monkeypatch.setattr("ray.data.from_items", lambda items, **options: (seen.append(state()), made)[1])
    before, filters = state(), list(warnings.filters)
    work = units.ByRayData([{"number": 1}], lambda batch: batch, 4, 0)
    assert seen == [[logging.CRITICAL, True, False, False]] != [before]
    assert (state(), list(warnings.filters)) == (before, filters)
    assert list(work.blocks()) == [{"level": logging.CRITICAL}]
    assert state() == before


def test_one_process_begins_no_task_once_it_is_ended(ray_session: None) -> None:
    def number(batch: dict[str, Any]) -> dict[str, Any]:
        return {"number": [json.loads(batch["unit"][0])["number"]]}

    made = units.InOneProcess([{"number": 1}, {"number": 2}], number, 0)
    blocks = made.blocks()
    assert next(blocks) == {"number": [1]}
    made.end()
    assert list(blocks) == []


def test_what_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = all_rows(write_jsonl(tmp_path / "rows.jsonl", task_rows(20)))
    [source] = rows.sources
    assert units.is_small([rows, rows])
    assert not units.is_small([replace(rows, sources=(replace(source, images="hash"),))])
    assert not units.is_small([replace(rows, sources=(replace(source, path="s3://bucket/rows.jsonl"),))])
    size = (tmp_path / "rows.jsonl").stat().st_size
    monkeypatch.setattr(units, "SMALL_BYTES", size)
    assert units.is_small([rows, rows])  # splits of the same file
    monkeypatch.setattr(units, "SMALL_BYTES", size - 1)
    assert not units.is_small([rows])
    pq.write_table(pa.Table.from_pylist(task_rows(20)), tmp_path / "rows.parquet")
    packed, size = all_rows(tmp_path / "rows.parquet"), (tmp_path / "rows.parquet").stat().st_size
    monkeypatch.setattr(units, "SMALL_BYTES", 8 * size)
    assert units.is_small([packed])
    monkeypatch.setattr(units, "SMALL_BYTES", 8 * size - 1)
    assert not units.is_small([packed])


def test_a_file_of_the_run_may_have_left_this_node(s3_port: int, node_cache: Path) -> None:
    path = mirror(uri(s3_port, "small/run")) / "rows" / "train.jsonl"
    write_bytes(path, b'{"text": "a"}\n')
    rows = all_rows(path)
    path.unlink()  # as where the cache is full
    assert units.is_small([rows])
