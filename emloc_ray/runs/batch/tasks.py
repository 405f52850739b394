"""A batch file as tasks, each a whole :class:`RunConfig`: the base, the task's own keys, the grid, the command line.

Each of these overrides those before it. All is read and checked before anything starts, and every error is told at once;
what is wrong with many tasks in the same way is told once.
"""

from __future__ import annotations

import glob
import itertools
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from emloc_ray.runs.batch.config import BatchConfig, TaskKeys, deadline_text
from emloc_ray.runs.batch.grid import Point, joined_name, points, repeated
from emloc_ray.runs.batch.task_rows import TaskRow, read_task_rows
from emloc_ray.config.schema import RayConfig, RunConfig
from emloc_ray.config.reading import Keys, check, check_config, parse_config, put, read_mapping, read_override, read_values, settings, unknown_key
from emloc_ray.errors import ConfigError
from emloc_ray.io.runs.fingerprint import fingerprint
from emloc_ray.io.store.object_store import is_store_uri
from emloc_ray.config.passed import no_such_key

__all__ = ["Batch", "BatchConfig", "Task", "compose_batch", "read_batch"]

MAX_GRID_TASKS = 10_000
_FEW = 3  # tasks that are named beside an error they share
Override = tuple[Keys, Any, str]  # what put() takes


@dataclass(frozen=True)
class Task:
    """One task of a batch; ``where`` says the file and row, for messages."""

    name: str
    config: RunConfig
    priority: int = 0
    deadline: timedelta | datetime | None = None
    owner: str = ""
    where: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON, but for ``ray``, which is the batch's and may hold what no file is to; :meth:`from_dict` reads it, in
        any working directory."""
        told = None if self.deadline is None else deadline_text(self.deadline)
        config = anchored(self.config).model_dump(mode="json", exclude={"ray"})
        own = {"name": self.name, "priority": self.priority, "deadline": told, "owner": self.owner}
        return {**own, "config": config, "where": self.where}

    @property
    def digest(self) -> str:
        """Of all that is asked of it."""
        asked = {key: value for key, value in self.as_dict().items() if key != "where"}
        return fingerprint(asked)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], ray: RayConfig | None = None) -> Task:
        """A task from :meth:`as_dict` and the batch's ``ray``; raises ConfigError where it is no such thing."""
        where = str(values.get("where", ""))
        own = {key: value for key, value in values.items() if key not in ("config", "where")}
        keys, lines = check(TaskKeys, own)
        if keys is None:
            raise ConfigError("\n".join(f"{where or 'the task'}: {line}" for line in lines))
        config = parse_config(values.get("config") or {}, f"task {keys.name}")
        config = config.model_copy(update={"ray": ray or RayConfig()})
        return cls(keys.name, config, keys.priority, keys.deadline, keys.owner, where)


def anchored(config: RunConfig) -> RunConfig:
    """The config with its local paths made absolute, from this process's working directory."""
    values = config.model_dump(exclude_unset=True)
    source = values["model"]["source"]
    if os.path.exists(os.path.expanduser(source)):  # else it is on the hub, or in a package
        values["model"]["source"] = _absolute(source)
    for split in values["data"].values():
        if isinstance(split, dict):
            paths = split["path"]
            split["path"] = _absolute(paths) if isinstance(paths, str) else [_absolute(path) for path in paths]
    for holder, key in (
        (values, "run_dir"),
        (values.get("finetune"), "deepspeed"),
        (values.get("evaluation"), "upper_bound"),
    ):
        if holder and holder.get(key):
            holder[key] = _absolute(holder[key])
    return RunConfig.model_validate(values)


def _absolute(place: str) -> str:
    """A local path or glob from the root on; what is no local path as it is."""
    if is_store_uri(place) or place.startswith("hf:"):
        return place
    path = os.path.expanduser(place.removeprefix("file://"))
    here = os.getcwd()
    return os.path.join(here if os.path.exists(path) or not glob.has_magic(path) else glob.escape(here), path)


@dataclass(frozen=True)
class Batch:
    """What a batch file says: its tasks with their whole configs, and the Ray that serves them all."""

    config: BatchConfig
    tasks: tuple[Task, ...]
    ray: RayConfig


def read_batch(path: str | Path, overrides: Sequence[str] = ()) -> Batch:
    """Reads a batch file; of the ``key=value`` overrides, those of its own keys are for it, all others for every task.

    Paths of ``base`` and ``tasks`` go from the file that says them; on the command line, from the working directory.

    Raises:
        ConfigError: with every error of all tasks at once, one sentence a line.
    """
    path = Path(path)
    return compose_batch(
        read_mapping(path, f"Batch {path}", "it needs at least run_dir, and tasks or grid"), path, overrides
    )


def compose_batch(values: dict[str, Any], path: Path, overrides: Sequence[str] = ()) -> Batch:
    """As :func:`read_batch`, of what the file at ``path`` holds, or of what was made of it."""
    values = dict(values)
    where = f"{path} and its overrides" if overrides else str(path)
    for key in ("base", "tasks"):
        if isinstance(values.get(key), str) and values[key].strip():
            values[key] = str(path.parent / os.path.expanduser(values[key]))
    of_tasks, lines = _apply(values, overrides)
    config, usable, wrong = _check_batch(values)
    lines += [f"{where}: {line}" for line in wrong]
    if config is None:
        raise ConfigError("\n".join(lines))
    grid, wrong = _check_grid(config.grid)
    lines += [f"{where}: {line}" for line in wrong]
    rows: list[TaskRow] = []
    if config.tasks is not None:
        rows, wrong = read_task_rows(config.tasks, path) if "tasks" in usable else ([], [])
        lines += wrong
    count = (1 if config.tasks is None else len(rows)) * math.prod(map(len, grid.values()))
    if grid and count > MAX_GRID_TASKS:
        lines.append(f"{where}: its grid makes {count:,} tasks, over {MAX_GRID_TASKS:,}: take values out.")
        raise ConfigError("\n".join(lines))
    found = points(grid)
    if config.tasks is None:
        rows = [TaskRow(p.values, f"{path}, grid", path.parent, joined_name("", p.name)) for p in found if grid]
        found = [Point({})]
    composer = _Composer(config, of_tasks, path, where, len(found))
    tasks = [composer.task(row, point) for row, point in itertools.product(rows, found)]
    lines += composer.told()
    if lines:
        raise ConfigError("\n".join(dict.fromkeys(lines)))
    whole = tuple(task for task in tasks if task is not None)
    return Batch(config, whole, whole[0].config.ray)


def _apply(values: dict[str, Any], overrides: Sequence[str]) -> tuple[list[Override], list[str]]:
    """Applies the overrides of the batch's own keys; gives those that are for the tasks, and what is wrong."""
    of_tasks: list[Override] = []
    lines = []
    for text in overrides:
        try:
            keys, value = read_override(text)
            if keys[0] in TaskKeys.model_fields.keys() - BatchConfig.model_fields.keys():
                raise ConfigError(
                    f"Override {text!r} is of a key that each task has for itself: set it in tasks or grid."
                )
            if keys[0] not in BatchConfig.model_fields:
                of_tasks.append((keys, value, f"Override {text!r}"))
                continue
            if keys[0] == "grid" and len(keys) > 1:
                keys = ("grid", ".".join(keys[1:]))
            put(values, keys, value, f"Override {text!r}")
        except ConfigError as error:
            lines.append(str(error))
    return of_tasks, lines


def _check_batch(values: dict[str, Any]) -> tuple[BatchConfig | None, set[str], list[str]]:
    """The batch's config, without the keys whose values are wrong; which are right; and what is wrong with the others.

    None where tasks cannot be told anything without them.
    """
    values = {key: value for key, value in values.items() if value is not None}
    config, lines = check(BatchConfig, values)
    if config is not None:
        return config, set(values), []
    filled = {"run_dir": ".", "tasks": "left out"}
    right = {key: value for key, value in values.items() if check(BatchConfig, {**filled, key: value})[0]}
    if "base" in values.keys() - right.keys() or not {"tasks", "grid"} & right.keys():
        return None, set(), lines
    if "tasks" not in values:
        del filled["tasks"]
    return BatchConfig.model_validate({**filled, **right}), set(right), lines


def _check_grid(grid: dict[str, list[Any]]) -> tuple[dict[str, list[Any]], list[str]]:
    """The grid without the keys that are wrong, and what is wrong with them."""
    lines = {}
    for key, values in grid.items():
        twice = repeated(values)
        if key == "name":
            lines[key] = "grid.name: the grid makes names itself: take it out."
        elif (reserved := _of_the_batch(tuple(key.split(".")))) is not None:
            lines[key] = f"grid.{reserved}"
        elif key not in TaskKeys.model_fields and (unknown := unknown_key(key)) is not None:
            lines[key] = f"grid.{unknown}"
        elif twice:
            lines[key] = f"grid.{key} holds {', '.join(twice)} twice: each once makes the same tasks."
    return {key: values for key, values in grid.items() if key not in lines}, list(lines.values())


@dataclass(frozen=True)
class _Base:
    """A base's keys; what is wrong with them under the command line's; and ray as these say. ``unread``: why there are none."""

    where: str
    values: dict[str, Any] = field(default_factory=dict)
    lines: tuple[str, ...] = ()
    ray: Any = None
    unread: str = ""


@dataclass(frozen=True)
class _Culprit:
    """A task with which something is wrong: its base, the row it is from and that row's name, and its own."""

    base: str | None
    where: str
    row_name: str
    name: str


class _Composer:
    """Puts tasks together, each base read once, and gathers what is wrong with them, by the sentence."""

    def __init__(self, config: BatchConfig, overrides: list[Override], path: Path, where: str, num_points: int) -> None:
        self.config, self.overrides, self.path, self.where = config, overrides, path, where
        self.num_points = num_points  # of the grid
        self.bases: dict[str | None, _Base] = {}
        self.counts: Counter[str | None] = Counter()  # tasks, by base
        self.names: dict[str, dict[str, None]] = {}  # where each is written
        self.wrong: dict[str, list[_Culprit]] = {}  # by sentence

    def task(self, row: TaskRow, point: Point) -> Task | None:
        """One task, or None where something is wrong with it."""
        own = {"name": row.name, **row.values, **point.values}
        keys, lines = check(TaskKeys, {key: own[key] for key in TaskKeys.model_fields if own.get(key) is not None})
        given = str(own["base"]).strip() if isinstance(own.get("base"), str | int | float) else ""
        folder = self.path.parent if "base" in point.values else row.folder
        path = str(folder / os.path.expanduser(given)) if given else self.config.base
        self.counts[path] += 1
        base = self._base(path)
        values, wrong = self._values(row, point, base)
        lines += wrong
        row_name = "" if own["name"] is None else str(own["name"]).strip()
        name = joined_name(row_name, point.name)
        config = None
        if not base.unread:
            config, wrong = check_config({**values, "run_dir": self.config.task_dir(name)})
            lines += wrong
        elif given:
            lines.append(base.unread)
        self.names.setdefault(row_name, {})[row.where] = None
        for line in lines:
            self.wrong.setdefault(line, []).append(_Culprit(path, row.where, row_name, name))
        if keys is None or config is None or lines:
            return None
        return Task(name, config, keys.priority, keys.deadline, keys.owner, row.where)

    def told(self) -> list[str]:
        """What is wrong, each once: with the base where all of its tasks have it from there, else with the tasks."""
        lines = [self._base(self.config.base).unread] if self._base(self.config.base).unread else []
        for name, places in self.names.items():
            if name and len(places) > 1:
                lines.append(f"the name {name!r} is that of {_some(list(places))}: give each task its own.")
        for sentence, found in self.wrong.items():
            rest = []
            for path in dict.fromkeys(task.base for task in found):
                those = [task for task in found if task.base == path]
                if sentence in self.bases[path].lines and len(those) == self.counts[path]:
                    lines.append(f"{self.bases[path].where}: {sentence}")
                else:
                    rest += those
            if len(rest) == self.counts.total() > _FEW:
                lines.append(f"all {len(rest):,} tasks: {sentence}")
            elif rest:
                lines.append(f"{_some(self._labels(rest))}: {sentence}")
        return lines

    def _labels(self, found: list[_Culprit]) -> list[str]:
        """Names and places; a row that has it at all points of the grid stands once, by its own name."""
        of_row = Counter(task.where for task in found)
        names = [(t.row_name if of_row[t.where] == self.num_points else t.name, t.where) for t in found]
        return [f"task {name} ({where})" if name else where for name, where in dict.fromkeys(names)]

    def _base(self, path: str | None) -> _Base:
        if path not in self.bases:
            self.bases[path] = self._read_base(path)
        return self.bases[path]

    def _read_base(self, path: str | None) -> _Base:
        where = self.where if path is None else f"{path} and its overrides" if self.overrides else path
        try:
            values = {} if path is None else read_values(Path(path), (self.path,))
        except ConfigError as error:
            return _Base(where, unread=str(error))
        given = {**values, "run_dir": self.config.run_dir}
        lines = [line for override in self.overrides for line in _put(given, *override)]
        return _Base(where, values, (*lines, *check_config(given)[1]), given.get("ray"))

    def _values(self, row: TaskRow, point: Point, base: _Base) -> tuple[dict[str, Any], list[str]]:
        """The task's whole config, unchecked, and which of its keys are none of its own."""
        values, lines = dict(base.values), []
        shared = self._base(self.config.base)
        if values.get("ray") is None:
            values["ray"] = shared.values.get("ray")
        elif base.ray != shared.ray and not shared.unread:
            lines.append(
                "its base sets ray otherwise than the batch's base: take it out there, or set it whole on the command"
                " line, such as ray={address: auto}."
            )
        for source in (row.values, point.values):
            seen: set[Keys] = set()
            own = {key: value for key, value in source.items() if key not in TaskKeys.model_fields}
            for keys, value in settings(own, dotted=True):
                if keys in seen:
                    lines.append(f"{_dotted(keys)} is set twice, nested and dotted: keep one.")
                elif (wrong := _of_the_batch(keys) or _of_nobody(keys)) is not None:
                    lines.append(wrong)
                else:
                    lines += _put(values, keys, value, _dotted(keys))
                seen.add(keys)
        for override in self.overrides:
            lines += _put(values, *override)
        return values, lines


def _of_the_batch(keys: Keys) -> str | None:
    """Why a task or a grid may not set a key; None where it may."""
    if keys[0] == "run_dir":
        return "run_dir is the batch's, each task has its own below it: take it out."
    if keys[0] == "ray":
        return f"{_dotted(keys)} is the batch's, one cluster serves it: set it in its base or on the command line."
    return None


def _of_nobody(keys: Keys) -> str | None:
    if keys[0] in RunConfig.model_fields:
        return None
    return f"{no_such_key(_dotted(keys), str(keys[0]), {*RunConfig.model_fields, *TaskKeys.model_fields})}."


def _put(values: dict[str, Any], keys: Keys, value: Any, what: str) -> list[str]:
    try:
        put(values, keys, value, what)
    except ConfigError as error:
        return [str(error)]
    return []


def _some(labels: list[str]) -> str:
    more = f" and {len(labels) - _FEW:,} more" if len(labels) > _FEW else ""
    return ", ".join(labels[:_FEW]) + more


def _dotted(keys: Keys) -> str:
    return ".".join(map(str, keys))
