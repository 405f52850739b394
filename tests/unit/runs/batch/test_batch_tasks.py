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

from emloc_ray.config.reading import load_config, parse_config, read_values
from emloc_ray.config.schema import RayConfig
from emloc_ray.errors import ConfigError
from emloc_ray.io.formats.yaml_text import write_yaml
from emloc_ray.io.store.places import below
from emloc_ray.runs.batch import tasks as batch_tasks
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
        {"name": "b", "data": {"train": {"path": "b.jsonl", "num_samples": None}}, "seed": 0, "adapter.r": ""},
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
    assert (first.config.correction.clamp, second.config.correction.clamp) == (3.0, 3.0)
    assert first.config.model.trust_remote_code is True
    assert (first.config.model.revision, second.config.model.revision) == ("12", "2024-01-01")
    assert second.config.data.train is not None
    assert second.config.data.train.path == "data #1.jsonl"
    assert second.config.finetune.model_extra == {}


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
        ({"seed": []}, "grid.seed is []: list should have at least 1 item after validation, not 0."),
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
        ("adapter.target_modules=[q", "Override 'adapter.target_modules=[q' has a value that is not YAML"),
        ("data.train.path.x=1", "Override 'data.train.path.x=1' reaches into data.train.path, which is a value"),
        ("run_dir.x=1", "Override 'run_dir.x=1' reaches into run_dir, which is a value"),
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
    with pytest.raises(ValidationError):
        config.run_dir = "x"
    assert BatchConfig.model_validate(config.model_dump(mode="json")) == config


def test_places_on_an_object_store_keep_their_query(write: Write) -> None:
    place = "s3://b/p/?endpoint_override=h:1&scheme=http"
    batch = read_batch(write(tasks=[{"name": "a"}], run_dir=place))
    assert batch.tasks[0].config.run_dir == "s3://b/p/tasks/a?endpoint_override=h:1&scheme=http"
    assert batch.config.cache.path == "s3://b/p/cache?endpoint_override=h:1&scheme=http"
    assert below("file:///a/b?/", "c") == "file:///a/b?/c"
    assert below("/", "c") == "/c"


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"max_concurent": 3}, "max_concurent is not a key: the nearest is max_concurrent."),
        ({"limits": {"cpu": 3}}, "limits.cpu is not a key: the nearest is cpus."),
        ({"limits": {"memory": "1,5GiB"}}, "limits.memory: '1,5GiB' is no size"),
        ({"cache": {"max_size": 0}}, "cache.max_size is 0"),
        ({"run_dir": ""}, "run_dir is ''"),
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


def test_a_batch_file_that_is_none(tmp_path: Path) -> None:
    assert error(tmp_path / "no.yaml").startswith(f"Batch {tmp_path}/no.yaml does not exist")
    (tmp_path / "a.yaml").write_text("a: [")
    assert "a.yaml is not YAML" in error(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("")
    assert "holds no keys: it needs at least run_dir, and tasks or grid." in error(tmp_path / "a.yaml")


# Bases.


def test_a_config_s_base_is_looked_for_beside_it_and_overridden(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "base.yaml").write_text(write_yaml(BASE))
    (tmp_path / "deep" / "mid.yaml").write_text("base: ../base.yaml\nadapter:\n  rank_pattern: {k_proj: 3}\ndata:\n")
    (tmp_path / "top.yaml").write_text("base: deep/mid.yaml\nseed: 1\ndata: {train: {path: top.jsonl}, eval: null}\n")
    made = load_config(tmp_path / "top.yaml", ["adapter.r=6"])
    want = json.loads(json.dumps(BASE)) | {"seed": 1, "adapter": {"r": 6, "rank_pattern": {"k_proj": 3}}}
    want["data"]["train"]["path"] = "top.jsonl"
    assert made == parse_config(want)


def test_sections_that_share_an_alias_are_overridden_apart(tmp_path: Path) -> None:
    text = write_yaml(BASE) + "merge: &two {num_workers: 2}\nevaluation: *two\n"
    (tmp_path / "a.yaml").write_text(text)
    made = load_config(tmp_path / "a.yaml", ["merge.num_workers=4"])
    assert (made.merge.num_workers, made.evaluation.num_workers) == (4, 2)


def test_a_base_that_is_missing_or_its_own_shows_the_chain(write: Write, tmp_path: Path) -> None:
    a, b, c = (tmp_path / f"{name}.yaml" for name in "abc")
    a.write_text("base: b.yaml\n")
    b.write_text("base: c.yaml\n")
    with pytest.raises(ConfigError) as caught:
        load_config(a)
    assert str(caught.value).startswith(f"Base {c} ({a} → {b} → {c}) does not exist: ")
    c.write_text("base: ./a.yaml\n")
    with pytest.raises(ConfigError) as caught:
        load_config(a)
    assert str(caught.value) == f"Config {a} is its own base ({a} → {b} → {c} → {a}): take one of these out."
    c.write_text("base: [a]\n")
    with pytest.raises(ConfigError, match=r"c\.yaml has \['a'\] as its base: give the path"):
        load_config(a)
    c.write_text("- 1\n")
    with pytest.raises(ConfigError, match=r"c\.yaml \(.* → .*\) holds no keys"):
        load_config(a)
    a.write_text("adapter: 3\n")
    b.write_text("base: a.yaml\nadapter: {r: 3}\n")
    with pytest.raises(ConfigError, match=r"b\.yaml: adapter\.r reaches into adapter, which is a value"):
        load_config(b)
    batch = write(base="no.yaml", tasks=[{"name": "a"}, {"name": "b"}])
    assert error(batch).startswith(f"Base {tmp_path}/no.yaml ({batch} → {tmp_path}/no.yaml) does not exist: ")


def test_the_base_s_own_errors_are_told_once(write: Write, tmp_path: Path) -> None:
    wrong = {**BASE, "adapter": {"r": 0}, "finetune": {"max_stps": 3}, "data": {"format": "text"}}
    (tmp_path / "base.yaml").write_text(write_yaml(wrong))
    rows = [{"name": f"t{n}", "data.train.path": f"{n}.jsonl"} for n in range(50)]
    assert errors(write(tasks=rows)) == [
        "all 50 tasks: adapter.r is 0: input should be greater than or equal to 1.",
        "all 50 tasks: finetune.max_stps is not a key: the nearest is max_steps.",
    ]
    rows[7].pop("data.train.path")  # a key that the base leaves to the tasks is missed by the task
    assert f"task t7 ({tmp_path}/batch.yaml, task 8): names no training data" in errors(write(tasks=rows))[-1]


def test_an_error_that_tasks_share_is_told_once(write: Write, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("name,adapter.rr,seed\n" + "".join(f"t{n},1,{-(n % 2)}\n" for n in range(50)))
    table = f"{tmp_path}/t.csv"
    assert errors(write(tasks="t.csv")) == [
        "all 50 tasks: adapter.rr is not a key: the nearest is r.",
        f"task t1 ({table}, row 2), task t3 ({table}, row 4), task t5 ({table}, row 6) and 22 more:"
        " seed is -1: input should be greater than or equal to 0.",
    ]


def test_an_error_at_all_points_of_a_grid_is_the_row_s(write: Write, tmp_path: Path) -> None:
    rows = [{"name": "a", "adapter.r": 0}, {"name": "b"}]
    batch = write(tasks=rows, grid={"seed": [0, 1, -1], "adapter.lora_alpha": [1, 2]})
    assert errors(batch) == [
        f"task a ({batch}, task 1): adapter.r is 0: input should be greater than or equal to 1.",
        f"task a-seed=-1-lora_alpha=1 ({batch}, task 1), task a-seed=-1-lora_alpha=2 ({batch}, task 1),"
        f" task b-seed=-1-lora_alpha=1 ({batch}, task 2) and 1 more: seed is -1: input should be greater than or equal to 0.",
    ]


def test_a_task_s_missing_base_is_told_with_the_task(write: Write, tmp_path: Path) -> None:
    batch = write(tasks=[{"name": "a"}, {"name": "b", "base": "no.yaml"}])
    assert error(batch).startswith(
        f"task b ({batch}, task 2): Base {tmp_path}/no.yaml ({batch} → {tmp_path}/no.yaml) does"
    )


def test_each_base_is_read_once(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def counted(path: Path, named_by: tuple[Path, ...]) -> dict[str, Any]:
        read.append(path)
        return read_values(path, named_by)

    monkeypatch.setattr(batch_tasks, "read_values", counted)
    read_batch(write(tasks=[{"name": f"t{n}", "seed": n} for n in range(20)]))
    assert len(read) == 1


def test_one_ray_serves_the_batch(write: Write, tmp_path: Path) -> None:
    (tmp_path / "same.yaml").write_text("base: base.yaml\n")
    (tmp_path / "none.yaml").write_text(write_yaml({**BASE, "ray": None}))
    (tmp_path / "other.yaml").write_text(write_yaml({**BASE, "ray": {"address": "auto"}}))
    rows = [{"name": name, "base": f"{name}.yaml"} for name in ("same", "none", "other")]
    assert {task.config.ray for task in read_batch(write(tasks=rows[:2])).tasks} == {RayConfig(num_cpus=2)}
    said = error(write(tasks=rows))
    assert said.startswith(
        f"task other ({tmp_path}/batch.yaml, task 3): its base has another ray section than the batch's base"
    )
    assert read_batch(write(tasks=rows), ["ray={num_cpus: 7}"]).ray == RayConfig(num_cpus=7)


# Wrong tasks.


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"name": None}, "name is missing: set it."),
        ({"name": "a/b"}, "the name 'a/b' is no safe directory name: use letters"),
        ({"name": ".."}, "the name '..' is no safe directory name"),
        ({"name": "-x"}, "the name '-x' is no safe directory name"),
        ({"name": "store=x"}, "the name 'store=x' is no safe directory name"),
        ({"priorty": 3}, "priorty is not a key: the nearest is priority."),
        ({"emulatr.compression_ratio": 1}, "emulatr.compression_ratio is not a key: the nearest is emulator."),
        ({"data.trian.path": "x"}, "data.trian is not a key: the nearest is train."),
        (
            {"emulator": {"compresion_ratio": 1}},
            "emulator.compresion_ratio is not a key: the nearest is compression_ratio.",
        ),
        ({"adapter.r": "many"}, "adapter.r is 'many': input should be a valid integer"),
        ({"finetune.weight_decay": "x"}, "finetune.weight_decay is 'x': input should be a valid number"),
        (
            {"data.train.path.x": 1},
            "data.train.path.x reaches into data.train.path, which is a value: override that instead.",
        ),
        ({"seed": 1, "adapter": {"r": 2}, "adapter.r": 3}, "adapter.r is set twice, nested and dotted: keep one."),
        ({"run_dir": "x"}, "run_dir is the batch's, each task has its own below it: take it out."),
        ({"ray": {"num_cpus": 1}}, "ray.num_cpus is the batch's, one cluster serves it: set it in its base or on"),
        ({"ray.address": "auto"}, "ray.address is the batch's, one cluster serves it"),
        ({"priority": "high"}, "priority is 'high': input should be a valid integer"),
        ({"owner": "me"}, "owner was removed: give each team a Kueue queue with a quota, see cluster/README.md."),
        ({"deadline": "2h"}, "deadline was removed: give what must end first a higher priority."),
    ],
)
def test_a_task_that_is_wrong_is_told_with_its_place(
    write: Write, tmp_path: Path, keys: dict[str, Any], complaint: str
) -> None:
    row = {"name": "mine", **keys}
    said = error(write(tasks=jsonl(tmp_path / "t.jsonl", {"name": "good"}, row)))
    place = f"{tmp_path}/t.jsonl, row 2"
    assert said.startswith(f"task {row['name']} ({place}): " if row["name"] else f"{place}: ")
    assert complaint in said


def test_a_name_that_is_too_long(write: Write) -> None:
    assert f"{MAX_NAME} at most" in error(write(tasks=[{"name": "x" * (MAX_NAME + 1)}]))
    assert read_batch(write(tasks=[{"name": "x" * MAX_NAME}])).tasks


def test_names_that_are_there_twice(write: Write, tmp_path: Path) -> None:
    table = jsonl(tmp_path / "t.jsonl", {"name": "a"}, {"name": "b"}, {"name": " a "})
    t = f"{tmp_path}/t.jsonl"
    said = f"the name 'a' is that of {t}, row 1, {t}, row 3: give each task its own."
    assert error(write(tasks=table)) == said
    assert error(write(tasks=table, grid={"seed": [0, 1]})) == said


def test_everything_that_is_wrong_is_told_at_once(write: Write, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "a.yaml").write_text("seed: -1\nrun_dir: x\nname: b\n")
    (folder / "b.yaml").write_text("priority: x\n")
    (folder / "c.yaml").write_text("seed: [")
    (folder / "d.yaml").write_text("")
    path = write(tasks="many", limits={"cpus": 0}, grid={"sead": [1], "adapter.r": [2]}, max_concurent=1)
    said = errors(path, "seed")
    for part in (
        "Override 'seed' is not",
        f"{path} and its overrides: limits.cpus is 0",
        "max_concurent is not a key",
        "grid.sead is not a key",
        "c.yaml is not YAML",
        "d.yaml holds no keys: write those that differ from the base.",
        f"the name 'b' is that of {folder / 'a.yaml'}, {folder / 'b.yaml'}",
        f"task b ({folder / 'a.yaml'}): seed is -1",
        "run_dir is the batch's",
        f"task b ({folder / 'b.yaml'}): priority is 'x'",
    ):
        assert sum(part in line for line in said) == 1, (part, said)
    assert len(said) == 10


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        (
            "absent.csv",
            None,
            "absent.csv does not exist: give a .csv, .json, .jsonl, .ndjson, .parquet, .tsv file, or a",
        ),
        ("t.txt", b"x", "t.txt is no table: give a .csv"),
        ("t.csv", b"name\n", "t.csv is empty: give a file with rows."),
        ("t.jsonl", b"", "t.jsonl is empty: give a file with rows."),
        ("t.parquet", b"no parquet", "t.parquet cannot be read as parquet"),
        ("t.jsonl", b'{"name": "a"}\n{"name"\n', "t.jsonl, row 2: not JSON"),
        ("t.jsonl", b'{"name": "a"}\n3\n', "t.jsonl, row 2: int instead of an object"),
        ("t.csv", b"name,seed\na\n", "t.csv, row 1: 1 values under a header of 2"),
        ("t.csv", b"name,seed\na,[1\n", "t.csv, row 1: seed is '[1', which is not YAML: fix it."),
    ],
)
def test_a_table_that_is_none(write: Write, tmp_path: Path, name: str, content: bytes | None, complaint: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert complaint in error(write(tasks=name))


def test_times_that_python_has_not_are_told(write: Write, tmp_path: Path) -> None:
    column = pa.array([10**15], pa.timestamp("s"))
    pq.write_table(pa.table({"name": ["a"], "model.revision": column}), tmp_path / "t.parquet")
    assert "t.parquet" in error(write(tasks="t.parquet"))


def test_a_directory_or_a_list_without_tasks(write: Write, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert f"tasks {tmp_path / 'empty'} holds no YAML file: write one a task" in error(write(tasks="empty"))
    said = error(write(tasks=[{"name": "a"}, None]))
    assert said.startswith(f"{tmp_path}/batch.yaml, task 2: None is no task: write a mapping of its keys")
