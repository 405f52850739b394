"""Reads a batch file as tasks, each a whole :class:`RunConfig`.

A task's keys override its base, the grid overrides both, the command line overrides all. All errors come at once, before
anything starts, and one that many tasks share comes once.
"""

import itertools
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emloc_ray.config.passed import no_such_key
from emloc_ray.config.reading import (
    Keys,
    check,
    check_config,
    put,
    read_mapping,
    read_override,
    read_values,
    settings,
    unknown_key,
    with_variables,
)
from emloc_ray.config.schema import RayConfig, RunConfig
from emloc_ray.errors import ConfigError
from emloc_ray.runs.batch.config import REMOVED_BATCH_KEYS, BatchConfig, TaskKeys
from emloc_ray.runs.batch.grid import Point, joined_name, points, repeated
from emloc_ray.runs.batch.task_rows import TaskRow, read_task_rows
from emloc_ray.text import listed

MAX_GRID_TASKS = 10_000
_FEW = 3  # tasks that an error names
Override = tuple[Keys, Any, str]  # what put() takes


@dataclass(frozen=True)
class Task:
    """One task of a batch; ``where`` is its file and row, for messages."""

    name: str
    config: RunConfig
    priority: int = 0
    where: str = ""


@dataclass(frozen=True)
class Batch:
    """A batch file's own keys, its tasks with their whole configs, and the Ray that serves them all."""

    config: BatchConfig
    tasks: tuple[Task, ...]
    ray: RayConfig


def read_batch(path: str | Path, overrides: Sequence[str] = ()) -> Batch:
    """Reads a batch file; a ``key=value`` override sets the batch's own key, or that key of every task.

    Paths of ``base`` and ``tasks`` are relative to their file; on the command line, to the working directory. Raises
    ConfigError with every error of all tasks at once, one sentence a line.
    """
    path = Path(path)
    values = read_mapping(path, f"Batch {path}", "it needs at least run_dir, and tasks or grid")
    return compose_batch(values, path, overrides)


def compose_batch(values: dict[str, Any], path: Path, overrides: Sequence[str] = ()) -> Batch:
    """As :func:`read_batch`, from ``values`` that were read from the file at ``path`` or derived from it."""
    where = f"{path} and its overrides" if overrides else str(path)
    values, wrong = with_variables(values)
    if wrong:
        raise ConfigError("\n".join(f"{where}: {line}" for line in wrong))
    for key in ("base", "tasks"):
        if isinstance(values.get(key), str) and values[key].strip():
            values[key] = str(path.parent / os.path.expanduser(values[key]))
    of_tasks, errors = _apply(values, overrides)
    config, reads_tasks = _batch_config(values, where, errors)
    rows, grid_points = _rows_and_points(config, reads_tasks, path, where, errors)
    composer = _Composer(config, of_tasks, path, len(grid_points))
    tasks = [composer.task(row, point) for row, point in itertools.product(rows, grid_points)]
    errors += composer.error_lines()
    if errors:
        raise ConfigError("\n".join(dict.fromkeys(errors)))
    whole = tuple(task for task in tasks if task is not None)
    return Batch(config, whole, whole[0].config.ray)


def _batch_config(values: dict[str, Any], where: str, errors: list[str]) -> tuple[BatchConfig, bool]:
    """The batch's config without its wrong keys, and whether its ``tasks`` are right. Adds to ``errors``; raises them where
    tasks cannot be read without the wrong keys."""
    of_runs = [key for key in values if key in RunConfig.model_fields.keys() - BatchConfig.model_fields.keys()]
    config, valid, config_errors = _check_batch({key: value for key, value in values.items() if key not in of_runs})
    if of_runs:
        names = listed(of_runs, 9)
        moved = f"what all tasks begin with is a config of its own: move {names} there, and name its file as base."
        config_errors = [moved, *config_errors]
    errors += [f"{where}: {line}" for line in config_errors]
    if config is None or of_runs:
        raise ConfigError("\n".join(errors))
    return config, "tasks" in valid


def _rows_and_points(
    config: BatchConfig, reads_tasks: bool, path: Path, where: str, errors: list[str]
) -> tuple[list[TaskRow], list[Point]]:
    """The rows of tasks, and the points of the grid at which each is run: where there is no file of tasks, each point is a row.
    Adds to ``errors``; raises them where the grid makes too many tasks."""
    grid_errors = {key: error for key, values in config.grid.items() if (error := _grid_error(key, values)) is not None}
    errors += [f"{where}: {line}" for line in grid_errors.values()]
    grid = {key: values for key, values in config.grid.items() if key not in grid_errors}
    rows: list[TaskRow] = []
    if config.tasks is not None and reads_tasks:
        rows, row_errors = read_task_rows(config.tasks, path)
        errors += row_errors
    count = (1 if config.tasks is None else len(rows)) * math.prod(map(len, grid.values()))
    if grid and count > MAX_GRID_TASKS:
        errors.append(f"{where}: its grid makes {count:,} tasks, over {MAX_GRID_TASKS:,}: take values out.")
        raise ConfigError("\n".join(errors))
    grid_points = points(grid)
    if config.tasks is not None:
        return rows, grid_points
    named = [TaskRow(p.values, f"{path}, grid", path.parent, joined_name("", p.name)) for p in grid_points if grid]
    return named, [Point({})]


def _apply(values: dict[str, Any], overrides: Sequence[str]) -> tuple[list[Override], list[str]]:
    """Applies the overrides of the batch's own keys; returns those of the tasks, and the errors."""
    of_tasks: list[Override] = []
    errors = []
    for text in overrides:
        try:
            keys, value = read_override(text)
            if keys[0] in REMOVED_BATCH_KEYS:
                raise ConfigError(f"Override {text!r}: {REMOVED_BATCH_KEYS[keys[0]]}")
            if keys[0] in TaskKeys.model_fields.keys() - BatchConfig.model_fields.keys():
                raise ConfigError(
                    f"Override {text!r} sets a key that each task has for itself: set it in tasks or grid."
                )
            if keys[0] not in BatchConfig.model_fields:
                of_tasks.append((keys, value, f"Override {_dotted(keys)}"))
                continue
            if keys[0] == "grid" and len(keys) > 1:
                keys = ("grid", ".".join(keys[1:]))
            put(values, keys, value, f"Override {_dotted(keys)}")
        except ConfigError as error:
            errors.append(str(error))
    return of_tasks, errors


def _check_batch(values: dict[str, Any]) -> tuple[BatchConfig | None, set[str], list[str]]:
    """The batch's config without its wrong keys, the right keys, and the errors; None where tasks need the wrong keys."""
    values = {key: value for key, value in values.items() if value is not None}
    config, errors = check(BatchConfig, values)
    if config is not None:
        return config, set(values), []
    filled = {"run_dir": ".", "tasks": "left out"}
    right = {key: value for key, value in values.items() if check(BatchConfig, {**filled, key: value})[0]}
    if "base" in values.keys() - right.keys() or not {"tasks", "grid"} & right.keys():
        return None, set(), errors
    if "tasks" not in values:
        del filled["tasks"]
    return BatchConfig.model_validate({**filled, **right}), set(right), errors


def _grid_error(key: str, values: list[Any]) -> str | None:
    """What is wrong with a key of the grid; None where nothing is."""
    if key == "name":
        return "grid.name: the grid makes names itself: take it out."
    error = _refused(tuple(key.split(".")))
    if error is None and key not in TaskKeys.model_fields:
        error = unknown_key(key)
    if error is not None:
        return f"grid.{error}"
    duplicates = repeated(values)
    return f"grid.{key} holds {', '.join(duplicates)} twice: each once makes the same tasks." if duplicates else None


class _Composer:
    """Puts tasks together, reads each base once, and gathers the errors by their sentence."""

    def __init__(self, config: BatchConfig, overrides: list[Override], path: Path, num_points: int) -> None:
        self.config, self.overrides, self.path = config, overrides, path
        self.num_points = num_points  # of the grid
        self.num_tasks = 0
        self.bases: dict[str | None, tuple[dict[str, Any], str]] = {}  # by path: its keys, and why there are none
        self.places: dict[str, dict[str, None]] = {}  # by the name of a row
        self.wrong: dict[str, list[tuple[str, str, str]]] = {}  # by sentence: the row's place and name, the task's name

    def task(self, row: TaskRow, point: Point) -> Task | None:
        """One task, or None where it has an error."""
        self.num_tasks += 1
        own = {"name": row.name, **row.values, **point.values}
        keys, errors = check(TaskKeys, {key: own[key] for key in TaskKeys.model_fields if own.get(key) is not None})
        given = str(own["base"]).strip() if isinstance(own.get("base"), str | int | float) else ""
        folder = self.path.parent if "base" in point.values else row.folder
        base, unread = self._base(str(folder / os.path.expanduser(given)) if given else self.config.base)
        values, wrong = self._values(row, point, base, unread)
        row_name = "" if own["name"] is None else str(own["name"]).strip()
        name = joined_name(row_name, point.name)
        config, errors = None, errors + wrong
        if not unread:
            config, wrong = check_config({**values, "run_dir": self.config.task_dir(name)})
            errors += wrong
        elif given:
            errors.append(unread)
        self.places.setdefault(row_name, {})[row.where] = None
        for error in errors:
            self.wrong.setdefault(error, []).append((row.where, row_name, name))
        if keys is None or config is None or errors:
            return None
        return Task(name, config, keys.priority, row.where)

    def error_lines(self) -> list[str]:
        """Each error once, with the tasks that have it."""
        unread = self._base(self.config.base)[1]
        lines = [unread] if unread else []
        for name, places in self.places.items():
            if name and len(places) > 1:
                lines.append(f"the name {name!r} is that of {listed(list(places), _FEW)}: give each task its own.")
        for sentence, tasks in self.wrong.items():
            everyone = len(tasks) == self.num_tasks > _FEW
            lines.append(
                f"{f'all {len(tasks):,} tasks' if everyone else listed(self._labels(tasks), _FEW)}: {sentence}"
            )
        return lines

    def _labels(self, tasks: list[tuple[str, str, str]]) -> list[str]:
        """Names and places; a row with the error at every point of the grid comes once, by its own name."""
        per_row = Counter(where for where, *_ in tasks)
        names = [(row_name if per_row[where] == self.num_points else name, where) for where, row_name, name in tasks]
        return [f"task {name} ({where})" if name else where for name, where in dict.fromkeys(names)]

    def _base(self, path: str | None) -> tuple[dict[str, Any], str]:
        if path not in self.bases:
            try:
                self.bases[path] = {} if path is None else read_values(Path(path), (self.path,)), ""
            except ConfigError as error:
                self.bases[path] = {}, str(error)
        return self.bases[path]

    def _values(
        self, row: TaskRow, point: Point, base: dict[str, Any], unread: str
    ) -> tuple[dict[str, Any], list[str]]:
        """The task's whole config, unchecked, and the errors in its own keys."""
        values, errors = dict(base), []
        shared, shared_unread = self._base(self.config.base)
        shared = dict(shared)
        if values.get("ray") is None:
            values["ray"] = shared.get("ray")
        for source in (row.values, point.values):
            seen: set[Keys] = set()
            own = {key: value for key, value in source.items() if key not in TaskKeys.model_fields}
            for keys, value in settings(own, dotted=True):
                if keys in seen:
                    errors.append(f"{_dotted(keys)} is set twice, nested and dotted: keep one.")
                elif (wrong := _refused(keys) or _unknown(keys)) is not None:
                    errors.append(wrong)
                else:
                    errors += _put(values, keys, value, _dotted(keys))
                seen.add(keys)
        for override in self.overrides:
            _put(shared, *override)
            errors += _put(values, *override)
        if not unread and not shared_unread and values.get("ray") != shared.get("ray"):
            errors.append(
                "its base has another ray section than the batch's base: take it out there, or set it whole on the command"
                " line, such as ray={address: auto}."
            )
        return values, errors


def _refused(keys: Keys) -> str | None:
    """Why a task or a grid must not set a key; None where it may."""
    if keys[0] == "run_dir":
        return "run_dir is the batch's, each task has its own below it: take it out."
    if keys[0] == "ray":
        return f"{_dotted(keys)} is the batch's, one cluster serves it: set it in its base or on the command line."
    return REMOVED_BATCH_KEYS.get(keys[0])


def _unknown(keys: Keys) -> str | None:
    if keys[0] in RunConfig.model_fields:
        return None
    return f"{no_such_key(_dotted(keys), str(keys[0]), {*RunConfig.model_fields, *TaskKeys.model_fields})}."


def _put(values: dict[str, Any], keys: Keys, value: Any, what: str) -> list[str]:
    """As :func:`put`; returns the error."""
    try:
        put(values, keys, value, what)
    except ConfigError as error:
        return [str(error)]
    return []


def _dotted(keys: Keys) -> str:
    return ".".join(map(str, keys))
