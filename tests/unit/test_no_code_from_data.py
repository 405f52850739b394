"""No file that is read may run code: a pickle that leaves a mark knocks at every door, and none of them opens."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from payloads import Leaves
from PIL import Image
from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

from emloc_ray.data.hub import download
from emloc_ray.data.ingest import SampleOrder, read_micro_steps
from emloc_ray.data.reading import SourceFile, read_rows, scan
from emloc_ray.data.splits import RowSelection
from emloc_ray.data.token_shards import TokenShards, shard_name, write_index, written_counts
from emloc_ray.data.tokenizing import ShardTokenizer, TokenizeOptions
from emloc_ray.errors import ArtifactError, DamagedArtifactError, DataError
from emloc_ray.io.formats.arrow_schemas import check_no_extensions
from emloc_ray.io.formats.shards import write_tensors
from emloc_ray.io.formats.teacher_shards import TeacherShards, teacher_shard, write_teacher_index
from emloc_ray.io.runs.cache import ArtifactCache
from emloc_ray.io.store.digests import digest

KIND = "ray.data.arrow_pickled_object"
NAMED = {"ARROW:extension:name": "not.registered.here"}


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "mark"


@pytest.fixture
def pickled(mark: Path) -> pa.Array:
    """One pickle, as Ray Data stores objects."""
    storage = pa.array([pickle.dumps(Leaves(mark))], pa.large_binary())
    return pa.ExtensionArray.from_storage(ArrowPythonObjectType(), storage)


ITEM = pa.field("item", pa.large_binary(), metadata=NAMED)

# A column "bad" around one pickle, and the place in it that the error names.
COLUMNS: dict[str, tuple[Callable[[pa.Array], pa.Array], str]] = {
    "itself": (lambda one: one, "bad"),
    "list": (lambda one: pa.ListArray.from_arrays([0, 1], one), "bad.item"),
    "large list": (lambda one: pa.LargeListArray.from_arrays([0, 1], one), "bad.item"),
    "fixed list": (lambda one: pa.FixedSizeListArray.from_arrays(one, 1), "bad.item"),
    "struct": (lambda one: pa.StructArray.from_arrays([one], ["inside"]), "bad.inside"),
    "map": (lambda one: pa.MapArray.from_arrays([0, 1], ["key"], one), "bad.entries.value"),
    "deep": (
        lambda one: pa.StructArray.from_arrays([pa.ListArray.from_arrays([0, 1], one)], ["inside"]),
        "bad.inside.item",
    ),
    "list, not registered": (
        lambda one: pa.ListArray.from_arrays([0, 1], one.storage).cast(pa.list_(ITEM)),
        "bad.item",
    ),
}


def parquet(path: Path, column: pa.Array, **field: Any) -> Path:
    rows = pa.Table.from_arrays(
        [pa.array(["a"]), pa.array(["b"]), column],
        schema=pa.schema([("prompt", pa.string()), ("completion", pa.string()), pa.field("bad", column.type, **field)]),
    )
    pq.write_table(rows, path)
    return path


def assert_refused(read: Callable[[], Any], mark: Path, *said: str, error: type[Exception] = DataError) -> None:
    with pytest.raises(error) as caught:
        read()
    assert not mark.exists()
    for words in said:
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_payload_works_where_nobody_checks(tmp_path: Path, pickled: pa.Array, mark: Path) -> None:
    pq.read_table(parquet(tmp_path / "a.parquet", pickled)).to_pylist()
    assert mark.exists()


@pytest.mark.parametrize("shape", COLUMNS)
def test_parquet_on_the_driver_and_in_the_worker(tmp_path: Path, pickled: pa.Array, mark: Path, shape: str) -> None:
    make, place = COLUMNS[shape]
    path = parquet(tmp_path / "a.parquet", make(pickled))
    kind = "not.registered.here" if "registered" in shape else KIND
    assert_refused(lambda: scan(path), mark, f"{path}: column '{place}'", kind)
    counted = SourceFile(str(path), "parquet", 1)  # when it was another file
    fields = ["prompt", "completion"]
    assert_refused(lambda: list(read_rows(counted, [0], fields, ["bad"])), mark, f"{path}: column '{place}'", kind)


@pytest.mark.parametrize("kind", ["not.registered.here", "ray.data.arrow_tensor"])
def test_parquet_by_metadata_alone(tmp_path: Path, pickled: pa.Array, mark: Path, kind: str) -> None:
    """Plain bytes to who has not registered the type; and a type whose metadata was a pickle in older versions of Ray."""
    column = pickled.storage if kind == "not.registered.here" else pa.array([[1]], pa.list_(pa.int64()))
    metadata = {"ARROW:extension:name": kind, "ARROW:extension:metadata": pickled.storage[0].as_py()}
    path = parquet(tmp_path / "a.parquet", column, metadata=metadata)
    assert_refused(lambda: scan(path), mark, str(path))
    assert_refused(lambda: list(read_rows(SourceFile(str(path), "parquet", 1), [0])), mark, str(path))


@pytest.mark.parametrize(("column", "said"), [([1], b"[1]"), ([[1]], b"5")])
def test_a_type_over_which_its_own_code_fails(tmp_path: Path, column: list[Any], said: bytes) -> None:
    """Ray Data's code asks no storage whether it is the type's: it raises AttributeError and TypeError."""
    named = {"ARROW:extension:name": "ray.data.arrow_tensor", "ARROW:extension:metadata": said}
    path = parquet(tmp_path / "a.parquet", pa.array(column), metadata=named)
    for read in (lambda: scan(path), lambda: list(read_rows(SourceFile(str(path), "parquet", 1), [0]))):
        with pytest.raises(DataError, match=r"a\.parquet: a column has an extension type that cannot be read \("):
            read()


def test_a_uuid_of_parquet_s_own_is_plain_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": pa.array([b"0" * 16], pa.uuid())}), path, store_schema=False)
    assert list(read_rows(scan(path), [0])) == [(0, {"id": b"0" * 16})]


@pytest.mark.parametrize(
    "kind",
    [
        pa.dictionary(pa.int32(), ArrowPythonObjectType()),
        pa.run_end_encoded(pa.int32(), ArrowPythonObjectType()),
        pa.dense_union([pa.field("one", ArrowPythonObjectType())]),
        pa.list_view(ArrowPythonObjectType()),
        pa.dictionary(pa.int32(), pa.list_(ITEM)),
        pa.map_(pa.string(), pa.struct([ITEM])),
    ],
    ids=str,
)
def test_what_only_arrow_can_nest(kind: pa.DataType) -> None:
    with pytest.raises(DataError, match=r"rows\.arrow: column 'bad\.[^']*' has the extension type"):
        check_no_extensions(pa.schema([("good", pa.map_(pa.string(), pa.int8())), ("bad", kind)]), "rows.arrow")


def test_a_file_that_changes_before_the_worker_reads_it(
    tmp_path: Path, pickled: pa.Array, mark: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    path = parquet(tmp_path / "a.parquet", pa.array([1]))
    rows = RowSelection.all_rows([scan(path)])
    parquet(path, pickled)
    options = TokenizeOptions(str(tiny_model_dir("llama")), "prompt_completion", 64)
    unit = json.dumps({"split": "train", "first": 0, "rows_per_shard": 1, "bounds": [0, 1]})
    worker = ShardTokenizer(options, {"train": rows}, tmp_path / "tokens")
    assert_refused(lambda: worker({"unit": [unit]}), mark, f"{path}: column 'bad'")
    assert not list((tmp_path / "tokens").rglob("*.arrow"))


def token_shards(directory: Path, column: pa.Array, **field: Any) -> Path:
    directory.mkdir(parents=True)
    table = pa.Table.from_arrays(
        [column, pa.array([[True]])],
        schema=pa.schema([pa.field("input_ids", column.type, **field), ("completion_mask", pa.list_(pa.bool_()))]),
    )
    with pa.ipc.new_file(directory / shard_name(0), table.schema) as writer:
        writer.write_batch(table.to_batches()[0], custom_metadata={"counts": "{}"})
    write_index(directory, [1], {})
    return directory


@pytest.mark.parametrize("shape", ["itself", "list", "named"])
def test_token_shards(tmp_path: Path, pickled: pa.Array, mark: Path, shape: str) -> None:
    if shape == "named":
        column, field = pa.array([[1]], pa.list_(pa.int32())), {"metadata": NAMED}
    else:
        column, field = COLUMNS[shape][0](pickled), {}
    directory = token_shards(tmp_path / "tokens", column, **field)
    said = (str(directory / shard_name(0)), "column 'input_ids'")
    shards = TokenShards(directory)
    for read in (lambda: shards.row(0), lambda: shards.shard(0)):
        assert_refused(read, mark, *said, error=DamagedArtifactError)
    order = SampleOrder(num_rows=1, batch_size=1, rank=0, world_size=1, seed=0)
    assert_refused(lambda: read_micro_steps(directory, order, 0, 1), mark, *said, error=DamagedArtifactError)
    assert written_counts(directory / shard_name(0)) is None  # so that it is written anew
    assert not mark.exists()


def test_a_shared_cache_s_entry(tmp_path: Path, pickled: pa.Array, mark: Path) -> None:
    """Whoever may write to the cache can give a shard the hash that its entry names."""
    token_shards(tmp_path / "theirs" / "tokens", COLUMNS["list"][0](pickled))
    files = {
        path.relative_to(tmp_path / "theirs").as_posix(): {"size": path.stat().st_size, "sha256": digest(path)}
        for path in (tmp_path / "theirs" / "tokens").iterdir()
    }
    cache = ArtifactCache(str(tmp_path / "cache"))
    assert cache.add("data", "k" * 64, tmp_path / "theirs", files, {}, {}) is None
    entry = cache.find("data", "k" * 64)
    assert entry is not None
    cache.link(entry, tmp_path / "ours")
    shards = TokenShards(tmp_path / "ours" / "tokens")
    assert_refused(lambda: shards.row(0), mark, shard_name(0), "column 'input_ids'", error=DamagedArtifactError)
    assert not mark.exists()


def test_teacher_shards(tmp_path: Path, mark: Path) -> None:
    path = teacher_shard(tmp_path, 0)
    write_teacher_index(tmp_path, [0])
    for write in (pickle.dump, torch.save):
        with path.open("wb") as file:
            write(Leaves(mark), file)
        assert_refused(lambda: TeacherShards(tmp_path).row(0), mark, str(path), error=ArtifactError)
    ends = torch.tensor([1])
    write_tensors(path, {"rows": ends - 1, "ends": ends, "ids": ends, "log_probs": torch.ones(1, 1).half()})
    assert_refused(lambda: TeacherShards(tmp_path).row(0), mark, f"{path}", "'ids'", error=DamagedArtifactError)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rows", "images"])
def test_a_data_set_of_the_hub(tmp_path: Path, pickled: pa.Array, mark: Path, kind: str) -> None:
    """What ``datasets`` makes of such a column is plain bytes, for its process knows no Ray."""
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    if kind == "rows":
        parquet(folder / "train.parquet", pickled)
    else:
        for place, column in (("a", pickled.storage), ("b", pickled)):  # datasets looks at the schema of one file alone
            (folder / place).mkdir()
            Image.new("RGB", (2, 2)).save(folder / place / "a.png")
            pq.write_table(pa.table({"file_name": ["a.png"], "bad": column}), folder / place / "metadata.parquet")
    download(f"hf:{folder}", "train", tmp_path / "rows.parquet")
    source = scan(tmp_path / "rows.parquet")
    rows = list(read_rows(source, range(source.num_rows)))
    assert {row["bad"] for _, row in rows} == {pickled.storage[0].as_py()}
    assert not mark.exists()
