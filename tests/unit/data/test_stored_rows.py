"""Rows on a real S3 server against the same rows on a disk: every kind, globs, what changes a fingerprint, errors."""

from __future__ import annotations

import dataclasses
import glob
import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faulting.s3 import BUCKET, faulty_store, uri
from hypothesis import given
from hypothesis import strategies as st
from small_runs import write_jsonl
from test_reading import WRITERS

from emloc_ray.data import reading
from emloc_ray.data.files import list_files
from emloc_ray.data.reading import read_rows, scan
from emloc_ray.data.source_versions import check_stored, fingerprint_sources
from emloc_ray.data.splits import RowSelection
from emloc_ray.errors import ArtifactError, ConfigError, DataError
from emloc_ray.io.store import objects
from emloc_ray.io.store.object_store import ObjectStore
from emloc_ray.io.store.objects import Objects
from emloc_ray.io.store.stored_files import StoredFile, _fits, find_stored

KEY = "data.train.path"
Put = Callable[[str, bytes], str]
NAMES = (
    *("a.jsonl", "a/b.csv", "a-b.jsonl", "a/b/c.jsonl", "g.md"),
    *(".d.csv", "a/.e/f.csv", "a/c d+ü.jsonl", "a/b#1%20.csv"),
)
PATTERNS = (
    *("*.jsonl", "a*.jsonl", "*/b.[a-c]sv", "a/*", ".*", "a/.e/*"),
    *("**/*.csv", "**/*.jsonl", "**/b/*", "a/**", "a/**/*.jsonl"),
)


@pytest.fixture(scope="module")
def put(s3_port: int) -> Put:
    """Puts an object and returns its URI."""
    store = ObjectStore(uri(s3_port, "").replace("/?", "?"))

    def write(path: str, content: bytes) -> str:
        store.write(path, content)
        return uri(s3_port, path)

    return write


@pytest.fixture(scope="module")
def folder(s3_port: int, put: Put, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The same small files on the disk and on the store, some of them hidden, unknown or of awkward names."""
    root = tmp_path_factory.mktemp("folder")
    for name in NAMES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text('{"text": "x"}\n')
        put(f"folder/{name}", b'{"text": "x"}\n')
    return root, uri(s3_port, "folder")


def inside(place: str, pattern: str) -> str:
    return place.replace("?", f"/{pattern}?")


def names(found: list[Any], root: Any) -> list[str]:
    """Paths or URIs from the folder on, as they are without escapes."""
    from urllib.parse import unquote

    if isinstance(root, Path):
        return [path.relative_to(root).as_posix() for path in found]
    return [unquote(place.partition("?")[0].partition("/folder/")[2]) for place in found]


@pytest.mark.parametrize("suffix", WRITERS)
@given(st.data())
def test_stored_rows_are_the_local_ones(
    put: Put, tmp_path_factory: pytest.TempPathFactory, suffix: str, data: st.DataObject
) -> None:
    text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30)
    rows = [
        {"prompt": prompt, "completion": completion}
        for prompt, completion in data.draw(st.lists(st.tuples(text, text), min_size=1, max_size=30), "rows")
    ]
    local = scan(WRITERS[suffix](tmp_path_factory.mktemp("r") / f"a{suffix}", rows))
    stored = scan(put(f"rows/a{suffix}", Path(local.path).read_bytes()))
    assert (stored.num_rows, stored.marks, stored.group_rows) == (local.num_rows, local.marks, local.group_rows)
    wanted = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1), min_size=1), "wanted"))
    assert list(read_rows(stored, wanted)) == list(read_rows(local, wanted))


@pytest.mark.parametrize("suffix", WRITERS)
def test_many_stored_rows_by_random_access(put: Put, tmp_path: Path, suffix: str) -> None:
    rows = [{"prompt": f"p{i}\n", "completion": "ü" * (i % 300)} for i in range(3000)]
    local = scan(WRITERS[suffix](tmp_path / f"a{suffix}", rows))
    stored = scan(put(f"many/a{suffix}", Path(local.path).read_bytes()))
    wanted = [0, 1, 1023, 1024, 1025, 2047, 2048, 2999]
    assert list(read_rows(stored, wanted)) == [(number, rows[number]) for number in wanted]
    assert [row for _, row in read_rows(stored, range(3000))] == rows
    assert [where for where, _ in RowSelection.all_rows([stored]).read(2, 4)] == [
        f"s3://{BUCKET}/many/a{suffix}, row {number}" for number in (3, 4)
    ]


@pytest.mark.parametrize("suffix", WRITERS)
def test_rows_are_read_without_the_rest_of_the_file(
    put: Put, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"{i}", "completion": f"{i} " * 300} for i in range(4096)]
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=512, compression="none", use_dictionary=False)
    else:
        WRITERS[suffix](path, rows)
    source = scan(put(f"part/a{suffix}", path.read_bytes()))
    monkeypatch.setattr(reading, "STORED_BUFFER_BYTES", 2**16)
    asked, read_range = [], Objects.read_range

    def watched(self: Objects, *arguments: Any) -> bytes:
        content = read_range(self, *arguments)
        asked.append(len(content))
        return content

    monkeypatch.setattr(Objects, "read_range", watched)
    assert list(read_rows(source, [2049])) == [(2049, rows[2049])]
    assert 0 < sum(asked) < path.stat().st_size / 4


@pytest.mark.parametrize("suffix", WRITERS)
def test_faults_on_the_way_change_no_row(
    s3_port: int, put: Put, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(reading, "STORED_BUFFER_BYTES", 2**13)
    rows = [{"prompt": f"p{i}", "completion": f"{i} " * 100} for i in range(300)]
    put(f"faults/a{suffix}", WRITERS[suffix](tmp_path / f"a{suffix}", rows).read_bytes())
    with faulty_store(s3_port, share=0.3, pause_s=0.01) as faulty:
        sources = [scan(place) for place in list_files(uri(faulty.port, "faults/*" + suffix), KEY)]
        assert [row for _, row in read_rows(sources[0], range(300))] == rows
        assert sum(faulty.counts().values()) > 0


# Which files.


def test_a_directory_holds_the_same_files_in_the_same_order(folder: tuple[Path, str]) -> None:
    root, place = folder
    found = list_files(place, KEY)
    assert names(found, place) == names(list_files(str(root), KEY), root)
    assert [scan(file).num_rows for file in found if ".csv" not in str(file)] == [1, 1, 1, 1]
    assert list_files(inside(place, ""), KEY) == found
    assert list_files(str(found[0]), KEY) == found[:1]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_globs_name_what_pythons_glob_names(folder: tuple[Path, str], pattern: str) -> None:
    root, place = folder
    expected = [file for file in glob.glob(str(root / pattern), recursive=True) if Path(file).is_file()]
    found = find_stored(inside(place, pattern), KEY, [])
    assert names(found, place) == names(sorted(map(Path, expected)), root)


def test_a_question_mark_of_a_glob_is_escaped(folder: tuple[Path, str]) -> None:
    assert names(find_stored(inside(folder[1], "%3F.jsonl"), KEY, []), "") == ["a.jsonl"]


@given(
    st.lists(st.sampled_from(["a", ".a", "ab", "b"]), min_size=1, max_size=4),
    st.lists(st.sampled_from(["a", "**", "*", ".*", "a*", "[ab]", "b"]), min_size=1, max_size=4),
)
def test_parts_fit_as_pythons_glob_says(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str], pattern: list[str]
) -> None:
    root = tmp_path_factory.mktemp("globs")
    path = root.joinpath("below", *parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    found = glob.glob("/".join([str(root / "below"), *pattern]), recursive=True)
    assert _fits(parts, pattern) == (str(path) in found)


def test_paths_and_uris_in_one_list(folder: tuple[Path, str]) -> None:
    root, place = folder
    assert list_files([str(root / "a.jsonl"), inside(place, "a.jsonl")], KEY) == [
        root / "a.jsonl",
        inside(place, "a.jsonl"),
    ]


# What changes a fingerprint.


def test_a_fingerprint_changes_with_content_alone(s3_port: int, put: Put, tmp_path: Path) -> None:
    def now(place: str) -> str:
        return fingerprint_sources([scan(place)])

    first = now(put("prints/a.jsonl", b'{"text": "one"}\n'))
    assert now(put("prints/a.jsonl", b'{"text": "one"}\n')) == first
    assert now(put("prints/a.jsonl", b'{"text": "two"}\n')) != first
    assert now(put("elsewhere/a.jsonl", b'{"text": "one"}\n')) == first
    assert now(put("elsewhere/b.jsonl", b'{"text": "one"}\n')) != first
    local = scan(write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}]))
    both = [local, scan(uri(s3_port, "elsewhere/a.jsonl"))]
    assert fingerprint_sources(both) not in (fingerprint_sources(both[:1]), fingerprint_sources(both[1:]))


def test_without_an_etag_the_time_tells_versions_apart(put: Put) -> None:
    place = put("times/a.jsonl", b"x\n")
    with StoredFile(place) as file:
        tagged = file.version
        file.stored = dataclasses.replace(file.stored, e_tag=None)
        size, time = file.version.split()
    assert tagged.startswith("2 ")
    assert (size, float(time) > 10**9) == ("2", True)


# Errors.


@pytest.mark.parametrize("pattern", ["absent.jsonl", "absent/", "*.parquet", "absent/**/*.csv"])
def test_nothing_found(folder: tuple[Path, str], pattern: str) -> None:
    with pytest.raises(DataError, match=rf"^{KEY}: s3://.* names no file: give a "):
        list_files(inside(folder[1], pattern), KEY)


def test_no_bucket(s3_port: int) -> None:
    with pytest.raises(DataError, match=rf"^{KEY}: s3://nowhere.* names no file"):
        list_files(uri(s3_port, "a.jsonl").replace(BUCKET, "nowhere"), KEY)


def test_unknown_kind(folder: tuple[Path, str]) -> None:
    with pytest.raises(DataError, match=rf"^{KEY}: s3://{BUCKET}/folder/g.md ends in \.md"):
        list_files(inside(folder[1], "g.md"), KEY)


@pytest.mark.parametrize(
    "place",
    [
        "s3://key:secret@bucket/a.jsonl",
        "s3://bucket/a.jsonl?access_key=k&secret_key=secret",
        "gs://secret@bucket/a.csv",
    ],
)
def test_credentials_are_refused(place: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{KEY} holds credentials: leave them out") as error:
        list_files(place, KEY)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "place", ["s3://bucket/a.jsonl?regoin=x", "what://bucket/a.jsonl", "s3:///a.jsonl", "s3://[b/a.jsonl"]
)
def test_places_that_cannot_be_opened(place: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{KEY} .* is no place that obstore can open"):
        list_files(place, KEY)


def test_a_store_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "ATTEMPTS", 1)
    with pytest.raises(ArtifactError, match=r"does not read a\.jsonl .* see that the store can be reached"):
        list_files(uri(1, "a.jsonl"), KEY)


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_store_that_falls_silent_is_not_a_bad_file(
    put: Put, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = WRITERS[suffix](tmp_path / f"a{suffix}", [{"prompt": "p", "completion": "c"}])
    source = scan(put(f"silent/a{suffix}", path.read_bytes()))

    def silent(*_: Any) -> bytes:
        raise ArtifactError("the store is silent")

    monkeypatch.setattr(Objects, "read_range", silent)
    with pytest.raises(ArtifactError, match="the store is silent"):
        list(read_rows(source, [0]))
    with pytest.raises(ArtifactError, match="the store is silent"):
        scan(source.path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.parquet", b"not parquet at all", " cannot be read as parquet"),
        ("a.csv", b"prompt,completion\na,b,c\n", ", row 1: 3 values under a header of 2"),
        ("a.csv", b"", " is empty"),
        ("a.jsonl", b"\n \n", " is empty"),
    ],
)
def test_bad_files(put: Put, name: str, content: bytes, said: str) -> None:
    with pytest.raises(DataError, match=rf"^s3://{BUCKET}/bad/{name}{said}"):
        scan(put(f"bad/{name}", content))


def test_a_file_that_is_gone(put: Put) -> None:
    place = put("gone/a.jsonl", b'{"text": "x"}\n')
    source = scan(place)
    with pytest.raises(DataError, match=rf"^s3://{BUCKET}/gone/absent\.jsonl cannot be read as jsonl .*is not there"):
        scan(place.replace("a.jsonl", "absent.jsonl"))
    assert list(read_rows(source, [0])) == [(0, {"text": "x"})]


@pytest.mark.parametrize("suffix", [*WRITERS, ".jsonl.gz"])
def test_a_file_that_was_replaced_is_not_read_as_the_old_one(put: Put, tmp_path: Path, suffix: str) -> None:
    def written(word: str) -> bytes:
        rows = [{"prompt": f"{word}{number}", "completion": word * 9} for number in range(2000)]
        path = WRITERS[suffix.removesuffix(".gz")](tmp_path / f"{word}{suffix.removesuffix('.gz')}", rows)
        return gzip.compress(path.read_bytes()) if suffix.endswith(".gz") else path.read_bytes()

    source = scan(put(f"replaced/a{suffix}", written("old")))
    check_stored([source])
    put(f"replaced/a{suffix}", written("renewed"))
    said = rf"^s3://{BUCKET}/replaced/a{suffix} was changed after its rows were counted: run the same command again"
    for looks in (lambda: check_stored([source]), lambda: list(read_rows(source, [0, 1500], keep_bad=True))):
        with pytest.raises(DataError, match=said):
            looks()


def test_a_file_that_was_removed_has_changed(put: Put) -> None:
    source = scan(put("removed/a.jsonl", b'{"text": "x"}\n'))
    removed = dataclasses.replace(source, path=source.path.replace("a.jsonl", "absent.jsonl"))
    with pytest.raises(DataError, match=r"absent\.jsonl was changed after its rows were counted"):
        check_stored([source, removed])
