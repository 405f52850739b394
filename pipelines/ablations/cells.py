"""An ablation's file as cells, each a task of a batch; all is checked, and every error told, before anything starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ablations.config import RATIO, AblationConfig, Kind, MethodConfig, Start, overlap
from ablations.datasets import data_dir, data_section
from emloc_ray.config.reading import check, put, read_mapping, read_override
from emloc_ray.config.schema import RayConfig, RunConfig
from emloc_ray.errors import ConfigError
from emloc_ray.io.store.places import is_store_uri
from emloc_ray.runs.batch.config import BatchConfig
from emloc_ray.runs.batch.grid import joined_name, points
from emloc_ray.runs.batch.tasks import Task, compose_batch

# What an override cannot change, and what to do.
_OF_EVERY_CELL = {
    "seed": "a cell has one of the file's: give seeds=[…] instead",
    "name": "a cell is named by what it varies: leave it out",
    "data.format": "a data set has its own: leave it out",
}
_OF_THE_BATCH = ("run_dir", "max_concurrent", "limits", "cache")


@dataclass(frozen=True)
class Cell:
    """One run: ``point`` are the grid's values that it has; ``config`` is the whole of it, of a pruned one as if an emulator of
    that ratio took the pruned model's place."""

    dataset: str
    method: str
    seed: int
    calibration: str
    point: dict[str, Any]
    task: Task
    prune: Kind | None = None
    align: str | None = None
    heal_on: str | None = None
    start: Start | None = None

    @property
    def name(self) -> str:
        """Its task's."""
        return self.task.name

    @property
    def config(self) -> RunConfig:
        """Its task's."""
        return self.task.config

    @property
    def compresses(self) -> bool:
        """Whether its adapter is trained on another model than it serves, so that it can be corrected."""
        return self.prune is None and self.start is None and _compresses(self.config)


@dataclass(frozen=True)
class Ablation:
    """A file with all its cells."""

    config: AblationConfig
    batch: BatchConfig
    ray: RayConfig
    cells: tuple[Cell, ...]
    notes: tuple[str, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """The directory that everything is in."""
        return Path(self.batch.run_dir)

    @property
    def name(self) -> str:
        """What its results are published as, so that a file run on another model, in another directory, has its own."""
        return self.root.name

    @property
    def bound(self) -> Cell:
        """A cell of the upper bound: its model is the original."""
        return next(cell for cell in self.cells if cell.method == self.config.upper_bound)

    def has_the_original(self, cell: Cell) -> bool:
        """Whether a cell begins with the upper bound's model, and not with another, smaller one."""
        own, original = cell.config.model, self.bound.config.model
        return (own.source, own.revision) == (original.source, original.revision)

    @property
    def shared(self) -> Path:
        """The directory of what it may share with other ablations."""
        return _shared(self.config)

    def data_dir(self, dataset: str, seed: int) -> Path:
        """The rows of a data set."""
        return data_dir(self.shared / "data", dataset, seed, self.config)


def read_ablation(path: Path, overrides: Sequence[str] = ()) -> Ablation:
    """Reads an ablation's file; of the ``key=value`` overrides, those of its own keys are for it, all others for every run;
    ``methods=[a, b]`` picks some of its methods. An override goes before what methods say; ``notes`` tell where.

    Raises:
        ConfigError: with every error at once, one sentence a line.
    """
    values = read_mapping(path, f"Ablation {path}", "it needs base, run_dir, datasets, methods and upper_bound")
    of_runs: dict[str, Any] = {}
    of_ray = []
    for text in overrides:
        keys, value = read_override(text)
        if keys[0] == "ray":
            of_ray.append(text)
        elif keys[0] not in AblationConfig.model_fields:
            of_runs[".".join(keys)] = value
        elif keys == ("methods",) and isinstance(value, list) and all(isinstance(name, str) for name in value):
            put(values, keys, _picked(values.get("methods"), value), text)
        else:
            put(values, (keys[0], ".".join(keys[1:])) if keys[0] == "grid" and keys[1:] else keys, value, text)
    where = f"{path} and its overrides" if overrides else str(path)
    config, lines = check(AblationConfig, values)
    for key in ("run_dir", "shared"):
        if config is not None and is_store_uri(getattr(config, key)):
            lines.append(f"{key} is on an object store, and data sets are made in it: name a local directory.")
    if config is not None:
        lines += [
            f"{key} is what the grid varies: give grid.{varied}=[…] instead."
            for key in of_runs
            for varied in config.grid
            if overlap(key, varied)
        ]
    lines += [f"{key}: {reason}." for key, reason in _OF_EVERY_CELL.items() if key in of_runs]
    if config is None or lines:
        raise ConfigError("\n".join(f"{where}: {line}" for line in lines))
    root = Path(config.run_dir).expanduser().absolute()
    points = list(_cells(config, of_runs))
    batch = compose_batch(_batch_values(config, root, [values for *_, values in points]), path, of_ray)
    cells = [
        Cell(
            dataset,
            method.name,
            point.pop("seed"),
            point.pop("calibration"),
            point,
            task,
            method.prune,
            method.align,
            method.heal_on,
            method.start,
        )
        for (dataset, method, point, _), task in zip(points, batch.tasks, strict=True)
    ]
    lines = [f"{where}: {line}" for line in _wrong_cells(config, cells)]
    if lines:
        raise ConfigError("\n".join(dict.fromkeys(lines)))
    return Ablation(config, batch.config, batch.ray, tuple(cells), tuple(_overridden(config, of_runs)), of_runs)


def _compresses(config: RunConfig) -> bool:
    return config.emulator.compression_ratio < 1 or config.emulator.quantization != "none"


def _overridden(config: AblationConfig, of_runs: dict[str, Any]) -> Iterator[str]:
    for key, value in of_runs.items():
        methods = [method.name for method in config.methods if method.fixes(key)]
        if methods:
            yield f"{key}={value} goes before what the file says of {', '.join(methods)}."


def _picked(methods: Any, names: Sequence[str]) -> Any:
    """The chosen methods of a file; an unknown name stays, for its error."""
    by_name = {method.get("name"): method for method in methods or () if isinstance(method, dict)}
    return [by_name.get(name, name) for name in names]


_Found = tuple[str, MethodConfig, dict[str, Any], dict[str, Any]]


def _cells(config: AblationConfig, of_runs: dict[str, Any]) -> Iterator[_Found]:
    """Data set, method, point and the task's keys: the method's own, the grid's, those of the command line, the data's."""
    for dataset in config.datasets:
        for method in config.methods:
            is_bound = method.name == config.upper_bound
            grid = {key: values for key, values in config.grid.items() if not is_bound and not method.fixes(key)}
            reads_none = is_bound or method.prune in ("layers", "random")
            calibrations = list(config.calibrations)[: 1 if reads_none else None]
            for point in points({**grid, "calibration": calibrations, "seed": config.seeds}):
                values = {key: value for key, value in point.values.items() if key in grid}
                shown = points({key: [point.values[key]] for key in _shown(grid, calibrations)})[0].name
                seed, calibration = point.values["seed"], point.values["calibration"]
                folder = data_dir(_shared(config) / "data", dataset, seed, config)
                data = data_section(dataset, folder, calibration, method.heal_on)
                own = {f"data.{key}": value for key, value in data.items()}
                name = joined_name(f"{dataset}-{method.name}", shown)
                task = {**method.own, **values, **of_runs, **own, "seed": seed, "name": name}
                yield dataset, method, dict(point.values), task


def _shown(grid: dict[str, Any], calibrations: list[str]) -> list[str]:
    return [*grid, *(["calibration"] if len(calibrations) > 1 else []), "seed"]


def _shared(config: AblationConfig) -> Path:
    return Path(config.shared or config.run_dir).expanduser().absolute()


def _batch_values(config: AblationConfig, root: Path, tasks: list[dict[str, Any]]) -> dict[str, Any]:
    given = config.model_dump(mode="json", include=set(_OF_THE_BATCH), exclude_unset=True)
    cache = {"path": str(_shared(config) / "cache"), **given.pop("cache", {})}
    return {**given, "run_dir": str(root), "cache": cache, "base": config.base, "tasks": tasks}


def _wrong_cells(config: AblationConfig, cells: Sequence[Cell]) -> Iterator[str]:
    own = {cell.config.correction.method for cell in cells}
    for key in own & config.corrections.keys():
        yield f"corrections.{key} has the name of the runs' own correction.method: give it another."
    bound = next(cell for cell in cells if cell.method == config.upper_bound)
    compared = config.compare_with.get("correction")
    if compared is not None and compared not in {*own, *config.corrections}:
        yield f"compare_with.correction is {compared!r}, none of {', '.join([*own, *config.corrections])}."
    for cell in cells:
        emulator, asked = cell.config.emulator, cell.config.calibration.num_calibration_samples
        is_whole = emulator.compression_ratio == 1 and emulator.quantization == "none" and cell.prune is None
        if cell.method == config.upper_bound and not is_whole:
            yield f"upper_bound {cell.method} is not LoRA on the original: set its {RATIO} to 1.0, and no more."
        if cell.prune is not None and emulator.compression_ratio == 1:
            yield f"method {cell.method} leaves nothing out: set {RATIO}, which is what it keeps, below 1."
        if asked is not None and asked > config.rows.calibration and cell.compresses:
            yield (
                f"method {cell.method} takes {asked} calibration rows of {config.rows.calibration}: raise rows.calibration,"
                " or lower calibration.num_calibration_samples."
            )
        yield from _unread_rows(config, cell)
        adapter, model = cell.config.adapter.method, cell.config.model.source
        if cell.prune is not None and model != bound.config.model.source:
            yield f"method {cell.method} prunes {model}, but its adapter has to be the original's: take model out of it."
        if cell.prune is not None and adapter not in ("lora", "rslora"):
            yield f"method {cell.method} is pruned, and an adapter of {adapter} cannot be recovered: use lora or rslora."
        if cell.start is not None:
            yield from _wrong_start(cell)
        if config.corrections and cell.compresses and not cell.config.adapter.is_additive:
            yield f"method {cell.method} trains {adapter}, which adds to no weight: take corrections out, or the method."


def _wrong_start(cell: Cell) -> Iterator[str]:
    adapter = cell.config.adapter
    own = adapter.model_dump(include={"target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"})
    if cell.prune is not None:
        yield f"method {cell.method} has prune and start, and a start makes up for what an emulator lacks: take one of them."
    elif not _compresses(cell.config):
        yield f"method {cell.method} has a start, and its emulator is the original: set emulator.quantization or {RATIO}."
    elif adapter.method != "lora" or any(own.values()):
        yield f"method {cell.method} has a start, which is of LoRA of one rank on all linears: take its other adapter keys out."


def _unread_rows(config: AblationConfig, cell: Cell) -> Iterator[str]:
    read = {"eval": ("evaluation.num_samples", cell.config.evaluation.num_samples)}
    if cell.config.correction.method == "auto":
        read["selection"] = ("correction.num_selection_samples", cell.config.correction.num_selection_samples)
    for split, (key, count) in read.items():
        rows = getattr(config.rows, split)
        if count is not None and count < rows:
            yield f"rows.{split} makes {rows} rows and {key} reads {count} of them: raise {key}, or lower rows.{split}."
