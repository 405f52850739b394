"""Files that another node writes into a folder of NFS, whose client takes a name that was absent for absent until its folder is
opened (nfs(5), lookupcache=all), or for up to a minute."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emloc_ray.io.store.node_cache import existing, exists, open_newest


@pytest.fixture
def write_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Writes a file as another node does, of which this node's client hears nothing. What looks up a name here, or opens a
    folder, goes through that client."""
    absent: set[str] = set()
    calls: dict[str, Callable[..., Any]] = {"stat": os.stat, "io.open": io.open, "walk": os.walk, "os.open": os.open}

    def look_up(call: str) -> Callable[..., Any]:
        def asked(path: Any, *how: Any, **options: Any) -> Any:
            name = os.fspath(path) if isinstance(path, os.PathLike) else str(path)
            if name in absent:
                raise FileNotFoundError(2, "taken for absent", name)
            try:
                return calls[call](path, *how, **options)
            except FileNotFoundError:
                if name.startswith(str(tmp_path)):
                    absent.add(name)
                raise

        return asked

    def open_folder(call: str) -> Callable[..., Any]:
        def opened(folder: Any, *how: Any, **options: Any) -> Any:
            absent.difference_update({name for name in absent if Path(name).parent == Path(folder)})
            return calls[call](folder, *how, **options)

        return opened

    def write(path: Path) -> None:
        with monkeypatch.context() as server:
            server.setattr(os, "stat", calls["stat"])
            server.setattr(io, "open", calls["io.open"])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"content")

    monkeypatch.setattr(os, "stat", look_up("stat"))
    monkeypatch.setattr(io, "open", look_up("io.open"))
    monkeypatch.setattr(os, "walk", open_folder("walk"))
    monkeypatch.setattr(os, "open", open_folder("os.open"))
    return write


def test_files_that_tasks_wrote_elsewhere_are_counted(tmp_path: Path, write_elsewhere: Callable[[Path], None]) -> None:
    files = [tmp_path / f"model-{number}.safetensors" for number in (1, 2)]
    assert existing(files) == set()
    write_elsewhere(files[0])
    assert existing(files) == {files[0]}
    write_elsewhere(files[1])
    assert existing(files) == {*files}


@pytest.mark.parametrize("folder", ["", "slots", "slots/wave"])
def test_a_file_that_was_absent_is_looked_for_at_its_server(
    tmp_path: Path, write_elsewhere: Callable[[Path], None], folder: str
) -> None:
    file = tmp_path / folder / ".stop"
    assert not exists(file)
    write_elsewhere(file)
    assert exists(file)


def test_a_file_that_was_absent_is_opened(tmp_path: Path, write_elsewhere: Callable[[Path], None]) -> None:
    file = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError), open_newest(file):
        pass
    write_elsewhere(file)
    with open_newest(file) as (stream, size, version):
        assert (stream.read(), size, version) == (b"content", 7, None)
