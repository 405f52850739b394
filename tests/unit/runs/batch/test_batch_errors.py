"""Batch files that are wrong: every error at once, each with its place, once."""

# ruff: noqa: F811

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_batch_tasks import BASE, Write, error, errors, jsonl, write  # noqa: F401

from emloc_ray.config.reading import load_config, parse_config, read_values
from emloc_ray.config.schema import RayConfig
from emloc_ray.errors import ConfigError
from emloc_ray.io.formats.yaml_text import write_yaml
from emloc_ray.runs.batch import tasks as batch_tasks
from emloc_ray.runs.batch.grid import MAX_NAME
from emloc_ray.runs.batch.tasks import read_batch


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
    assert f"task t7 ({tmp_path}/batch.yaml, task 8): data: names no training data" in errors(write(tasks=rows))[-1]


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
