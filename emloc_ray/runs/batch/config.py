"""The keys of a batch file, and a task's own keys beside a config's."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field, field_validator, model_validator

from emloc_ray.config.base import Section, Size
from emloc_ray.io.store.places import below
from emloc_ray.runs.batch.grid import MAX_NAME, SAFE_NAME

MAX_CONCURRENT = 128
REMOVED_BATCH_KEYS = {
    "deadline": "deadline was removed: give what must end first a higher priority.",
    "owner": "owner was removed: give each team a Kueue queue with a quota, see cluster/README.md.",
}


class LimitsConfig(Section):
    """What the batch may hold of the cluster at once."""

    cpus: float | None = Field(None, gt=0)
    gpus: float | None = Field(None, ge=0)
    memory: Size | None = Field(None, description="such as 512GiB")


class CacheConfig(Section):
    """Where the batch keeps what tasks share."""

    path: str = Field("", description="run_dir/cache where left out")
    max_size: Size | None = Field(None, description="such as 200GiB")


class BatchConfig(Section):
    """A batch file: many tasks from one base config."""

    base: str | None = Field(None, min_length=1, description="the config that all tasks begin with")
    run_dir: str = Field(min_length=1, description="each task runs in run_dir/tasks/NAME")
    tasks: str | list[Any] | None = Field(None, description="a table, a directory of YAML files, or mappings")
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict, description="key: values")
    max_concurrent: int | None = Field(
        None, ge=1, le=MAX_CONCURRENT, description="tasks that run at once, each in a thread"
    )
    limits: LimitsConfig = LimitsConfig()
    cache: CacheConfig = CacheConfig()

    @field_validator("tasks", mode="before")
    @classmethod
    def _check_tasks(cls, tasks: Any) -> Any:
        if not isinstance(tasks, str | list):
            raise ValueError(f"tasks is {tasks!r}: give the path of a table or a directory, or a list of mappings")
        if not tasks or (isinstance(tasks, str) and not tasks.strip()):
            raise ValueError("tasks is empty: give at least one, or leave it out for a grid alone")
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

    @property
    def has_own_cache(self) -> bool:
        """Whether its cache lies in its own directory."""
        return self.cache.path == below(self.run_dir, "cache")

    def task_dir(self, name: str) -> str:
        """The run directory of a task."""
        return below(self.run_dir, "tasks", name)


class TaskKeys(Section):
    """A task's own keys beside a config's."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    name: str
    base: str | None = None
    priority: int = Field(0, description="higher goes first")

    @field_validator("name")
    @classmethod
    def _safe_name(cls, name: str) -> str:
        if not SAFE_NAME.fullmatch(name.strip()):
            raise ValueError(
                f"the name {name!r} is no safe directory name: use letters a to z, digits and . _ = -, a letter or digit"
                f" first, {MAX_NAME} at most, and not store= first"
            )
        return name.strip()
