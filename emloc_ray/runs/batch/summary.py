"""Writes ``summary.parquet``, a batch's results as a table, a row a task."""

import dataclasses

import pyarrow as pa
import pyarrow.parquet as pq

from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.io.store.atomic import atomic_file
from emloc_ray.runs.batch.state import BatchState

SUMMARY = "summary.parquet"
_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("stage", pa.string()),
        ("started_at", pa.timestamp("ms", "UTC")),
        ("ended_at", pa.timestamp("ms", "UTC")),
        ("seconds", pa.float64()),
        ("planned_seconds", pa.float64()),
        ("planned_bytes", pa.int64()),
        ("train_loss", pa.float64()),
        ("original_loss", pa.float64()),
        ("served_loss", pa.float64()),
        ("notes", pa.int64()),
        ("taken", pa.list_(pa.string())),
    ]
)


def write_summary(run: RunDirectory, state: BatchState) -> None:
    """Writes the batch's summary; times in UTC, losses in nats a token, ``taken`` the stages that came from the cache."""
    rows = []
    for task in state.tasks:
        row = dataclasses.asdict(task)
        times = {key: None if row[key] is None else int(row[key] * 1000) for key in ("started_at", "ended_at")}
        rows.append({**row, **times, "taken": list(task.taken)})
    with atomic_file(run.path(SUMMARY)) as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), file)
