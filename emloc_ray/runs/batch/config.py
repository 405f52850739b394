"""The keys of a batch file, and those of a task that are no config's."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any

from pydantic import ConfigDict, Field, field_validator, model_validator

from emloc_ray.runs.batch.grid import MAX_NAME, SAFE_NAME
from emloc_ray.config.base import Section, Size
from emloc_ray.io.store.object_store import below

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h|d)")
_MICROSECONDS = {"s": 10**6, "min": 60 * 10**6, "h": 3600 * 10**6, "d": 86400 * 10**6}


class LimitsConfig(Section):
    """What the batch may hold of the cluster at once."""

    cpus: float | None = Field(None, gt=0, allow_inf_nan=False)
    gpus: float | None = Field(None, ge=0, allow_inf_nan=False)
    memory: Size | None = Field(None, description="such as 512GiB")


class CacheConfig(Section):
    """Where what tasks share is kept."""

    path: str = Field("", description="run_dir/cache where left out")
    max_size: Size | None = Field(None, description="such as 200GiB")


class BatchConfig(Section):
    """A batch file: many tasks from one base config."""

    base: str | None = Field(None, min_length=1, description="the config that all tasks begin with")
    run_dir: str = Field(min_length=1, description="each task runs in run_dir/tasks/NAME")
    tasks: str | list[Any] | None = Field(None, description="a table, a directory of YAML files, or mappings")
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict, description="key: values")
    max_concurrent: int | None = Field(None, ge=1, description="tasks under way at once")
    limits: LimitsConfig = LimitsConfig()
    cache: CacheConfig = CacheConfig()

    @field_validator("tasks", mode="before")
    @classmethod
    def _some_tasks(cls, tasks: Any) -> Any:
        if not isinstance(tasks, str | list):
            raise ValueError(f"tasks is {tasks!r}: give the path of a table or a directory, or a list of mappings")
        if not tasks or (isinstance(tasks, str) and not tasks.strip()):
            raise ValueError("tasks is empty: give some, or leave it out for a grid alone")
        return tasks

    @model_validator(mode="before")
    @classmethod
    def _cache_beside_the_tasks(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("run_dir"), str):
            return values
        cache = values.get("cache", {})
        if not isinstance(cache, dict) or cache.get("path"):
            return values
        return {**values, "cache": {**cache, "path": below(values["run_dir"], "cache")}}

    @model_validator(mode="after")
    def _has_work(self) -> BatchConfig:
        if self.tasks is None and not self.grid:
            raise ValueError("it names no tasks: set tasks, or grid, or both")
        return self

    def task_dir(self, name: str) -> str:
        """The run directory of a task."""
        return below(self.run_dir, "tasks", name)


def parse_deadline(value: Any) -> timedelta | datetime | None:
    """A duration from when the batch is run, or the task handed to it, such as 90s, 30min, 2h or 1d; or a time, one without
    time zone being local.

    Raises:
        ValueError: where it is neither.
    """
    try:
        if isinstance(value, str) and (match := _DURATION.fullmatch(value.strip())):
            value = timedelta(microseconds=int(Decimal(match[1]) * _MICROSECONDS[match[2]]))
        elif isinstance(value, str) and ":" in value:
            value = datetime.fromisoformat(re.sub("[zZ]$", "+00:00", value.strip()))  # Python 3.10 knows no Z
        if value is None or (isinstance(value, timedelta) and value > timedelta(0)):
            return value
        if isinstance(value, datetime):  # a plain one: pandas has its own
            plain = datetime.combine(value.date(), value.timetz())
            return plain if plain.tzinfo else plain.astimezone()
    except (ValueError, OverflowError, OSError):
        pass
    raise ValueError(
        f"deadline is {value!r}: give a duration above 0 from the batch's start, such as 90s, 30min, 2h or 1d, or a time,"
        " such as 2030-01-31T18:00"
    )


def deadline_text(deadline: timedelta | datetime) -> str:
    """What :func:`parse_deadline` reads as the same deadline."""
    if isinstance(deadline, datetime):
        return deadline.isoformat()
    return f"{Decimal(deadline // timedelta(microseconds=1)) / 10**6:f}s"


class TaskKeys(Section):
    """The keys of a task that are no config's."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    name: str
    base: str | None = None
    priority: int = Field(0, description="higher goes first")
    deadline: timedelta | datetime | None = Field(None, description="a time, or a duration from when the batch is run")
    owner: str = ""

    @field_validator("name")
    @classmethod
    def _safe_name(cls, name: str) -> str:
        if not SAFE_NAME.fullmatch(name.strip()):
            raise ValueError(
                f"the name {name!r} is no safe directory name: use letters a to z, digits and . _ = -, a letter or digit"
                f" first, {MAX_NAME} at most, and not store= first"
            )
        return name.strip()

    @field_validator("deadline", mode="plain")
    @classmethod
    def _deadline(cls, value: Any) -> timedelta | datetime | None:
        return parse_deadline(value)
