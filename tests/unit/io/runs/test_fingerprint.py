"""Fingerprints change with what matters, and with nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from emloc_ray.io.runs import fingerprint as module
from emloc_ray.io.runs.fingerprint import content_of, fingerprint, fingerprint_large_files


def test_key_order_does_not_count_but_list_order_and_values_do() -> None:
    assert fingerprint({"a": 1, "b": {"c": 2, "d": 3}}) == fingerprint({"b": {"d": 3, "c": 2}, "a": 1})
    different = [{"a": 1}, {"a": 2}, {"a": "1"}, {"a": None}, {"b": 1}, {"a": [1, 2]}, {"a": [2, 1]}, {}, []]
    assert len({fingerprint(value) for value in different}) == len(different)


def test_the_same_in_every_process() -> None:
    value = {"a": [1.5, "x", None], "path": "runs/x"}
    # The file alone: importing the package would cost seconds.
    code = f"import runpy; print(runpy.run_path({module.__file__!r})['fingerprint']({value!r}))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert run.stdout.strip() == fingerprint(value)


def test_small_files_by_name_and_content_in_order(tmp_path: Path) -> None:
    one, two = tmp_path / ".one.jsonl", tmp_path / "two"
    one.write_text("x")
    two.write_text("y")
    before = fingerprint_large_files([one, two])
    assert fingerprint_large_files([two, one]) != before
    one.write_text("z")
    assert fingerprint_large_files([one, two]) != before
    one.write_text("x")
    assert fingerprint_large_files([one, two]) == before
    assert fingerprint_large_files([one.rename(tmp_path / "renamed"), two]) != before


def test_a_checkpoint_s_copy_is_the_same_and_a_changed_byte_is_not(
    tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    copy = tmp_path / "m"
    shutil.copytree(tiny_model_dir(), copy, copy_function=shutil.copyfile)
    original = fingerprint_large_files(sorted(tiny_model_dir().iterdir()))
    assert fingerprint_large_files(sorted(copy.iterdir())) == original
    shard = sorted(copy.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert fingerprint_large_files(sorted(copy.iterdir())) != original


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No attributes, and an empty cache of this user's."""
    monkeypatch.setattr(module, "noted_digest", lambda file: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("change", ["size", "a byte", "name", "header"])
def test_large_files_by_name_and_content(tmp_path: Path, home: None, change: str) -> None:
    large = tmp_path / "model.safetensors"
    with large.open("wb") as file:
        file.truncate(2**26)  # sparse
    before = fingerprint_large_files([large])
    os.utime(large, (1, 1))
    assert fingerprint_large_files([large]) == before
    if change == "size":
        os.truncate(large, 2**26 + 1)
    elif change == "name":
        large = large.rename(tmp_path / "other.safetensors")
    else:
        with large.open("r+b") as file:
            file.seek(12_345_678 if change == "a byte" else 5)
            file.write(b"x")
    assert fingerprint_large_files([large]) != before


def test_a_large_file_is_read_whole_once_and_its_samples_each_time(
    tmp_path: Path, home: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = tmp_path / "model.safetensors"
    with large.open("wb") as file:
        file.truncate(2**26)
    before = fingerprint_large_files([large])
    (tmp_path / "here").symlink_to(tmp_path)
    large = tmp_path / "here" / large.name  # a path that is new to this process, as all are to the next one
    monkeypatch.setattr(module, "digest", lambda file: pytest.fail("read whole again"))
    assert fingerprint_large_files([large]) == before
    large.touch()
    monkeypatch.setattr(module, "noted_digest", lambda file: "0" * 64)  # whatever was done to the file
    noted = fingerprint_large_files([large])
    with large.open("r+b") as file:
        file.write(b"x")
    assert fingerprint_large_files([large]) != noted


def test_what_the_hub_s_cache_names_by_its_content_goes_by_that_and_its_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "digest", lambda file: pytest.fail("read whole"))
    sha = "0123456789abcdef" * 4
    for folder, time in (("one", 1), ("two", 2)):
        (tmp_path / folder).mkdir()
        blob = tmp_path / folder / sha
        with blob.open("wb") as file:
            file.truncate(2**30)  # sparse
        os.utime(blob, (time, time))
        (tmp_path / folder / "model.safetensors").symlink_to(blob)
    one, two = (tmp_path / folder / "model.safetensors" for folder in ("one", "two"))
    assert fingerprint_large_files([one]) == fingerprint_large_files([two])
    assert content_of([one]) == content_of([two])
    with (tmp_path / "two" / sha).open("r+b") as file:
        file.write(b"another header")
    os.utime(tmp_path / "two" / sha, (2, 2))
    assert fingerprint_large_files([one]) != fingerprint_large_files([two])
    assert content_of([one]) != content_of([two])
    with (tmp_path / "two" / sha).open("r+b") as file:
        file.write(bytes(14))
    assert fingerprint_large_files([one]) == fingerprint_large_files([two])
    other = tmp_path / "two" / sha[::-1]
    (tmp_path / "two" / sha).rename(other)
    two.unlink()
    two.symlink_to(other)
    assert fingerprint_large_files([one]) != fingerprint_large_files([two])


def test_a_small_file_of_the_hub_s_cache_goes_by_what_it_holds(tmp_path: Path) -> None:
    blob, file = tmp_path / ("0123456789abcdef" * 4), tmp_path / "tokenizer.json"
    file.symlink_to(blob)
    seen = set()
    for content in ("{}", "[]"):
        blob.write_text(content)
        os.utime(blob, (1, 1))
        seen.add(content_of([file]))
    assert len(seen) == 2


def test_content_tells_files_of_one_name_size_and_time_apart(tmp_path: Path) -> None:
    files = []
    for folder, byte in (("one", b"a"), ("two", b"b"), ("three", b"a")):
        (tmp_path / folder).mkdir()
        files.append(tmp_path / folder / "model.safetensors")
        files[-1].write_bytes(byte * 2**26)
        os.utime(files[-1], (1, 1))
    one, two, three = files
    assert fingerprint_large_files([one]) != fingerprint_large_files([two])
    assert fingerprint_large_files([one]) == fingerprint_large_files([three])
    assert content_of([one]) != content_of([two])
    assert content_of([one]) == content_of([three])
