"""Rows that a program holds, such as a list of dicts, a data frame or a data set, as a file that a config can name."""

import contextlib
import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from emloc_ray.errors import ConfigError
from emloc_ray.io.runs.run_places import check_folder
from emloc_ray.io.store.digests import digest
from emloc_ray.io.store.places import is_store_uri
from emloc_ray.io.store.replacing import remove, replacing
from emloc_ray.text import listed, one_line

_A_DAY_S = 86_400.0
_NONE = "{name} has no rows: give at least one (an iterator can be read once)."
_PLAIN = (str, Mapping, list, tuple)  # what may be iterated and is no set of rows in a section


def is_place(rows: Any) -> bool:
    """Whether these are no rows but what a config has in their place: a path, several, or a section."""
    if isinstance(rows, list):
        return bool(rows) and all(isinstance(each, str) for each in rows)
    return rows is None or isinstance(rows, str | Mapping)


def check_one_split(section: Any, name: str) -> None:
    """Raises ConfigError where several sets of rows by their names, such as a ``DatasetDict``, are given for one split."""
    values = section if isinstance(section, Mapping) else {}
    sets = [str(key) for key, rows in values.items() if isinstance(rows, Iterable) and not isinstance(rows, _PLAIN)]
    if sets and "path" not in values:
        raise ConfigError(
            f"{name} is no set of rows but holds several ({listed(sets, 3)}): give one of them, such as rows[{sets[0]!r}]."
        )


def write_rows(rows: Any, name: str, run_dir: str) -> str:
    """Writes rows, mappings or a table that Arrow reads (pandas, polars, pyarrow), into a folder beside the run's directory,
    ``RUN_DIR.rows``, under the hash of their content: the same rows are the same file, which is written anew where it holds
    others by now. Returns its path. Raises ConfigError where a row is none, or holds what is not JSON, or there is none; where a
    table has what Arrow cannot write; where ``run_dir`` is on an object store, or the folder cannot be made."""
    if is_store_uri(run_dir):
        raise ConfigError(
            f"{name} are rows, and run_dir {run_dir} is on an object store: give the path of a file there."
        )
    folder = Path(f"{Path(run_dir.removeprefix('file://')).expanduser().absolute()}.rows")
    is_table = hasattr(rows, "__arrow_c_stream__")
    if hasattr(rows, "__len__") and not len(rows):
        raise ConfigError(f"{name} has no rows: give at least one.")
    check_folder(folder, "run_dir: the rows' folder")
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*.tmp"):  # by calls that were killed
        with contextlib.suppress(FileNotFoundError):
            if left.stat().st_mtime < time.time() - _A_DAY_S:
                remove(left)
    with _gone_where_empty(folder), tempfile.TemporaryDirectory(".tmp", ".", folder) as temporary:
        new = Path(temporary, name)
        if is_table:
            _write_table(rows, name, new)
        else:
            with new.open("wb") as file:
                file.writelines(_lines(rows, name))
        sha256 = digest(new)
        path = folder / f"{name}-{sha256[:16]}.{'parquet' if is_table else 'jsonl'}"
        if not path.is_file() or digest(path) != sha256:  # else it is kept, as its time tells it from others
            with replacing(path) as whole:
                new.replace(whole)
    return str(path)


@contextlib.contextmanager
def _gone_where_empty(folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _write_table(rows: Any, name: str, path: Path) -> None:
    try:
        table = pa.table(rows)
        pa.parquet.write_table(table, path)
    except (pa.ArrowException, ValueError, TypeError) as error:
        detail = one_line(" ".join(map(str, error.args)))
        raise ConfigError(
            f"{name} cannot be written as a table ({detail}): give a list of dicts, or make each column of one type."
        ) from error
    if not table.num_rows:
        raise ConfigError(_NONE.format(name=name))


def _lines(rows: Any, name: str) -> Iterable[bytes]:
    if not isinstance(rows, Iterable):
        raise ConfigError(f"{name} is {type(rows).__name__}: give a path, a list of dicts, a data frame or a data set.")
    number = 0
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise ConfigError(f"{name}, row {number} is {type(row).__name__}: give a dict for each row.")
        try:
            yield (json.dumps(dict(row), ensure_ascii=False, default=_plain) + "\n").encode()
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{name}, row {number} cannot be written as JSON ({error}): name images by their paths, and leave out what"
                " no format reads."
            ) from error
    if not number:
        raise ConfigError(_NONE.format(name=name))


def _plain(value: Any) -> Any:
    """A number or a list of numpy's or torch's, a date or a time, as JSON has it. Raises TypeError for all else: an array of
    more axes is an image's."""
    if hasattr(value, "tolist") and getattr(value, "ndim", 0) < 2:
        return value.tolist()
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")
