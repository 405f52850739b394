"""Writes a data set of the hub as one Parquet file, in a process that never imports Ray: ``datasets`` makes Python values of
some files before we can check them (an image folder's ``metadata.parquet``), which Ray Data's registered type would unpickle."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from emloc_ray.data.downloads import MAX_BYTES
from emloc_ray.data.hub_splits import HubSplit
from emloc_ray.errors import DataError
from emloc_ray.io.formats.arrow_schemas import check_no_extensions
from emloc_ray.io.store.atomic import atomic_file
from emloc_ray.text import duration, one_line

_WRONG_NAME = "fix its name, its subset (hf:NAME@SUBSET) or its split"
_NO_NETWORK = "check the network, and HF_HUB_OFFLINE and HF_ENDPOINT in the environment, or name files that are here"
LOOK_S, SILENT_S = 1.0, 1800.0  # between two looks; for which nothing may come
_ROWS_PER_GROUP = 64  # of rows with images
# Of this process: each imports datasets, and writes all rows beside their copy.
_LOADING = threading.BoundedSemaphore(2)
_REFUSED = 3  # the exit code for a whole sentence of ours on stdout
# Python puts the working directory first, whose datasets.py or random.py would run in the library's place.
_RUN = "import sys; sys.path = [place for place in sys.path if place]; from emloc_ray.data.hub import main; main()"


def download(
    place: str, split: str, path: Path, first: int | None = None, look: Callable[[], None] = lambda: None
) -> None:
    """Writes the rows of ``hf:NAME[@SUBSET][:SPLIT]`` (also of a local folder that ``datasets`` reads) to ``path``; with
    ``first`` only so many, of the whole split, which are then all that is fetched. Two are loaded at a time. ``look`` is called
    every second, and may raise. Raises DataError where it cannot be loaded, where nothing comes for half an hour, or where a
    column has an extension type."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        _turn(look),
        tempfile.TemporaryDirectory(dir=path.parent, prefix=".hub.", suffix=".tmp") as folder,
        tempfile.TemporaryFile("w+") as said,
    ):
        rows = Path(folder, path.name)
        named = HubSplit.of(place, split)
        if first:
            named = named._replace(part=named.whole())
        command = [sys.executable, "-c", _RUN, *named, place, str(rows), str(first or "")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=said) as loading:
            try:
                code = _watched(loading, look)
            finally:
                loading.kill()
        if code is None:
            raise DataError(f"data.{split}.path {place} has given nothing for {duration(SILENT_S)}: {_NO_NETWORK}.")
        if code:
            said.seek(0)
            detail = (said.read().strip().splitlines() or [f"exit code {code}"])[-1]
            if code != _REFUSED:
                advice = _NO_NETWORK if "Couldn't reach" in detail else _WRONG_NAME
                detail = f"data.{split}.path {place} cannot be loaded ({one_line(detail, 400)}): {advice}."
            raise DataError(detail)
        with rows.open("rb") as written, atomic_file(path) as file:
            shutil.copyfileobj(written, file)


@contextlib.contextmanager
def _turn(look: Callable[[], None]) -> Iterator[None]:
    """Waits until one of the processes that load at once has ended."""
    while not _LOADING.acquire(timeout=LOOK_S):
        look()
    try:
        yield
    finally:
        _LOADING.release()


def _watched(loading: subprocess.Popen[bytes], look: Callable[[], None]) -> int | None:
    """Waits for a process and returns its exit code; None where it neither wrote nor computed for too long. Counts looks, not
    time: this process itself may have been stopped meanwhile."""
    done, looks = "", 0
    while looks * LOOK_S < SILENT_S:
        try:
            return loading.wait(LOOK_S)
        except subprocess.TimeoutExpired:
            look()
            before, done = done, _done(loading.pid)
            looks = looks + 1 if done and done == before else 0
    return None


def _done(process: int) -> str:
    """The bytes that a process has written, and its seconds of CPU; proc(5)."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        written = Path(f"/proc/{process}/io").read_text().split("wchar:")[1].split()[0]
        return f"{written} {sum(map(int, stat[11:13])) // os.sysconf('SC_CLK_TCK')}"
    except (OSError, IndexError):  # not Linux, where it is not known and nothing is ended
        return ""


def _write(name: str, subset: str, part: str, place: str, path: str, first: str) -> None:
    import datasets

    datasets.disable_progress_bars()
    if Path(name, "state.json").is_file() and Path(name, "dataset_info.json").is_file():
        dataset = _saved(name, part, int(first or 0))
    elif first:
        stream = datasets.load_dataset(name, subset or None, split=part, streaming=True)
        dataset = datasets.Dataset.from_list(list(stream.take(int(first))), features=stream.features)
    else:
        dataset = datasets.load_dataset(name, subset or None, split=part)
    check_no_extensions(dataset.features.arrow_schema, place)
    embeds = datasets.features.features.require_storage_embed
    if named := [column for column, feature in dataset.features.items() if embeds(feature)]:
        roots = [os.path.realpath(root) for root in (name, datasets.config.DOWNLOADED_DATASETS_PATH)]
        _write_with_files(dataset, named, roots, path)
    else:
        dataset.to_parquet(path)


def _saved(folder: str, part: str, first: int) -> Any:
    """The rows of a split that ``Dataset.save_to_disk`` wrote, which ``load_dataset`` does not read. It is called ``train``
    where it has no name."""
    import datasets

    saved = datasets.load_from_disk(folder)
    rows = datasets.ReadInstruction.from_spec(part).to_absolute({str(saved.split or "train"): len(saved)})
    pieces = [saved.select(range(piece.from_, piece.to)) for piece in rows]
    whole = datasets.concatenate_datasets(pieces)
    return whole.select(range(min(first, len(whole)))) if first else whole


def _write_with_files(dataset: Any, named: Sequence[str], roots: Sequence[str], path: str) -> None:
    """Writes a data set with the files that its columns ``named`` name: an image folder's images are not where its rows are
    read."""
    with pq.ParquetWriter(path, dataset.features.arrow_schema) as file:
        for table in dataset.with_format("arrow").iter(_ROWS_PER_GROUP):
            for number, column in enumerate(table.schema):
                if column.name in named:
                    values = _with_files(table[number].to_pylist(), roots)
                    table = table.set_column(number, column, pa.array(values, column.type))
            file.write_table(table)


def _with_files(value: Any, roots: Sequence[str]) -> Any:
    """A value with the content of each file of at most :data:`MAX_BYTES` that it names and that is below one of the ``roots``:
    a stranger's rows may name any."""
    if isinstance(value, list):
        return [_with_files(item, roots) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"bytes", "path"} and value["bytes"] is None and isinstance(value["path"], str):
        file = Path(os.path.realpath(value["path"]))
        if any(map(file.is_relative_to, roots)) and file.is_file() and file.stat().st_size <= MAX_BYTES:
            return {"bytes": file.read_bytes(), "path": file.name}
    return {key: _with_files(item, roots) for key, item in value.items()}


def _end_with_parent() -> None:
    """Ends this process where the one that began it has ended, however that did: stdin is its pipe, and so ends too."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def main() -> None:
    """What the process runs: its arguments are those of ``_write``."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _write(*sys.argv[1:])
    except DataError as error:
        sys.stdout.write(f"{error}\n")
        sys.exit(_REFUSED)
    except Exception as error:
        raise SystemExit(one_line(error, 4000)) from error  # with the subsets that there are, where one is missing
