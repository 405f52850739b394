"""A config whose data lies on an S3 server: checked, planned and fingerprinted as one with local data, errors by key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from faulting.s3 import uri
from small_runs import make_values, task_rows, write_jsonl
from typer.testing import CliRunner

from emloc_ray.config.reading import parse_config
from emloc_ray.errors import ConfigError, DataError
from emloc_ray.io.store import objects
from emloc_ray.io.store.object_store import ObjectStore
from emloc_ray.planning.prepared import Prepared, prepare
from emloc_ray.stages.context import Context
from emloc_ray.stages.ray import session
from emloc_ray.stages.ray.session import data_files
from emloc_ray.stages.ray.tasks import Resources
from emloc_ray.stages.tokens.stage import DATA, split_inputs
from emloc_ray.ui.cli import app

Make = Callable[..., Prepared]


@pytest.fixture
def prepared(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> Make:
    """``prepared("s3://…", eval=…)``: a config of these training rows and other splits."""

    def make(train: str, **splits: str) -> Prepared:
        data: dict[str, Any] = {name: {"path": path} for name, path in {"train": train, **splits}.items()}
        return prepare(parse_config(make_values(tmp_path / "run", tiny_model_dir("llama"), Path("x"), data=data)))

    return make


def put(port: int, name: str, content: bytes) -> str:
    ObjectStore(uri(port, "stored")).write(name, content)
    return uri(port, f"stored/{name}")


def test_stored_data_is_prepared_as_local_data_is(s3_port: int, prepared: Make, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", task_rows(100))
    place = put(s3_port, "rows.jsonl", path.read_bytes())
    here, there = prepared(str(path)), prepared(place, calibration=place)
    (local,), (stored,) = here.files["train"], there.files["train"]
    assert replace(stored, path=local.path, version="", looked=local.looked) == local
    assert there.files["calibration"] == there.files["train"]
    assert there.lengths == here.lengths
    assert [len(data_files(ready)) for ready in (here, there)] == [1, 0]
    first = split_inputs(there)
    assert split_inputs(prepared(place, calibration=place)) == first
    put(s3_port, "rows.jsonl", path.read_bytes().replace(b"a", b"b"))
    second = split_inputs(prepared(place, calibration=place))
    assert {name for name in first if first[name] != second[name]} == {"files"}


def test_stored_data_that_changes_while_it_is_read_is_refused(
    s3_port: int, prepared: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", task_rows(100))
    ready = prepared(put(s3_port, "changing.jsonl", path.read_bytes()))
    context = Context(ready, ready.source.directory)
    renewed = path.read_bytes().replace(b"a", b"b")
    monkeypatch.setattr(
        "emloc_ray.stages.tokens.tokens.tokenize_data", lambda *_: put(s3_port, "changing.jsonl", renewed)
    )
    with pytest.raises(DataError, match=r"changing\.jsonl was changed after its rows were counted"):
        DATA.run(context, DATA.inputs(context), Resources(), None)  # type: ignore[arg-type]


def test_nodes_are_asked_for_both_ends_of_each_folder(prepared: Make, tmp_path: Path) -> None:
    for folder in ("a", "b/c"):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(3):
            write_jsonl(tmp_path / folder / f"{number}.jsonl", task_rows(20))
    write_jsonl(tmp_path / "b" / "only.jsonl", task_rows(20))
    asked = [file.path.relative_to(tmp_path) for file in data_files(prepared(f"{tmp_path}/[ab]/**/*.jsonl"))]
    assert sorted(map(str, asked)) == ["a/0.jsonl", "a/2.jsonl", "b/c/0.jsonl", "b/c/2.jsonl", "b/only.jsonl"]


@pytest.mark.parametrize(("run_at", "data_at"), [("store", "store"), ("store", "disk"), ("disk", "store")])
def test_nodes_are_asked_for_what_lies_on_disks_alone(
    run_at: str,
    data_at: str,
    s3_port: int,
    tmp_path: Path,
    node_cache: Path,
    tiny_model_dir: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", task_rows(20))
    rows = put(s3_port, "rows.jsonl", path.read_bytes()) if data_at == "store" else str(path)
    values = make_values(tmp_path / "run", tiny_model_dir("llama"), Path("x"), data={"train": {"path": rows}})
    if run_at == "store":
        values["run_dir"] = uri(s3_port, "stored/run")
    ready = prepare(parse_config(values))
    ready.run.root.mkdir(parents=True, exist_ok=True)
    asked: list[Any] = []
    monkeypatch.setattr(session.ray, "nodes", lambda: [{"Alive": True}] * 100)
    monkeypatch.setattr(
        session,
        "answers",
        lambda function, nodes, files: asked.append((len(nodes), {file.key for file in files})) or {},
    )
    session.check_visible(ready)
    keys = {"data.train.path"} if data_at == "disk" else {"run_dir", "model.source"} if run_at == "disk" else set()
    assert asked == ([(100, keys)] if keys else [])


def test_bad_rows_and_missing_objects_are_told_at_once_by_key(s3_port: int, prepared: Make, tmp_path: Path) -> None:
    bad = put(s3_port, "bad.jsonl", b'{"prompt": "p", "completion": "c"}\n' * 3 + b'{"prompt": "p"}\n')
    with pytest.raises(ConfigError) as error:
        prepared(bad, eval=uri(s3_port, "stored/none/"), selection="s3://key:secret@runs/a.jsonl")
    lines = str(error.value).splitlines()
    assert [line.split(":")[0].split(" holds")[0] for line in lines] == ["s3", "data.selection.path", "data.eval.path"]
    assert lines[0].startswith("s3://runs/stored/bad.jsonl, row 4")
    assert "holds credentials" in lines[1]
    assert "names no file" in lines[2]


def test_a_store_out_of_reach_is_told_by_validate(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "ATTEMPTS", 1)
    config = tmp_path / "my.yaml"
    config.write_text(f"run_dir: {tmp_path / 'run'}\nmodel: {{source: {tiny_model_dir('llama')}}}\n")
    result = CliRunner().invoke(app, ["validate", str(config), f"data.train.path={uri(1, 'a.jsonl')}"])
    assert result.exit_code == 2, result.output
    said = " ".join(result.output.split())
    assert "data.train.path: s3://runs" in said
    assert "does not read a.jsonl" in said
    assert "Traceback" not in said
