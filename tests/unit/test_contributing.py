"""CONTRIBUTING.md: its map names files and folders that are there, and every room; tests set no private names."""

from __future__ import annotations

import re
from pathlib import Path

from test_imports import ROOMS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()


def test_every_path_is_there() -> None:
    paths = set(re.findall(r"`((?:emloc_ray|pipelines|configs|cluster|tests|\.ci)/[^`*\s]*)`", PAGE))
    assert len(paths) > 40
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_the_map_has_the_rooms_in_the_order_of_imports() -> None:
    rooms = PAGE.split("## The rooms", 1)[1].split("## Where is it", 1)[0]
    named = re.findall(r"^\| (?:`emloc_ray/(\w+)/`|`emloc_ray/(\w+)\.py`, `emloc_ray/(\w+)\.py`)", rooms, re.MULTILINE)
    assert [name for row in named for name in row if name] == list(ROOMS)


def test_there_are_at_least_twenty_questions() -> None:
    questions = re.findall(r"^\| ([^|]*\?) \| `", PAGE, re.MULTILINE)
    assert len(questions) >= 20


def test_no_test_sets_a_private_name() -> None:
    name = r"""["'](?:[\w.]+\.)?_(?!_)\w+["']"""
    private = re.compile(rf"""(?:set|del)attr\(\s*(?:[\w.]+,\s*)?{name}|for name in \((?:"\w+", )*{name}""")
    files = sorted((ROOT / "tests").rglob("*.py"))
    assert [str(file) for file in files if private.search(file.read_text())] == []
