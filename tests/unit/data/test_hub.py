"""A process that loads from the hub, and does not come to its end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
from PIL import Image

from emloc_ray.data import hub
from emloc_ray.errors import DataError


class Stop(Exception):
    pass


@pytest.fixture
def loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A command in the place of Python's: it writes its number, and does what ``WORK`` says."""
    command = tmp_path / "load"
    command.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/number\n. {tmp_path}/work\n")
    command.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(command))
    monkeypatch.setattr(hub, "LOOK_S", 0.05)
    return tmp_path


def is_gone(folder: Path) -> bool:
    return not Path("/proc", (folder / "number").read_text().strip()).exists()


def test_silence_has_an_end_with_a_sentence(loader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (loader / "work").write_text("exec sleep 600\n")
    monkeypatch.setattr(hub, "SILENT_S", 0.5)
    with pytest.raises(
        DataError, match=r"^data\.train\.path hf:some/rows has given nothing for 0\.5 s: check the netw"
    ):
        hub.download("hf:some/rows", "train", loader / "out" / "train.parquet")
    assert is_gone(loader)
    assert list((loader / "out").iterdir()) == []


@pytest.mark.slow
def test_what_goes_on_writing_may_take_longer(loader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (loader / "work").write_text(
        "for i in 1 2 3 4 5 6 7 8; do echo some; sleep 0.25; done; echo 'all of it' ; exit 3\n"
    )
    monkeypatch.setattr(hub, "SILENT_S", 1.5)
    with pytest.raises(DataError, match=r"^all of it$"):
        hub.download("hf:some/rows", "train", loader / "out" / "train.parquet")


def test_who_waits_can_stop(loader: Path) -> None:
    (loader / "work").write_text("exec sleep 600\n")

    def look() -> None:
        if (loader / "number").exists():
            raise Stop

    with pytest.raises(Stop):
        hub.download("hf:some/rows", "train", loader / "out" / "train.parquet", look=look)
    assert is_gone(loader)


def test_no_more_than_two_load_at_once(loader: Path) -> None:
    """Each holds what ``datasets`` imports, beside hundreds of tasks' others."""
    (loader / "work").write_text(
        f"mkdir -p {loader}/at && touch {loader}/at/$$ && ls {loader}/at | wc -l >> {loader}/counts && sleep 0.5\n"
        f"rm {loader}/at/$$; echo ended; exit 3\n"
    )

    def load(number: int) -> None:
        with pytest.raises(DataError, match=r"^ended$"):
            hub.download("hf:some/rows", "train", loader / str(number) / "train.parquet")

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(load, range(5)))
    counts = [int(count) for count in (loader / "counts").read_text().split()]
    assert len(counts) == 5
    assert max(counts) <= 2


def test_no_module_of_the_working_directory_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("datasets.py", "random.py"):
        (tmp_path / name).write_text("raise SystemExit('the working directory was imported from')")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    monkeypatch.chdir(tmp_path)
    hub.download("hf:rows", "train", tmp_path / "out" / "train.parquet")
    assert pyarrow.parquet.read_table(tmp_path / "out" / "train.parquet").to_pylist() == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize("first", [1, None])
def test_an_image_folder_s_images_come_with_the_rows(tmp_path: Path, first: int | None) -> None:
    folder, path = tmp_path / "rows" / "train", tmp_path / "out" / "train.parquet"
    folder.mkdir(parents=True)
    Image.new("RGB", (4, 4), "red").save(folder / "a.png")
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "b.png")
    (folder / "c.png").symlink_to(tmp_path / "b.png")  # outside: rows may not read it
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "red"}\n{"file_name": "c.png", "text": "blue"}\n'
    )
    hub.download(f"hf:{tmp_path / 'rows'}", "train", path, first=first)
    rows = pyarrow.parquet.read_table(path).to_pylist()
    assert [row["text"] for row in rows] == ["red", "blue"][:first]
    assert [row["image"]["bytes"] for row in rows] == [(folder / "a.png").read_bytes(), None][:first]


@pytest.mark.parametrize(
    ("split", "place", "first", "expected"),
    [
        (None, "", None, 10),
        (None, ":train[:20%]", None, 2),
        (None, ":train[:20%]", 4, 4),
        ("test", ":test[2:4]+test[8:]", None, 4),
    ],
)
def test_what_a_data_set_saved_is_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    split: str | None,
    place: str,
    first: int | None,
    expected: int,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    datasets.Dataset.from_dict({"text": [*"abcdefghij"]}, split=split).save_to_disk(tmp_path / "rows")
    path = tmp_path / "out.parquet"
    hub.download(f"hf:~/rows{place}", "train", path, first=first)
    assert pyarrow.parquet.read_metadata(path).num_rows == expected


def test_a_split_that_was_not_saved_is_named(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": [*"abc"]}).save_to_disk(tmp_path / "rows")
    with pytest.raises(DataError, match=r'cannot be loaded .Unknown split "test". Should be one of \[\W*train'):
        hub.download(f"hf:{tmp_path / 'rows'}", "eval", tmp_path / "out.parquet")


def test_a_process_that_loads_ends_with_the_one_that_began_it(tmp_path: Path) -> None:
    (tmp_path / "datasets.py").write_text(
        f"import os, pathlib, time\npathlib.Path({str(tmp_path)!r}, 'number').write_text(str(os.getpid()))\ntime.sleep(600)"
    )
    path = tmp_path / "out" / "train.parquet"
    call = f"hub.download('hf:some/rows', 'train', Path({str(path)!r}))"
    begin = f"from pathlib import Path; from emloc_ray.data import hub; {call}"
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    with subprocess.Popen([sys.executable, "-c", begin], env={**os.environ, "PYTHONPATH": paths}) as driver:
        while not (tmp_path / "number").exists() or not (tmp_path / "number").read_text():
            time.sleep(0.05)
        driver.kill()
    until = time.monotonic() + 30
    while not is_gone(tmp_path) and time.monotonic() < until:
        time.sleep(0.05)
    assert is_gone(tmp_path)
