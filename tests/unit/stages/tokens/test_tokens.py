"""The data stage: rows to splits of token shards; how many calibration takes, and what a killed run leaves for the next."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from small_runs import make_values, task_rows, write_jsonl

from emloc_ray.config.reading import parse_config
from emloc_ray.data import tokenizing
from emloc_ray.data.hash_order import row_hash
from emloc_ray.data.reading import scan
from emloc_ray.data.splits import CALIBRATION_SEED, SPLITS, RowSelection
from emloc_ray.data.token_shards import TokenShards
from emloc_ray.data.tokenizing import ShardTokenizer, TokenizeOptions
from emloc_ray.demos.python_sources import SourceTask
from emloc_ray.io.runs.resume import discard_unless
from emloc_ray.planning.prepared import Prepared, prepare
from emloc_ray.stages.context import Context
from emloc_ray.stages.ray.tasks import Resources
from emloc_ray.stages.tokens.stage import DATA, split_inputs, too_few_rows
from emloc_ray.stages.tokens.tokens import rows_of_splits, split_sources, tokenize_data

Make = Callable[..., Prepared]
NUM_ROWS = 600


@pytest.fixture
def prepared(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> Make:
    """``prepared(num_calibration_tokens=…, …)``: a config of 600 rows, all of which calibration may take."""
    path = write_jsonl(tmp_path / "rows.jsonl", task_rows(NUM_ROWS))

    def make(**calibration: Any) -> Prepared:
        values = make_values(tmp_path / "run", tiny_model_dir("llama"), path, data={"calibration": {"path": str(path)}})
        values["calibration"] = {"rows_per_shard": 8, **calibration}
        return prepare(parse_config(values))

    return make


def calibration_tokens(ready: Prepared, out: Path) -> tuple[dict[str, int], list[list[int]]]:
    """What the stage counted, and the rows it wrote."""
    counts = tokenize_data(ready, ready.source.directory, out)["splits"]["calibration"]
    shards = TokenShards(out / "tokens" / "calibration")
    return counts, [shards.row(position).input_ids for position in range(len(shards))]


def test_the_stage_says_which_formats_auto_took(prepared: Make, ray_session: None) -> None:
    ready = prepared(num_calibration_samples=4)
    ready = replace(
        ready, config=ready.config.model_copy(update={"data": ready.config.data.model_copy(update={"format": "auto"})})
    )
    context = Context(ready, ready.source.directory)
    result = DATA.run(context, DATA.inputs(context), Resources(), lambda done, total: None)
    assert result["formats"] == ["prompt_completion"]


def test_its_workers_ask_for_the_memory_that_is_granted(
    prepared: Make, tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tmp_path / "asked"

    class Telling(ShardTokenizer):
        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            asked.write_text(json.dumps(ray.get_runtime_context().get_assigned_resources()))
            return super().__call__(batch)

    monkeypatch.setattr(tokenizing, "ShardTokenizer", Telling)
    ready = prepared(num_calibration_samples=4)
    granted = Resources(memory_per_worker=2**28)
    context = Context(ready, ready.source.directory)
    DATA.run(context, DATA.inputs(context), granted, lambda done, total: None)
    assert json.loads(asked.read_text()) == {"CPU": 1.0, "memory": 2.0**28}


def test_a_tokenizer_s_own_code_may_make_other_tokens(prepared: Make) -> None:
    plain = prepared(num_calibration_samples=4)
    model = plain.config.model.model_copy(update={"trust_remote_code": True})
    trusting = replace(plain, config=plain.config.model_copy(update={"model": model}))
    assert split_inputs(trusting) != split_inputs(plain)


@pytest.mark.parametrize("wanted", [1, 2000, 9000])
def test_tokens_are_reached_by_whole_rows_on_any_number_of_workers(
    prepared: Make, tmp_path: Path, ray_session: None, wanted: int
) -> None:
    counts, rows = calibration_tokens(prepared(num_calibration_tokens=wanted), tmp_path / "one")
    assert counts["tokens"] == sum(map(len, rows))
    on_two = prepared(num_calibration_tokens=wanted, num_workers=2)
    assert calibration_tokens(on_two, tmp_path / "two") == (counts, rows)
    # By hand: the rows of smallest hash, up to the one that reaches the number.
    every = RowSelection.all_rows([scan(tmp_path / "rows.jsonl")])
    options = TokenizeOptions(str(on_two.source.directory), "prompt_completion", on_two.config.data.max_seq_length)
    whole = [tokens.input_ids for [tokens] in options.tokens(every.read(0, NUM_ROWS))]
    order = np.argsort(row_hash(np.arange(NUM_ROWS), CALIBRATION_SEED))
    totals = np.cumsum([len(whole[row]) for row in order])
    taken = sorted(order[: int(np.searchsorted(totals, wanted)) + 1].tolist())
    assert rows == [whole[row] for row in taken]
    assert counts["tokens"] - wanted < max(map(len, rows))


@pytest.mark.parametrize(
    ("calibration", "rows"),
    [({"num_calibration_samples": 20, "num_calibration_tokens": 10**6}, 20), ({"num_calibration_tokens": 10**6}, 600)],
)
def test_samples_bound_tokens_and_the_file_bounds_both(
    prepared: Make, tmp_path: Path, ray_session: None, calibration: dict[str, int], rows: int
) -> None:
    ready = prepared(**calibration)
    counts, found = calibration_tokens(ready, tmp_path / "out")
    assert counts["rows"] == len(found) == rows
    said = too_few_rows(ready.config, "calibration", counts)
    assert (said is None) == (rows == 20)
    if said is not None:
        assert (
            said
            == f"data.calibration: {counts['tokens']} tokens instead of the 1000000 asked for: there are no more rows."
        )


def test_a_killed_run_s_shards_are_kept_by_the_same_inputs_alone(
    prepared: Make, tmp_path: Path, ray_session: None
) -> None:
    ready, out = prepared(num_calibration_samples=40), tmp_path / "out"

    def times(inputs: Any) -> dict[str, int]:
        tokenize_data(ready, ready.source.directory, out, inputs=inputs)
        return {path.name: path.stat().st_mtime_ns for path in (out / "tokens" / "calibration").glob("*.arrow")}

    first = times(split_inputs(ready))
    (out / "tokens" / "calibration" / "shard-00002.arrow").unlink()
    (out / "tokens" / "calibration" / "index.json").unlink()
    again = times(split_inputs(ready))
    assert {name for name in first if first[name] != again[name]} == {"shard-00002.arrow"}
    other = times({**split_inputs(ready), "seed": 1})
    assert all(other[name] != again[name] for name in again)
    assert all(other[name] != time for name, time in times(None).items())


def test_a_directory_is_kept_for_the_same_inputs_alone(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "made"
    discard_unless(directory, {"a": 1})
    (directory / "file").write_text("x")
    discard_unless(directory, json.loads('{"a": 1}'))
    assert (directory / "file").is_file()
    discard_unless(directory, {"a": 2})
    assert not (directory / "file").exists()


@pytest.mark.slow
def test_large_rows_of_the_run_s_own_are_known_by_their_content(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(directory: Path, task: SourceTask) -> None:
        for name in SPLITS:
            rows = 66 if name == "train" else 1
            table = pa.table({"prompt": [os.urandom(2**20) for _ in range(rows)]})
            pq.write_table(table, directory / f"{name}.parquet", compression="none")

    found: list[list[str]] = []

    def tokenize(splits: Any, options: Any, out_dir: Path, **rest: Any) -> dict[str, Any]:
        found.append(sorted(path.name for path in out_dir.iterdir()))
        (out_dir / "shard").touch()
        return {}

    monkeypatch.setattr("emloc_ray.demos.tasks.write_task", generate)
    monkeypatch.setattr("emloc_ray.stages.tokens.tokens.rows_of_splits", lambda *_: {})
    monkeypatch.setattr("emloc_ray.stages.tokens.tokens.tokenize_splits", tokenize)
    values = {"run_dir": str(tmp_path / "run"), "model": {"source": str(tiny_model_dir("llama"))}}
    ready = prepare(parse_config({**values, "data": {"generate": "docstrings", "format": "prompt_completion"}}))
    for _ in range(2):
        tokenize_data(ready, ready.source.directory, tmp_path / "data", inputs=split_inputs(ready))
        os.utime(tmp_path / "data" / "rows" / "train.parquet")
    assert found == [[".inputs"], [".inputs", "shard"]]


def test_rows_are_made_once_for_each_seed(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def generate(directory: Path, task: SourceTask) -> None:
        made.append(task.seed)
        for name in SPLITS:
            pq.write_table(pa.table({"prompt": ["p"], "completion": ["c"]}), directory / f"{name}.parquet")

    monkeypatch.setattr("emloc_ray.demos.tasks.write_task", generate)
    left = tmp_path / "data" / "rows" / ".hub.x.tmp"  # by a download that was killed
    for seed in (0, 0, 5):
        left.mkdir(parents=True)
        data = {"generate": "docstrings", "format": "prompt_completion"}
        values = {"run_dir": str(tmp_path / "run"), "model": {"source": str(tiny_model_dir("llama"))}, "data": data}
        found = split_sources(prepare(parse_config({**values, "seed": seed})), tmp_path / "data")
        assert sorted(found) == sorted(SPLITS)
        assert not left.exists()
    assert made == [0, 5]
    others = write_jsonl(tmp_path / "others.jsonl", task_rows(3))
    healed = {"data": {**data, "healing": {"path": str(others)}}, "emulator": {"healing": {"steps": 3}}}
    found = split_sources(prepare(parse_config({**values, **healed, "seed": 5})), tmp_path / "data")
    assert [source.num_rows for source in found["healing"]] == [3]
    assert sorted(found) == sorted((*SPLITS, "healing"))
    assert made == [0, 5]


def test_rows_of_a_folder_of_this_machine_count_by_content(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``hf:FOLDER``, where ``datasets`` reads what lies here; rows of the hub stay as they were downloaded."""
    folder = tmp_path / "saved"
    folder.mkdir()

    def download(place: str, split: str, path: Path, look: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(task_rows(int((folder / "rows").read_text()))), path)

    monkeypatch.setattr("emloc_ray.stages.tokens.tokens.download", download)
    values = {"run_dir": str(tmp_path / "run"), "model": {"source": str(tiny_model_dir("llama"))}}
    values["data"] = {"train": {"path": f"hf:{folder}"}, "format": "prompt_completion"}
    ready, seen = prepare(parse_config(values)), []
    for rows in ("40", "40", "90"):
        (folder / "rows").write_text(rows)
        seen.append((split_inputs(ready)["files"], split_sources(ready, tmp_path / "data")["train"][0].num_rows))
    assert [rows for _, rows in seen] == [40, 40, 90]
    assert seen[0] == seen[1]
    assert seen[1][0] != seen[2][0]


def test_the_seed_draws_every_split(prepared: Make) -> None:
    drawn = []
    for seed in (0, 1):
        ready = prepared(num_calibration_samples=40)
        config = ready.config.model_copy(update={"seed": seed})
        options: Any = None  # no tokens are counted
        splits = rows_of_splits(config, dict(ready.files), options)
        drawn.append({name: [r for rows in chosen.chunks() for r in rows.tolist()] for name, chosen in splits.items()})
    assert drawn[0].keys() == {"train", "calibration", "selection", "eval"}
    assert all(drawn[0][name] != drawn[1][name] for name in drawn[0])
