"""Reads a batch's tasks: the rows of a table, the YAML files of a directory, or mappings in the batch file."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emloc_ray.config.reading import read_mapping
from emloc_ray.data.files import KINDS
from emloc_ray.data.reading import Row, read_rows, scan
from emloc_ray.errors import ConfigError, DataError
from emloc_ray.io.formats.yaml_text import read_yaml_value

_TEXTS = {"name", "base"}  # columns of a CSV file that stay text: 007 is no number


@dataclass(frozen=True)
class TaskRow:
    """A task's keys, nested or dotted; its file and row; the directory that its ``base`` is relative to."""

    values: dict[Any, Any]
    where: str
    folder: Path
    name: str | None = None


def read_task_rows(tasks: str | list[Any], batch: Path) -> tuple[list[TaskRow], list[str]]:
    """The tasks of a table, a directory or a list in the batch file, and the errors, each a sentence."""
    read = list(_listed(tasks, batch) if isinstance(tasks, list) else _read(Path(tasks)))
    return [row for row in read if isinstance(row, TaskRow)], [error for error in read if isinstance(error, str)]


def _listed(tasks: list[Any], batch: Path) -> Iterator[TaskRow | str]:
    for number, values in enumerate(tasks, 1):
        where = f"{batch}, task {number}"
        if isinstance(values, dict):
            yield TaskRow(values, where, batch.parent)
        else:
            yield f"{where}: {values!r} is no task: write a mapping of its keys, such as name and data.train.path."


def _read(path: Path) -> Iterator[TaskRow | str]:
    if path.is_dir():
        yield from _files(path)
    elif not path.is_file():
        yield f"tasks {path} does not exist: give a {_kinds()} file, or a directory of YAML files."
    elif path.suffix.lower() not in KINDS:
        yield f"tasks {path} is no table: give a {_kinds()} file, or a directory of YAML files."
    else:
        yield from _table(path)


def _kinds() -> str:
    return ", ".join(sorted(KINDS))


def _files(folder: Path) -> Iterator[TaskRow | str]:
    files = [f for f in sorted(folder.iterdir()) if f.suffix in (".yaml", ".yml") and not f.name.startswith(".")]
    if not files:
        yield f"tasks {folder} holds no YAML file: write one a task, such as {folder / 'NAME.yaml'}."
    for file in files:
        try:
            values = read_mapping(file, f"Task {file}", "write those that differ from the base")
            yield TaskRow(values, str(file), folder, file.stem)
        except ConfigError as error:
            yield str(error)


def _table(path: Path) -> Iterator[TaskRow | str]:
    try:
        source = scan(path)
        for number, row in read_rows(source, range(source.num_rows)):
            where = f"{path}, row {number + 1}"
            try:
                written = _parsed(row) if source.kind == "csv" else row
                yield TaskRow(_set_cells(written, has_null=source.kind != "parquet"), where, path.parent)
            except ConfigError as error:
                yield f"{where}: {error}"
    except DataError as error:
        yield str(error)
    except (ValueError, OverflowError) as error:  # such as times that Python's do not reach
        yield f"{path} holds what Python cannot ({' '.join(str(error).split())}): convert it."


def _set_cells(row: Row, has_null: bool) -> Row:
    """A row without its empty cells: blank texts, NaN and, unless ``has_null``, nulls: Parquet has no other cell that is not
    set, where a null in JSON or CSV was written to be one."""
    cells = {key: _set_cells(value, has_null) if isinstance(value, dict) else value for key, value in row.items()}
    unset: tuple[Any, ...] = () if has_null else (None, {})
    return {
        key: value
        for key, value in cells.items()
        if value not in unset and value == value and not (isinstance(value, str) and not value.strip())
    }


def _parsed(row: Row) -> Row:
    return {key: text.strip() if key in _TEXTS else _parse(key, text.strip()) for key, text in row.items()}


def _parse(key: str, text: str) -> Any:
    """A CSV cell; what is no YAML is text too."""
    if text.lower() in ("", "nan"):
        return ""
    try:
        return read_yaml_value(text)
    except ValueError as error:
        if text[0] in "[{\"'":
            raise ConfigError(f"{key} is {text!r}, which is not YAML: fix it.") from error
        return text  # such as the pattern *.jsonl
