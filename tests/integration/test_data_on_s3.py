"""The data stage from an S3 server writes the shards that it writes from a disk, by workers that open the store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faulting.s3 import uri
from small_runs import make_values, task_rows, write_jsonl

from emloc_ray.config.reading import parse_config
from emloc_ray.io.store.object_store import ObjectStore
from emloc_ray.planning.prepared import prepare
from emloc_ray.stages.tokens.stage import split_inputs
from emloc_ray.stages.tokens.tokens import tokenize_data


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_shards_are_those_of_local_files(
    s3_port: int, tmp_path: Path, tiny_model_dir: Callable[..., Path], ray_session: None, suffix: str
) -> None:
    rows, folder = task_rows(300), tmp_path / "rows"
    folder.mkdir()
    store = ObjectStore(uri(s3_port, f"data{suffix}"))
    for number in range(3):
        part, file = rows[number::3], folder / f"part-{number}{suffix}"
        if suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(part), file, row_group_size=30)
        else:
            write_jsonl(file, part)
        store.write(file.name, file.read_bytes())

    def shards(path: str, out: Path) -> tuple[Any, dict[str, bytes]]:
        values = make_values(tmp_path / "run", tiny_model_dir("llama"), Path(path))
        values["data"]["train"]["path"] = path
        values["calibration"]["num_calibration_tokens"] = 1000
        ready = prepare(parse_config(values))
        counts = tokenize_data(ready, ready.source.directory, out, inputs=split_inputs(ready))["splits"]
        files = sorted((out / "tokens").rglob("*.arrow"))
        return counts, {file.relative_to(out).as_posix(): file.read_bytes() for file in files}

    glob = uri(s3_port, f"data{suffix}/part-*{suffix}")
    assert shards(glob, tmp_path / "stored") == shards(str(folder), tmp_path / "local")
