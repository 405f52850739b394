"""The room for a node's copies: how often all of them are looked at, and what killed processes left."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from emloc_ray.io.store.node_copies import make_room, note_of, write_note

LIMIT = 100_000
FILE = 100


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's place on a node with 100 copies from an hour ago, whose disk is empty."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(total=10 * LIMIT, used=0, free=10 * LIMIT))
    root = tmp_path / "cache" / "store=s3%3A%2F%2Fbucket%2Frun"
    for number in range(100):
        add(root, number, age_s=3600.0)
    return root


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of notes that were gone through, all of them each time."""
    looked: list[Path] = []
    walk = os.walk

    def counted(top: Path, *options: Any, **more: Any) -> Iterator[tuple[str, list[str], list[str]]]:
        if Path(top).name == ".versions":
            looked.append(top)
        return walk(top, *options, **more)

    monkeypatch.setattr(os, "walk", counted)
    return looked


def add(root: Path, number: int, age_s: float = 0.0) -> None:
    file = root / "a" / str(number)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"x" * FILE)
    write_note(note_of(root, f"a/{number}"), "0" * 64, file.stat())
    old(note_of(root, f"a/{number}"), age_s)


def old(path: Path, age_s: float) -> None:
    os.utime(path, (time.time() - age_s, time.time() - age_s))


def held(root: Path) -> int:
    return sum(file.stat().st_size for file in (root / "a").iterdir())


def test_where_there_is_room_few_files_look_at_all(
    root: Path, looks: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMLOC_RAY_CACHE_SIZE", f"{LIMIT}B")
    for number in range(100, 200):
        add(root, number)
        make_room(root, 0, written=FILE)
    assert len(looks) < 20
    assert held(root) == 200 * FILE


@pytest.mark.parametrize("bound", ["variable", "disk"])
def test_where_copies_go_room_is_made_for_the_next_ones_too(
    root: Path, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    if bound == "variable":
        monkeypatch.setenv("EMLOC_RAY_CACHE_SIZE", f"{150 * FILE}B")
    else:
        usage = shutil.disk_usage(root)
        total = 10 * 150 * FILE // 9
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(total=total, free=total - held(root)))
    for number in range(100, 200):
        make_room(root, FILE)
        add(root, number)
        assert held(root) <= 150 * FILE
    assert len(list((root / ".locks").iterdir())) == 0  # they go with what they were for
    assert (root / "a" / "199").exists()
    assert not (root / "a" / "0").exists()
    assert held(root) > 130 * FILE


def test_copies_in_use_stay_and_are_not_looked_at_for_each_file(
    root: Path, looks: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(total=1000 * LIMIT, free=0))
    for number in range(100):
        old(note_of(root, f"a/{number}"), 0.0)
    for _ in range(100):
        make_room(root, FILE)
    assert len(looks) <= 2
    assert held(root) == 100 * FILE


def test_what_killed_processes_left_goes_after_a_day(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMLOC_RAY_CACHE_SIZE", f"{LIMIT}B")
    cache, hour, day = root.parent, 3600.0, 25 * 3600.0
    gone = [root / ".x.abc.tmp", root / "a" / ".y.abc.tmp" / "file", cache / "local=s3" / "hidden" / "h"]
    gone.append(cache / ".local=s4.abc.tmp" / "hidden" / "h")  # whose removal was killed
    kept = [root / ".z.abc.tmp", root / "log", cache / "local=other" / "hidden" / "begun"]
    for file in (*gone, *kept, kept[2].with_name("ended")):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * 10)
        old(file, hour if file in kept else day)
        old(file.parent, day)
    old(cache / "local=s3", day)
    old(cache / ".local=s4.abc.tmp", day)
    old(root / "log", day)
    make_room(root, 0, written=FILE)
    assert [file for file in gone if file.exists()] == []
    assert all(file.exists() for file in (*kept, kept[2].with_name("ended")))
    assert not (cache / "local=s3").exists()


def test_the_places_of_runs_without_files_go_after_a_day_however_much_room_there_is(root: Path) -> None:
    cache, hour, day = root.parent, 3600.0, 25 * 3600.0
    gone, kept = [cache / f"store=gone{number}" for number in range(3)], [cache / "store=new", cache / "store=log"]
    for place in (*gone, *kept):
        for folder in (place / "emulator", place / ".versions" / "emulator", place / ".locks"):
            folder.mkdir(parents=True)
        for file in (place / ".locks" / "a", place / ".versions" / "emulator" / "of-what-is-no-more"):
            file.touch()
    (kept[1] / "log.jsonl").touch()
    for path in sorted(cache.rglob("*"), reverse=True):
        old(path, hour if kept[0] in path.parents else day)
    make_room(root, 0, written=FILE)
    assert set(cache.glob("store=*")) == {root, *kept}
    again = cache / "store=again"
    again.mkdir()
    old(again, day)
    make_room(root, 0, written=FILE)
    assert again.exists()  # it is looked at once an hour
