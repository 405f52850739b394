"""The Python interface: a run that keeps its page, its plan, its checks, and what came out."""

import dataclasses
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emloc_ray.config.reading import load_config, parse_config, without_paths
from emloc_ray.config.schema import DataConfig, RunConfig, SplitConfig
from emloc_ray.data.memory_rows import check_one_split, is_place, write_rows
from emloc_ray.errors import ConfigError
from emloc_ray.io.runs.cache import ArtifactCache
from emloc_ray.io.store.places import below
from emloc_ray.planning.batches import shrink_batches, without_budget
from emloc_ray.planning.machine import measured_speeds, with_disk_of
from emloc_ray.planning.memory import MemoryModel
from emloc_ray.planning.plan import Plan, make_plan, within_budget
from emloc_ray.planning.prepared import Prepared, prepare
from emloc_ray.runs import run as pipeline
from emloc_ray.runs.changes import Accept
from emloc_ray.runs.reporter import Reporter, Reporters
from emloc_ray.stages.order import STEPS
from emloc_ray.ui.config_verbs import validation_lines
from emloc_ray.ui.page import PageReporter

Config = RunConfig | Mapping[str, Any] | str | Path
"""A config, its nested values, or the path of its YAML file."""
_SPLITS = [name for name, field in DataConfig.model_fields.items() if field.annotation == SplitConfig | None]


class RunResult(dict[str, Any]):
    """What came out of a run: the content of metrics.json, and where the artifacts are."""

    def __init__(self, metrics: Mapping[str, Any], run_dir: str) -> None:
        super().__init__(metrics)
        self.run_dir = run_dir

    @property
    def metrics(self) -> dict[str, Any]:
        """The content of metrics.json."""
        return dict(self)

    @property
    def adapter(self) -> str | None:
        """The folder of the adapter for the original (PEFT); None where the run has not come so far."""
        return self._place("adapter_finished") or self._place("adapter")

    @property
    def merged(self) -> str | None:
        """The folder of the merged model (transformers); None where there is none."""
        return self._place("merged")

    @property
    def report(self) -> str:
        """The run's page."""
        return below(self.run_dir, "report.html")

    def _place(self, folder: str) -> str | None:
        return below(self.run_dir, folder) if folder in self.get("disk_bytes", {}) else None

    def __repr__(self) -> str:
        losses = {name: values["loss"] for name, values in self.get("evaluation", {}).items() if "loss" in values}
        said = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        return f"<run in {self.run_dir}{f'; held-out loss: {said}' if said else ''}>"


def run(
    config: Config | None = None,
    *,
    train: Any = None,
    eval: Any = None,
    begin: str | None = None,
    until: str = "evaluate",
    fresh: bool = False,
    reporter: Reporter | None = None,
    prepared: Prepared | None = None,
    cache: ArtifactCache | None = None,
    accept_versions: bool = False,
    accept_changes: Accept = False,
    **keys: Any,
) -> RunResult:
    """Runs the pipeline up to ``until`` and keeps ``report.html``; skips finished stages whose inputs are unchanged.

    ``config`` is a config, its values or its file; ``keys`` are a config's own, over its:
    ``run(model="Qwen/Qwen3-0.6B", train=rows, memory_budget="24GiB", finetune={"max_steps": 50})``. ``train`` and ``eval`` are
    paths, lists of dicts, data frames or data sets; ``run_dir`` is ``runs/MODEL`` where it is left out.

    ``begin`` redoes all from this stage on; ``fresh`` deletes what an earlier run left. ``reporter`` hears how the run goes; in
    a notebook its progress is shown where there is none. ``prepared`` is the checked config, where there is one. Runs with one
    ``cache`` share what they make from equal inputs. ``accept_versions`` takes what was finished with other versions of
    emloc_ray or its libraries as it is. ``accept_changes`` redoes and removes what is finished where the config or files have
    changed. Returns the content of metrics.json, with the places of what was made.

    Raises ConfigError before any stage starts, where the config or the data is wrong, and where what is finished is of other
    versions or would be redone or removed unasked. By then nothing is written but the rows that were given, in
    ``RUN_DIR.rows``, and not even these where a key is wrong. Raises EmlocError where a stage failed: finished stages stay, and
    the same call continues from them, without ``begin`` and ``fresh``.
    """
    whole = as_config(config, train, eval, keys)
    prepared = prepared or prepare(whole)
    metrics = pipeline.run(
        whole,
        begin=begin,
        until=until,
        fresh=fresh,
        reporter=Reporters(reporter or _default_reporter(), PageReporter()),
        prepared=prepared,
        cache=cache,
        accept_versions=accept_versions,
        accept_changes=accept_changes,
    )
    return RunResult(metrics, prepared.run.place)


def plan(
    config: Config | None = None,
    *,
    train: Any = None,
    eval: Any = None,
    memory_budget: str | int | None = None,
    **keys: Any,
) -> Plan:
    """Plans a run without its weights: a directory with a config.json and an index is enough. Takes what :func:`run` takes.

    Within a ``memory_budget`` that the config names its ``choice`` has what else can be trained on, and which of it is
    recommended. With a ``memory_budget`` given here, such as ``"24GiB"``, the plan is that of the recommended settings
    (``choice.overrides``). Raises ConfigError with every error of the config at once; or where nothing fits.
    """
    whole = as_config(config, train, eval, keys)
    if memory_budget is not None:
        whole = parse_config({**whole.model_dump(mode="json", exclude_unset=True), "memory_budget": memory_budget})
    asked, choice = prepare(whole, needs_weights=False), None
    prepared = shrink_batches(asked)
    files = sorted(prepared.source.directory.glob("*.safetensors"))
    speeds = with_disk_of(measured_speeds(), files, MemoryModel(prepared).weights)
    if whole.finetune.deepspeed is not None:
        if memory_budget is not None:
            raise ConfigError(
                "finetune.deepspeed: plan cannot choose within a memory budget, as ranks share weights and states: leave out the"
                " plan's memory budget, or finetune.deepspeed."
            )
    elif whole.memory_budget is not None and not whole.budget_is_default:
        choice = within_budget(asked, STEPS, speeds)
        prepared = prepared if memory_budget is None else shrink_batches(choice.recommended.memory.prepared)
    return dataclasses.replace(make_plan(STEPS, prepared, speeds), choice=choice)


def plan_without_budget(planned: Plan) -> Plan:
    """The plan of the same run if no ``memory_budget`` bounded its workers."""
    return make_plan(STEPS, without_budget(planned.prepared), planned.speeds)


def validate(config: Config | None = None, *, train: Any = None, eval: Any = None, **keys: Any) -> list[str]:
    """Checks all that ``emloc-ray validate`` checks, and starts nothing; takes what :func:`run` takes, and writes rows that are
    given as it does. Returns its lines. Raises ConfigError with every error at once, one sentence a line."""
    prepared = shrink_batches(prepare(as_config(config, train, eval, keys)))
    return list(validation_lines(prepared, "The config"))


def as_config(
    config: Config | None, train: Any = None, eval: Any = None, keys: Mapping[str, Any] | None = None
) -> RunConfig:
    """A config of what :func:`run` takes, checked whole: a RunConfig has not checked the keys that it passes on. Rows that a
    program holds are written beside the run's directory, once the rest is known to be valid."""
    given = {name: without_paths(rows) for name, rows in (("train", train), ("eval", eval)) if rows is not None}
    if not isinstance(config, RunConfig | Mapping | None):
        config = load_config(config)
    values = config.model_dump(mode="json", exclude_unset=True) if isinstance(config, RunConfig) else dict(config or {})
    values, keys = without_paths(values), without_paths(keys or {})
    for key, value in keys.items():
        is_section = isinstance(value, Mapping) and isinstance(values.get(key), Mapping)
        values[key] = {**values[key], **value} if is_section else value
    model = values.get("model")
    source = model.get("source") if isinstance(model, Mapping) else model
    if isinstance(source, str):
        values.setdefault("run_dir", f"runs/{re.split('[/:]', source.rstrip('/'))[-1]}")
    data = values.get("data")
    data = {} if data is None else data
    if not isinstance(data, Mapping):
        data = {"train": data}
    data = {**data, **given}
    for name in _SPLITS:
        check_one_split(data.get(name), name)
    rows = {name: held for name, held in data.items() if name in _SPLITS and not is_place(held)}
    if data:
        values["data"] = {**data, **dict.fromkeys(rows, "rows.jsonl")}
    checked = parse_config(values, "the call")
    if not rows:
        return checked
    places = {name: write_rows(held, name, checked.run_dir) for name, held in rows.items()}
    return parse_config({**values, "data": {**data, **places}}, "the call")


def _default_reporter() -> Reporter:
    """Shows progress in a notebook; elsewhere nothing."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if not any(kind.__name__ == "ZMQInteractiveShell" for kind in type(shell).__mro__):  # Colab's is a subclass
        return Reporter()
    from emloc_ray.ui.notebook import NotebookReporter

    return NotebookReporter()
