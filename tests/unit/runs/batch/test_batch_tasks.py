"""Batch files as tasks: what overrides what, every error at once, names that are safe and unique."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from emloc_ray.config.reading import parse_config
from emloc_ray.config.schema import RayConfig
from emloc_ray.errors import ConfigError
from emloc_ray.io.formats.yaml_text import write_yaml
from emloc_ray.io.store.places import below
from emloc_ray.runs.batch.config import BatchConfig
from emloc_ray.runs.batch.grid import MAX_NAME, SAFE_NAME, joined_name, points
from emloc_ray.runs.batch.tasks import Batch, read_batch

BASE: dict[str, Any] = {
    "run_dir": "runs/one",
    "seed": 3,
    "model": {"source": "some/dir"},
    "data": {"train": {"path": "base.jsonl", "num_samples": 9}, "format": "prompt_completion"},
    "adapter": {"r": 4, "rank_pattern": {"q_proj": 2}},
    "ray": {"num_cpus": 2},
}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a batch file of keys beside its base; gives its path."""
    (tmp_path / "base.yaml").write_text(write_yaml(BASE))

    def written(**keys: Any) -> Path:
        file = tmp_path / "batch.yaml"
        values = {"base": "base.yaml", "run_dir": "runs/many", **keys}
        file.write_text(write_yaml({key: value for key, value in values.items() if value is not None}))
        return file

    return written


def jsonl(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def errors(path: Path, *overrides: str) -> list[str]:
    """The error's lines; every one is a sentence."""
    with pytest.raises(ConfigError) as caught:
        read_batch(path, overrides)
    lines = str(caught.value).splitlines()
    assert all(line.endswith(".") for line in lines), lines
    return lines


def error(path: Path, *overrides: str) -> str:
    """The error, where there is one line of it."""
    lines = errors(path, *overrides)
    assert len(lines) == 1, lines
    return lines[0]


def names(batch: Batch) -> list[str]:
    return [task.name for task in batch.tasks]


# Where tasks come from.


def test_a_table_of_jsonl_sets_nested_and_dotted_keys(write: Write, tmp_path: Path) -> None:
    rows = [
        {"name": "a", "data.train.path": "a.jsonl", "priority": 2},
        {"name": "b", "data": {"train": {"path": "b.jsonl", "num_samples": ""}}, "seed": 0, "adapter.r": ""},
        {"name": "c", "adapter": {"rank_pattern": {"layers.0.k_proj": 1}}, "adapter.r": 8, "priority": None},
    ]
    batch = read_batch(write(tasks=jsonl(tmp_path / "t.jsonl", *rows)))
    a, b, c = batch.tasks
    assert (a.name, a.priority) == ("a", 2)
    assert a.where == f"{tmp_path}/t.jsonl, row 1"
    assert a.config == parse_config(
        {
            **BASE,
            "run_dir": "runs/many/tasks/a",
            "data": {**BASE["data"], "train": {"path": "a.jsonl", "num_samples": 9}},
        }
    )
    assert (b.priority, b.config.adapter.r) == (0, 4)
    assert b.config.data.train is not None
    assert (b.config.data.train.path, b.config.data.train.num_samples, b.config.seed) == ("b.jsonl", 9, 0)
    assert c.config.adapter.rank_pattern == {
        "layers.0.k_proj": 1
    }  # a table of patterns is a value, its dots are its own
    assert (c.config.adapter.r, c.config.seed) == (8, 3)
    assert batch.ray == RayConfig(num_cpus=2) == a.config.ray


def test_a_table_of_csv_is_text_that_reads_like_yaml(write: Write, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        "name,data.train.path,finetune.learning_rate,finetune.weight_decay,adapter.target_modules,correction.clamp,"
        "model.trust_remote_code,model.revision\n"
        "007,*.jsonl,1e-4,0.1,\"[q_proj, v_proj]\",NaN,true,'12'\n"
        "b,data #1.jsonl,,,,null,,2024-01-01\n"
    )
    first, second = read_batch(write(tasks="t.csv")).tasks
    assert first.name == "007"
    assert first.config.data.train is not None
    assert first.config.data.train.path == "*.jsonl"
    assert first.config.finetune.learning_rate == 1e-4
    assert first.config.finetune.model_extra == {"weight_decay": 0.1}
    assert first.config.adapter.target_modules == ["q_proj", "v_proj"]
    assert (first.config.correction.clamp, second.config.correction.clamp) == (3.0, None)
    assert first.config.model.trust_remote_code is True
    assert (first.config.model.revision, second.config.model.revision) == ("12", "2024-01-01")
    assert second.config.data.train is not None
    assert second.config.data.train.path == "data #1.jsonl"
    assert second.config.finetune.model_extra == {}


NULLS = {
    "name": '"a"',
    "emulator.compression_ratio": "null",
    "emulator.budget": '"2.4 bits"',
    "emulator.healing": "null",
}


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ("t.jsonl", f"{{{', '.join(f'{json.dumps(key)}: {value}' for key, value in NULLS.items())}}}\n"),
        ("t.csv", f"{','.join(NULLS)}\n{','.join(NULLS.values())}\n"),
    ],
)
def test_a_null_that_was_written_takes_out_what_the_base_has(
    write: Write, tmp_path: Path, table: str, text: str
) -> None:
    emulator = {"compression_ratio": 0.5, "healing": {"steps": 20}}
    (tmp_path / "base.yaml").write_text(write_yaml({**BASE, "emulator": emulator}))
    (tmp_path / table).write_text(text)
    [task] = read_batch(write(tasks=table)).tasks
    assert (task.config.emulator.budget, task.config.emulator.healing) == ("2.4 bits", None)


def test_a_table_of_parquet_has_struct_columns_and_nan(write: Write, tmp_path: Path) -> None:
    table = {
        "name": [1, 2],
        "data": [{"train": {"path": "x", "num_samples": None}}, {"train": None}],
        "seed": [1.0, math.nan],
        "adapter.r": pa.array([None, 16]),
    }
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    first, second = read_batch(write(tasks="t.parquet")).tasks
    assert (first.name, second.name) == ("1", "2")
    assert (first.config.seed, second.config.seed) == (1, 3)
    assert (first.config.adapter.r, second.config.adapter.r) == (4, 16)
    assert first.config.data.train is not None
    assert second.config.data.train is not None
    assert (first.config.data.train.path, second.config.data.train.path) == ("x", "base.jsonl")


def test_a_directory_of_files_has_their_stems_as_names_and_bases_beside_them(write: Write, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "a.yaml").write_text("adapter: {r: 5}\n")
    (folder / "b.yml").write_text("name: other\nbase: deeper/base.yaml\ncorrection.clamp: null\n")
    (folder / "notes.txt").write_text("no task")
    (folder / "deeper").mkdir()
    (folder / "deeper" / "base.yaml").write_text("base: ../../base.yaml\nseed: 11\n")
    first, second = read_batch(write(tasks="many")).tasks
    assert (first.name, first.config.adapter.r, first.config.seed) == ("a", 5, 3)
    assert (second.name, second.config.seed, second.config.correction.clamp) == ("other", 11, None)
    assert second.where == str(folder / "b.yml")


def test_tasks_right_in_the_batch_file(write: Write, tmp_path: Path) -> None:
    batch = read_batch(write(tasks=[{"name": "a"}, {"name": "b", "data.eval": {"path": "e"}, "seed": 1}]))
    assert names(batch) == ["a", "b"]
    assert [task.where for task in batch.tasks] == [f"{tmp_path}/batch.yaml, task {n}" for n in (1, 2)]
    assert batch.tasks[1].config.data.eval is not None
    assert [task.config.run_dir for task in batch.tasks] == ["runs/many/tasks/a", "runs/many/tasks/b"]


def test_tasks_need_no_base(write: Write) -> None:
    whole = {key: value for key, value in BASE.items() if key not in ("run_dir", "ray")}
    assert read_batch(write(base=None, tasks=[{"name": "a", **whole}])).tasks[0].config.seed == 3


# The grid.


def test_a_grid_multiplies_the_tasks_and_wins_over_their_keys(write: Write) -> None:
    grid = {"emulator.compression_ratio": [0.25, 0.5], "seed": [0, 1]}
    batch = read_batch(write(tasks=[{"name": "billing", "seed": 9}, {"name": "x"}], grid=grid))
    assert names(batch)[:4] == [
        f"billing-compression_ratio={ratio}-seed={seed}" for ratio in (0.25, 0.5) for seed in (0, 1)
    ]
    assert len(batch.tasks) == 8
    assert [(t.config.emulator.compression_ratio, t.config.seed) for t in batch.tasks[:2]] == [(0.25, 0), (0.25, 1)]
    assert batch.tasks[0].config.run_dir == "runs/many/tasks/billing-compression_ratio=0.25-seed=0"


def test_a_grid_alone(write: Write, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("base: base.yaml\nseed: 5\n")
    batch = read_batch(
        write(grid={"adapter": [{"r": 1}, {"r": 2}], "base": ["base.yaml", "other.yaml"], "priority": [7]})
    )
    assert [(t.config.adapter.r, t.config.seed, t.priority) for t in batch.tasks] == [
        (1, 3, 7),
        (1, 5, 7),
        (2, 3, 7),
        (2, 5, 7),
    ]
    assert batch.tasks[0].config.adapter.rank_pattern == {"q_proj": 2}
    assert all(SAFE_NAME.fullmatch(name) for name in names(batch))
    assert names(read_batch(write(grid={"seed": [4, 5]}))) == ["seed=4", "seed=5"]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=60) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=4,
)
grids = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    | st.sampled_from(["seed", "a.store", "b.seed", "=-"]),
    st.lists(values, min_size=1, max_size=4, unique_by=repr),
    max_size=3,
)
task_names = st.from_regex(SAFE_NAME, fullmatch=True) | st.sampled_from(
    ["a", "a-seed=0", "a-seed=0-seed=1", "x" * MAX_NAME]
)


@pytest.mark.slow
@given(grids, st.sets(task_names, max_size=3))
def test_names_are_safe_and_unique(grid: dict[str, list[Any]], tasks: set[str]) -> None:
    found = points(grid)
    assert len(found) == math.prod(map(len, grid.values()))
    made = [joined_name(task, point.name) for task in tasks for point in found]
    alone = [joined_name("", point.name) for point in found if grid]
    assert len(set(made)) == len(made)
    assert len(set(alone)) == len(alone)
    assert all(SAFE_NAME.fullmatch(name) for name in made + alone), made + alone


@given(st.lists(values, min_size=2, max_size=5, unique_by=str))
def test_a_point_keeps_its_name_when_others_join(many: list[Any]) -> None:
    assert points({"k": many})[0].name == points({"k": many[:1]})[0].name
    assert {p.name for p in points({"k": many})} == {p.name for p in points({"k": many[::-1]})}


def test_values_that_read_alike_have_names_of_their_own() -> None:
    one, text, path = (p.name for p in points({"a.b": [1, "1", "data/x.jsonl"]}))
    assert one == "b=1"
    assert text.startswith("b=1.")
    assert path.startswith("b=data_x.jsonl.")


@pytest.mark.parametrize(
    ("grid", "complaint"),
    [
        (
            {"emulator.compresion_ratio": [0.5]},
            "grid.emulator.compresion_ratio is not a key: the nearest is compression_ratio.",
        ),
        ({"finetune.max_stps": [5]}, "grid.finetune.max_stps is not a key: the nearest is max_steps."),
        ({"sead": [5]}, "grid.sead is not a key: the nearest is seed."),
        ({"seed": 3}, "grid.seed is 3: input should be a valid list."),
        ({"seed": []}, "grid.seed is empty: give at least 1 item."),
        ({"adapter": {"r": [1]}}, "grid.adapter is {'r': [1]}: input should be a valid list."),
        ({"seed": [1, 2, 1]}, "grid.seed holds 1 twice: each once makes the same tasks."),
        ({"name": ["a"]}, "grid.name: the grid makes names itself: take it out."),
        (
            {"owner": ["a", "b"]},
            "grid.owner was removed: give each team a Kueue queue with a quota, see cluster/README.md.",
        ),
        ({"run_dir": ["a"]}, "grid.run_dir is the batch's, each task has its own below it: take it out."),
        (
            {"ray.num_cpus": [1]},
            "grid.ray.num_cpus is the batch's, one cluster serves it: set it in its base or on the command line.",
        ),
    ],
)
def test_a_grid_that_is_none(write: Write, grid: dict[str, Any], complaint: str) -> None:
    path = write(tasks=[{"name": "a"}, {"name": "b"}], grid=grid)
    assert error(path) == f"{path}: {complaint}"
    assert f"{path}: {complaint}" in errors(write(grid=grid))


def test_a_grid_of_too_many_tasks_says_how_many(write: Write) -> None:
    many = list(range(101))
    path = write(tasks=[{"name": "a"}], grid={"seed": many, "adapter.r": many})
    assert error(path) == f"{path}: its grid makes 10,201 tasks, over 10,000: take values out."


# The command line.


def test_the_command_line_wins_over_everything(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl(tmp_path / "t.jsonl", {"name": "a", "adapter.r": 8, "data.train": {"num_samples": 5}})
    overrides = [
        "run_dir=elsewhere",
        "tasks=t.jsonl",
        "grid.emulator.compression_ratio=[0.75]",
        "max_concurrent=2",
        "limits.memory=1KiB",
        "cache.max_size=2KiB",
        "adapter.r=16",
        "emulator.compression_ratio=1.0",
        "ray.num_cpus=5",
    ]
    monkeypatch.chdir(tmp_path)  # where the command line's paths go from
    batch = read_batch(write(tasks="no-table.csv"), overrides)
    (task,) = batch.tasks
    assert (task.name, task.config.run_dir) == ("a-compression_ratio=0.75", "elsewhere/tasks/a-compression_ratio=0.75")
    assert (task.config.adapter.r, task.config.emulator.compression_ratio) == (16, 1.0)
    assert task.config.data.train is not None
    assert (task.config.data.train.path, task.config.data.train.num_samples) == ("base.jsonl", 5)
    assert batch.ray == task.config.ray == RayConfig(num_cpus=5)
    assert batch.config.max_concurrent == 2
    assert batch.config.limits.memory == 1024
    assert (batch.config.cache.path, batch.config.cache.max_size) == ("elsewhere/cache", 2048)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("seed", "Override 'seed' is not key.path=value: write it like finetune.max_steps=20."),
        ("adapter.target_modules=[q", "Override adapter.target_modules has a value that is not YAML"),
        ("data.train.path.x=1", "Override data.train.path.x reaches into data.train.path, which is a value"),
        ("run_dir.x=1", "Override run_dir.x reaches into run_dir, which is a value"),
        ("adapter.rr=1", "all 8 tasks: adapter.rr is not a key: the nearest is r."),
        ("max_concurrent=0", "batch.yaml and its overrides: max_concurrent is 0: input should be greater"),
        ("max_concurrent=129", "max_concurrent is 129: input should be less than or equal to 128."),
        ("owner=me", "Override 'owner=me': owner was removed: give each team a Kueue queue"),
    ],
)
def test_an_override_that_is_wrong_is_told_once(write: Write, override: str, complaint: str) -> None:
    assert complaint in error(write(tasks=[{"name": name} for name in "abcdefgh"]), override)


# The batch's own keys.


def test_the_batch_s_own_keys(write: Write) -> None:
    limits = {"cpus": 64, "gpus": 8, "memory": "512GiB"}
    config = read_batch(write(tasks=[{"name": "a"}], limits=limits, cache={"path": "c"}, max_concurrent=8)).config
    assert (config.limits.cpus, config.limits.gpus, config.limits.memory) == (64, 8, 512 * 2**30)
    assert (config.cache.path, config.cache.max_size, config.max_concurrent) == ("c", None, 8)
    assert not config.has_own_cache
    with pytest.raises(ValidationError):
        config.run_dir = "x"
    assert BatchConfig.model_validate(config.model_dump(mode="json")) == config


def test_places_on_an_object_store_keep_their_query(write: Write) -> None:
    place = "s3://b/p/?endpoint_override=h:1&scheme=http"
    batch = read_batch(write(tasks=[{"name": "a"}], run_dir=place))
    assert batch.tasks[0].config.run_dir == "s3://b/p/tasks/a?endpoint_override=h:1&scheme=http"
    assert batch.config.cache.path == "s3://b/p/cache?endpoint_override=h:1&scheme=http"
    assert batch.config.has_own_cache
    assert below("file:///a/b?/", "c") == "file:///a/b?/c"
    assert below("/", "c") == "/c"


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"max_concurent": 3}, "max_concurent is not a key: the nearest is max_concurrent."),
        ({"limits": {"cpu": 3}}, "limits.cpu is not a key: the nearest is cpus."),
        ({"limits": {"memory": "1,5GiB"}}, "limits.memory: '1,5GiB' is no size"),
        ({"cache": {"max_size": 0}}, "cache.max_size is 0"),
        ({"run_dir": ""}, "run_dir is empty"),
        ({"run_dir": None}, "run_dir is missing: set it."),
        ({"tasks": None}, "it names no tasks: set tasks, or grid, or both."),
        ({"tasks": []}, "tasks is empty: give at least one, or leave it out for a grid alone."),
        ({"tasks": " "}, "tasks is empty"),
        ({"tasks": 3}, "tasks is 3: give the path of a table or a directory, or a list of mappings."),
        ({"base": [1]}, "base is [1]: input should be a valid string."),
    ],
)
def test_a_batch_s_own_key_that_is_wrong(write: Write, keys: dict[str, Any], complaint: str) -> None:
    path = write(**{"tasks": [{"name": "a"}], **keys})
    assert error(path).startswith(f"{path}: {complaint}")
