"""What an ablation's file says, beyond what a batch's does: which methods on which data sets, and what they are held against."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from emloc_ray.config.base import Section
from emloc_ray.config.reading import settings
from emloc_ray.runs.batch.config import CacheConfig, LimitsConfig
from emloc_ray.runs.batch.grid import SAFE_NAME, repeated

RATIO = "emulator.compression_ratio"
OWN = "own"

Some = Field(min_length=1)
Kind = Literal["layers", "random", "structured"]  # the parts that a pruned model leaves out
Start = Literal["weights", "activations"]  # what an adapter begins by, of what rounding left
Foreign = Literal["summaries", "names", "code", "prose"]


def overlap(one: str, other: str) -> bool:
    """Whether a dotted key is another, or holds it, or is within it."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


class RowsConfig(Section):
    """Rows of each split of every data set."""

    train: int = Field(640, ge=1)
    selection: int = Field(32, ge=1)
    eval: int = Field(96, ge=1)
    calibration: int = Field(512, ge=1, description="rows to take calibration.num_calibration_samples from")


class CalibrationRows(Section):
    """Changes to a data set's calibration rows."""

    foreign: Foreign | None = Field(None, description="rows of another domain")
    share: float = Field(1.0, gt=0, le=1, description="of the rows, that foreign ones replace")
    shuffle: bool = Field(False, description="the words of each row in another order")

    @model_validator(mode="after")
    def _share_of_something(self) -> CalibrationRows:
        if self.foreign is None and "share" in self.model_fields_set:
            raise ValueError("share is that of foreign rows: name them, as foreign: prose")
        return self


class CorrectionWay(Section):
    """A correction to try; ``auto`` is what a run's own may be."""

    method: Literal["none", "projection", "covariance", "adapted"]
    clamp: float | None = Field(3.0, gt=0)
    strength: float = Field(1.0, ge=0, le=4)


class MethodConfig(Section):
    """A row of the table: its name, and the keys in which its runs differ from the base."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str
    prune: Kind | None = Field(None, description="train on a model without these parts, instead of an emulator")
    align: Foreign | None = Field(None, description="rows to train all that pruning kept on, before the adapter")
    heal_on: Foreign | None = Field(None, description="other rows than the task's to heal the emulator on")
    start: Start | None = Field(
        None, description="begin the adapter where it makes up for what the emulator lacks, and serve it on that"
    )

    @field_validator("name")
    @classmethod
    def _safe_name(cls, name: str) -> str:
        if not SAFE_NAME.fullmatch(name):
            raise ValueError(f"the name {name!r} is no safe file name: use letters, digits and . _ = -")
        return name

    @model_validator(mode="after")
    def _aligns_what_is_pruned(self) -> MethodConfig:
        if self.align is not None and self.prune is None:
            raise ValueError(f"method {self.name} has align, which trains what pruning kept: add prune to it")
        return self

    @property
    def own(self) -> dict[str, Any]:
        """Its config keys, dotted."""
        extra = self.model_extra or {}
        return {".".join(map(str, keys)): value for keys, value in settings(extra, dotted=True)}

    def fixes(self, key: str) -> bool:
        """Whether a key is this method's own."""
        return any(overlap(own, key) for own in self.own)


class AblationConfig(Section):
    """Every method on every data set with every seed, at every point of the grid that the method does not fix itself."""

    base: str = Field(min_length=1, description="the config that all runs begin with; model and lengths are there")
    run_dir: str = Field(min_length=1)
    shared: str = Field("", description="data sets, figures and cache that ablations share; run_dir where left out")
    datasets: Annotated[list[Literal["summaries", "names", "code", "exceptions"]], Some]
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Some] = Field([0, 1, 2])
    rows: RowsConfig = RowsConfig()
    methods: Annotated[list[MethodConfig], Some]
    upper_bound: str = Field(description="the method that is LoRA on the original; run once a data set and seed")
    compare_with: dict[str, Any] = Field(
        default_factory=dict, description="method, calibration, correction or a key of the grid: value"
    )
    grid: dict[str, Annotated[list[Any], Some]] = Field(default_factory=dict, description="config key: values")
    calibrations: Annotated[dict[str, CalibrationRows], Some] = Field({OWN: CalibrationRows()})
    corrections: dict[str, CorrectionWay] = Field(
        default_factory=dict, description="tried on each trained adapter beside the run's own; nothing is trained again"
    )
    max_concurrent: int | None = Field(None, ge=1)
    limits: LimitsConfig = LimitsConfig()
    cache: CacheConfig = CacheConfig()
    unrounded: bool = Field(
        False, description="begin with the base's .gguf of 4 bits plus noise within half a step of its grid"
    )

    @property
    def healing_rows(self) -> list[Foreign]:
        """What methods heal or align on beside the task's own rows."""
        every = [rows for method in self.methods for rows in (method.heal_on, method.align) if rows is not None]
        return list(dict.fromkeys(every))

    @model_validator(mode="after")
    def _agrees(self) -> AblationConfig:
        names = [method.name for method in self.methods]
        problems = [
            f"{key} holds {', '.join(twice)} twice: once is enough"
            for key, values in (("methods", names), ("datasets", self.datasets), ("seeds", self.seeds))
            if (twice := repeated(values))
        ]
        if self.upper_bound not in names:
            problems.append(f"upper_bound is {self.upper_bound!r}, which is no method ({', '.join(names)})")
        for key, rows in self.calibrations.items():
            if not SAFE_NAME.fullmatch(key):
                problems.append(f"calibrations.{key} is no safe file name: use letters, digits and . _ = -")
            if rows.foreign in self.datasets:
                problems.append(f"calibrations.{key} takes rows of {rows.foreign}, a data set itself: choose others")
        problems += [
            f"method {method.name} {verb} on {rows}, a data set itself: choose other rows"
            for method in self.methods
            for verb, rows in (("heals", method.heal_on), ("aligns", method.align))
            if rows in self.datasets
        ]
        problems += ["grid.seed is what seeds is for: take it out" for key in self.grid if key == "seed"]
        problems += self._wrong_comparison(names)
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _wrong_comparison(self, names: list[str]) -> list[str]:
        known: dict[str, list[Any]] = {"method": names, "calibration": list(self.calibrations), **self.grid}
        problems = []
        for key, value in self.compare_with.items():
            if key == "correction":
                continue  # the runs' own is known with the base
            if key not in known:
                problems.append(f"compare_with.{key} is none of correction, {', '.join(known)}")
            elif value not in known[key]:
                problems.append(f"compare_with.{key} is {value!r}, none of {', '.join(map(str, known[key]))}")
        return problems
