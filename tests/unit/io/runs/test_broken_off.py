"""Any prefix of a run's writes leaves a state from which the same run ends right: on a disk, and on an object store."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from s3_server import uri

from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.io.runs.fingerprint import fingerprint
from emloc_ray.io.runs.resume import discard_unless
from emloc_ray.io.store.atomic import atomic_directory, atomic_file, write_json
from emloc_ray.io.store.node_cache import discard, ensure, exists, sizes
from emloc_ray.io.store.object_store import ObjectStore

_places = itertools.count()


class Killed(BaseException):
    """What no code of ours catches, as a kill is not caught."""


@contextlib.contextmanager
def killed_at(write: int) -> Iterator[None]:
    """Ends the process, as far as it can tell, just before its ``write``-th change of what outlives it."""
    left = itertools.count(write, -1)

    def counting(function):  # type: ignore[no-untyped-def]
        def counted(*args, **kwargs):  # type: ignore[no-untyped-def]
            if next(left) <= 0:
                raise Killed
            return function(*args, **kwargs)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", counting(os.replace))
        patch.setattr(shutil, "rmtree", counting(shutil.rmtree))
        for name in ("_upload", "write", "_delete"):
            patch.setattr(ObjectStore, name, counting(getattr(ObjectStore, name)))
        yield


def run(place: str, seed: int) -> None:
    """Two stages as the pipeline makes them: one of shards that are gone on from, one that is written whole."""
    directory = RunDirectory(place)
    directory.create({"seed": seed})
    shards, whole = directory.path("shards"), directory.path("whole")
    inputs = fingerprint(["shards", seed])
    if not directory.is_done("shards", inputs):
        if directory.stage("shards") is not None:
            directory.forget("shards")
            discard(shards)
        discard_unless(shards, inputs)
        for number in range(3):
            if not exists(shards / f"{number}.bin"):
                with atomic_file(shards / f"{number}.bin") as file:
                    file.write(f"{seed}/{number}".encode())
        directory.commit("shards", inputs, [shards], {})
    inputs = fingerprint(["whole", seed])
    if not directory.is_done("whole", inputs):
        if directory.stage("whole") is not None:
            directory.forget("whole")
        ensure(shards)
        content = b"+".join((shards / f"{number}.bin").read_bytes() for number in range(3))
        with atomic_directory(whole) as temporary:
            (temporary / "sum.bin").write_bytes(content)
            write_json(temporary / "about.json", seed)
        directory.commit("whole", inputs, [whole], {})


def check(place: str, seed: int) -> None:
    directory = RunDirectory(place)
    assert list(directory.manifest()["stages"]) == ["shards", "whole"]
    for name in ("shards", "whole"):
        assert directory.is_done(name, fingerprint([name, seed]))
        assert directory.damaged(name) == []
        assert not [file for file in sizes(directory.path(name)) if ".tmp" in file.name]
    ensure(directory.path("whole"))
    assert directory.path("whole", "sum.bin").read_bytes() == f"{seed}/0+{seed}/1+{seed}/2".encode()


def break_off(place: str, kills: list[int], changed: bool) -> None:
    for write in kills:
        with contextlib.suppress(Killed), killed_at(write):
            run(place, 1)
    if changed:  # the config is not what it was
        run(place, 2)
        check(place, 2)
    run(place, 1)
    check(place, 1)


@settings(max_examples=15)
@given(kills=st.lists(st.integers(0, 30), max_size=4), changed=st.booleans())
def test_on_a_disk(kills: list[int], changed: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        break_off(f"{folder}/run", kills, changed)


@settings(max_examples=15)
@given(kills=st.lists(st.integers(0, 40), max_size=3), changed=st.booleans())
def test_on_an_object_store(s3_port: int, kills: list[int], changed: bool) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMLOC_RAY_CACHE", folder)
        place = uri(s3_port, f"prefix/{next(_places)}")
        break_off(place, kills, changed)
        shutil.rmtree(folder)  # another node's
        Path(folder).mkdir()
        check(place, 1)


def test_every_single_write_on_a_disk(tmp_path: Path) -> None:
    for write in itertools.count():
        place = str(tmp_path / str(write))
        try:
            with killed_at(write):
                run(place, 1)
        except Killed:
            run(place, 1)
            check(place, 1)
            continue
        assert write > 8
        return
