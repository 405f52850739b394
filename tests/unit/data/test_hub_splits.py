"""Splits of data sets on the hub, and which of them have rows in common."""

from __future__ import annotations

from pathlib import Path

import pytest

from emloc_ray.data.hub_splits import HubSplit, content_of_folders


def test_a_place_names_data_set_subset_and_split() -> None:
    assert HubSplit.of("hf:org/rows", "eval") == ("org/rows", "", "test")
    assert HubSplit.of("hf:org/rows@en", "train") == ("org/rows", "en", "train")
    assert str(HubSplit.of("hf:org/rows@en:train[:10%]", "eval")) == "hf:org/rows@en:train[:10%]"


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("train", "train", True),
        ("train", "test", False),
        ("train", "train[:10%]", True),
        ("train", "train[-5:]", True),
        ("train[:]", "train[90%:]", True),
        ("train[:90%]", "train[90%:]", False),
        ("train[:91%]", "train[90%:]", True),
        ("train[:-10%]", "train[-10%:]", False),
        ("train[:-10%]", "train[89%:]", True),
        ("train[:100]", "train[100:]", False),
        ("train[:101]", "train[100:200]", True),
        ("train[:100]", "train[50%:]", False),
        ("train[:100]", "train[-100:]", False),
        ("train[-100:]", "train[-100:]", True),
        ("train[:80%]+extra", "test+train[80%:]", False),
        ("train[:80%]+extra", "train[80%:]+extra[:1]", True),
        ("train[:10%](pct1_dropremainder)", "train[5%:]", False),
    ],
)
def test_splits_that_surely_share_rows_overlap(one: str, other: str, expected: bool) -> None:
    a, b = HubSplit("org/rows", "", one), HubSplit("org/rows", "", other)
    assert a.overlaps(b) == b.overlaps(a) == expected
    assert not a.overlaps(HubSplit("org/other", "", other))
    assert not a.overlaps(HubSplit("org/rows", "en", other))


def test_a_file_that_moves_to_another_split_s_folder_is_another_content(tmp_path: Path) -> None:
    for name in ("test/part-0", "train/part-1", "train/part-2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    hub = {"train": [f"hf:{tmp_path}"]}
    before = content_of_folders(hub)
    (tmp_path / ".part-3").write_text("no part of it")
    assert content_of_folders(hub) == before
    (tmp_path / "train/part-1").rename(tmp_path / "test/part-1")
    assert content_of_folders(hub) != before


def test_rows_behind_a_linked_folder_are_content_too(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "rows", tmp_path / "elsewhere"
    for place in (folder, elsewhere):
        place.mkdir()
    (folder / "train").symlink_to(elsewhere)
    before = content_of_folders({"train": [f"hf:{folder}"]})
    (elsewhere / "a.jsonl").write_text("x")
    assert content_of_folders({"train": [f"hf:{folder}"]}) != before
