"""A model of the hub comes into a run by workers, file by file: the driver holds none of its weights."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from faulting.s3 import uri
from gguf_files import write_gguf
from safetensors.torch import load_file, save_file
from small_runs import make_values, task_rows, write_jsonl

from emloc_ray.config.reading import parse_config
from emloc_ray.data.formats import Tokens
from emloc_ray.data.token_shards import shard_name, write_index, write_shard
from emloc_ray.errors import ArtifactError, ConfigError, Stopped
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.io.store.atomic import remove_leftovers
from emloc_ray.io.store.digests import digest, note_digest, noted_digest
from emloc_ray.modeling.adapter_methods import adapter_config
from emloc_ray.modeling.hub_weights import weight_files
from emloc_ray.modeling.loading import ModelSource
from emloc_ray.planning.prepared import prepare
from emloc_ray.stages.context import Context
from emloc_ray.stages.finetune.stage import finetune_job
from emloc_ray.stages.importing import IMPORT, original_dir
from emloc_ray.stages.ray.tasks import Resources

COMMIT = "c" * 40


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download takes: the files of one commit of org/tiny."""

    root: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def do_GET(self) -> None:
        if not self.path.startswith("/api/"):  # what the client asks of the hub itself, once a day
            self.asked.append(self.path.rpartition("/")[2])
        self._answer(with_content=True)

    def _answer(self, with_content: bool) -> None:
        name = self.path.removeprefix(f"/org/tiny/resolve/{COMMIT}/")
        file = self.root / name
        content = file.read_bytes() if file.is_file() else b""
        self.send_response(200 if content else 404)
        for key, value in (("ETag", f'"{name}"'), ("X-Repo-Commit", COMMIT), ("Content-Length", str(len(content)))):
            self.send_header(key, value)
        if not content:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if with_content:
            self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub that has the tiny model; this machine has nothing of it cached."""
    Hub.root, Hub.asked = Path(shutil.copytree(tiny_model_dir("llama"), tmp_path / "hub")), []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    place = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", place)
    template = f"{place}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield Hub
    server.shutdown()
    server.server_close()
    thread.join()


def in_this_process(
    function: Callable[..., None], shared: Any, pieces: Any, resources: Any, losses: Any, progress: Any
) -> None:
    for number, (_, arguments) in enumerate(pieces, 1):
        function(shared, *arguments)
        progress(number, len(pieces))


@pytest.fixture(params=["folder", pytest.param("bucket", marks=pytest.mark.server)])
def context(
    node_cache: Path, tmp_path: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Context:
    """A run of that model, of which all but its weights is here."""
    monkeypatch.setattr("emloc_ray.stages.ray.tasks.run_tasks", in_this_process)
    snapshot = tmp_path / "snapshots" / COMMIT
    shutil.copytree(hub.root, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    rows = write_jsonl(tmp_path / "rows.jsonl", task_rows(20))
    values = make_values(tmp_path / "run", hub.root, rows)
    if request.param == "bucket":
        values["run_dir"] = uri(request.getfixturevalue("s3_port"), f"importing/{tmp_path.name}")
    ready = dataclasses.replace(prepare(parse_config(values)), source=ModelSource(snapshot, hub_id="org/tiny"))
    ready.run.create({})
    return Context(ready, original_dir(ready))


def test_workers_bring_a_model_of_the_hub_file_by_file(context: Context, hub: type[Hub]) -> None:
    source, told = context.prepared.source, list[tuple[int, int]]()
    inputs = IMPORT.inputs(context)
    assert inputs == {"hub": ["org/tiny", COMMIT]}
    assert context.prepared.original_name == "org/tiny"
    IMPORT.run(context, inputs, Resources(), lambda done, total: told.append((done, total)))
    files = weight_files(source)
    assert hub.asked == files
    assert told == [(number, len(files)) for number in range(1, len(files) + 1)]
    assert not list(source.directory.glob("*.safetensors"))
    made, expected = Checkpoint(context.model_dir), Checkpoint(hub.root)
    assert made.num_bytes == expected.num_bytes
    for entry in expected:
        assert made.entry(entry.name).read_rows().equal(entry.read_rows())
    IMPORT.run(context, inputs, Resources(), lambda done, total: None)
    assert hub.asked == files


def test_a_checkpoint_of_another_model_is_refused_before_any_pass(context: Context, hub: type[Hub]) -> None:
    entry = next(entry for entry in Checkpoint(hub.root) if "proj" in entry.name)
    rest = {name: tensor for name, tensor in load_file(entry.file).items() if name != entry.name}
    save_file(rest, entry.file, {"format": "pt"})
    with pytest.raises(
        ConfigError, match=rf"^model\.source org/tiny holds no {entry.name} \(1 linears of config\.json's"
    ):
        IMPORT.run(context, IMPORT.inputs(context), Resources(), lambda done, total: None)


@pytest.mark.parametrize("context", ["folder"], indirect=True)
def test_an_adapter_names_the_revision_of_its_base(context: Context) -> None:
    source = dataclasses.replace(context.prepared.source, revision="v1")
    context = Context(dataclasses.replace(context.prepared, source=source), source.directory)
    write_shard(context.tokens("train") / shard_name(0), [Tokens([2, 3], [True, True])] * 5)
    write_index(context.tokens("train"), [5], {"tokens": 10})
    assert adapter_config(**finetune_job(context, "x").adapter).revision == "v1"


def test_a_file_that_the_hub_does_not_give_is_told(
    context: Context, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = weight_files(context.prepared.source)[-1]
    (hub.root / name).unlink()
    with pytest.raises(
        ArtifactError, match=rf"model.source org/tiny has no {name} on the hub: name a checkpoint with all of its"
    ):
        IMPORT.run(context, IMPORT.inputs(context), Resources(), lambda done, total: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ArtifactError, match=r" of org/tiny cannot be had from the hub \(.*check the node's network"):
        IMPORT.run(context, IMPORT.inputs(context), Resources(), lambda done, total: None)


def test_a_cached_file_is_what_the_cache_names_it(
    context: Context, hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, *_ = weight_files(context.prepared.source)
    cached = tmp_path / "cache-of-the-hub" / "models--org--tiny"
    content = (hub.root / name).read_bytes()
    blob = cached / "blobs" / hashlib.sha256(content).hexdigest()
    for folder in (blob.parent, cached / "snapshots" / COMMIT):
        folder.mkdir(parents=True)
    (cached / "snapshots" / COMMIT / name).symlink_to(blob)
    blob.write_bytes(content[:-64] + bytes(64))  # as a bad disk or another user leaves it
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache-of-the-hub"))
    with pytest.raises(ArtifactError, match=rf"{name} of org/tiny was altered or cut short .*: delete {blob} and run"):
        IMPORT.run(context, IMPORT.inputs(context), Resources(), lambda done, total: None)
    assert not (context.model_dir / name).exists()
    blob.unlink()
    IMPORT.run(context, IMPORT.inputs(context), Resources(), lambda done, total: None)
    assert Checkpoint(context.model_dir).num_bytes == Checkpoint(hub.root).num_bytes
    assert name in hub.asked


@pytest.mark.parametrize("context", ["folder"], indirect=True)
def test_a_cached_file_takes_no_more_room(
    context: Context, hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, *others = weight_files(context.prepared.source)
    cached = tmp_path / "cache-of-the-hub" / "models--org--tiny" / "snapshots" / COMMIT
    cached.mkdir(parents=True)
    (cached / name).write_bytes((hub.root / name).read_bytes())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache-of-the-hub"))

    def refuse(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "a file system that shares no blocks")

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    IMPORT.run(context, IMPORT.inputs(context), Resources(), lambda done, total: None)
    assert hub.asked == others
    assert (context.model_dir / name).samefile(cached / name)
    assert not list(context.prepared.run.root.glob(".*.tmp"))


@pytest.mark.parametrize("context", ["folder"], indirect=True)
def test_an_imported_file_s_digest_is_noted(context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note_digest(tmp_path, "0")
    if noted_digest(tmp_path) is None:
        pytest.skip("this file system keeps no attributes")
    setxattr = os.setxattr

    def as_no_root(path: Path, *arguments: Any) -> None:
        if not path.stat().st_mode & stat.S_IWUSR:
            raise PermissionError(errno.EACCES, "read-only")
        setxattr(path, *arguments)

    monkeypatch.setattr(os, "setxattr", as_no_root)
    IMPORT.run(context, IMPORT.inputs(context), Resources(), lambda done, total: None)
    for file in context.model_dir.glob("*.safetensors"):
        assert noted_digest(file) == digest(file)


@pytest.mark.parametrize("context", ["folder"], indirect=True)
def test_what_a_killed_worker_left_is_known_for_its_folder_s(
    context: Context, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "TemporaryDirectory", lambda **named: contextlib.nullcontext(made(**named)))
    IMPORT.run(context, IMPORT.inputs(context), Resources(), lambda done, total: None)
    assert list(context.prepared.run.root.glob(".*.tmp"))
    remove_leftovers(context.model_dir)
    assert not list(context.prepared.run.root.glob(".*.tmp"))


def test_the_conversion_of_a_gguf_file_hears_that_the_run_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emloc_ray.stages.ray.tasks.run_tasks", lambda *given: given[-1](0, 1))
    write_gguf(tmp_path / "tiny.gguf")
    rows = write_jsonl(tmp_path / "rows.jsonl", task_rows(20))
    ready = prepare(parse_config(make_values(tmp_path / "run", tmp_path / "tiny.gguf", rows)))
    ready.run.create({})
    context = Context(ready, original_dir(ready))

    def stop(done: int, total: int) -> None:
        raise Stopped("The run was stopped.")

    with pytest.raises(Stopped):
        IMPORT.run(context, IMPORT.inputs(context), Resources(), stop)
