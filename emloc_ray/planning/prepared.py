"""All that is known before a weight moves: the model's layers, the patterns' matches, the data's first rows.

It is checked before Ray starts and before anything is written; all errors come at once.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, Protocol, TypeVar

import torch

from emloc_ray.config.adapter import AdapterConfig
from emloc_ray.config.base import StageConfig
from emloc_ray.config.emulator import HealingConfig
from emloc_ray.config.finetune import FinetuneConfig
from emloc_ray.config.schema import WORKER_SECTIONS, RunConfig, SplitConfig
from emloc_ray.config.steps import Variant
from emloc_ray.data.hub_rows import num_rows
from emloc_ray.data.hub_splits import HubSplit
from emloc_ray.data.images import NO_PROCESSOR
from emloc_ray.data.reading import SourceFile
from emloc_ray.data.splits import SPLITS, held_out
from emloc_ray.errors import ConfigError, EmlocError
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.io.store.object_store import MANIFEST
from emloc_ray.io.store.objects import Objects
from emloc_ray.io.store.places import is_store_uri
from emloc_ray.io.store.shared import Shared
from emloc_ray.modeling.loading import ModelSource, resolve_source, token_counter
from emloc_ray.planning.data_checks import (
    Looks,
    check_apart,
    check_columns,
    check_held_out,
    check_split,
    look_at_files,
    places_here,
    rows_of_parts,
)
from emloc_ray.planning.layout import Layout
from emloc_ray.planning.lengths import Lengths, files_read, row_lengths
from emloc_ray.planning.machine import check_packages, check_resources, gpus_expected
from emloc_ray.planning.model_checks import check_formats, read_model
from emloc_ray.planning.model_files import file_dtype_of
from emloc_ray.planning.training_checks import check_training

UNKNOWN_ROWS = 8000  # the guess for a split that is made later, and for a data set of the hub whose card has no count
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Settings = TypeVar("Settings", bound=StageConfig)


@dataclass(frozen=True)
class Training:
    """A training's settings, its adapter, the layout of the model that it trains on, and the split that it reads."""

    section: FinetuneConfig
    adapter: AdapterConfig
    layout: Layout
    split: str = "train"


@dataclass(frozen=True)
class Prepared:
    """A config, with what its model, data and run directory were seen to be."""

    config: RunConfig
    run: RunDirectory
    source: ModelSource
    model_config: Any
    layout: Layout
    files: dict[str, tuple[SourceFile, ...]]
    zero_config: dict[str, Any] | None = None
    file_dtype: torch.dtype | None = None  # of the model's files, where they are here and safetensors
    written_config: RunConfig | None = None  # the config before GPUs, and batches within its budget, were decided
    gpu_bytes: float | None = None  # of the smallest GPU of a Ray that was joined; None where this machine's are meant
    host_bytes: float | None = None  # of the memory that weights come from; None where this machine's is meant
    hub_rows: Mapping[HubSplit, int] = dataclasses.field(default_factory=dict)  # those whose card counts them

    def with_gpus(self, available: float, gpu_bytes: float | None = None) -> Prepared:
        """The run as written, planned with the ``available`` GPUs of a Ray. ``gpu_bytes``: the memory of the smallest, None
        where it is not known. The run itself where its workers' GPUs and their memory stay the same."""
        config = (self.written_config or self.config).with_gpus(available)
        same = all(getattr(config, name).gpus == getattr(self.config, name).gpus for name in WORKER_SECTIONS)
        if same and gpu_bytes == self.gpu_bytes:
            return self
        return dataclasses.replace(self, config=config, gpu_bytes=gpu_bytes)

    @property
    def original_name(self) -> str:
        """How files of the run name the original: its hub id, or a path that holds from any directory."""
        if self.source.gguf_file is None:
            return self.source.hub_id or str(self.source.directory)
        return f"{self.run.place.partition('?')[0]}/model"

    @property
    def finishes(self) -> bool:
        """Whether the corrected adapter is trained on, on the original."""
        return self.config.finetune.exact_steps > 0 and self.layout.differs

    @property
    def variants_scored(self) -> tuple[Variant, ...]:
        """The evaluation's variants, without those that this run does not make; of what exact steps serve one always is."""
        lacking = {"finished": not self.finishes, "merged": self.config.adapter.is_prompt}
        scored = tuple(name for name in self.config.evaluation.variants if not lacking.get(name, False))
        return (*scored, "finished") if self.finishes and {"finished", "merged"}.isdisjoint(scored) else scored

    @functools.cached_property
    def for_fingerprints(self) -> Prepared:
        """The run by which stages are fingerprinted: with the written batch sizes and checkpointing, where a step then reads as
        many rows. Both runs make the same but for rounding, so another memory budget redoes nothing."""
        written, config = self.written_config, self.config
        if written is None:
            return self
        batched = ("calibration", "evaluation")
        sections: dict[str, Any] = {n: _with(getattr(config, n), getattr(written, n), "batch_size") for n in batched}
        if worker_rows(config.finetune, config.finetune) == worker_rows(written.finetune, written.finetune):
            sections["finetune"] = _with(config.finetune, written.finetune, *_OF_A_STEP)
        ours, theirs = config.emulator.healing, written.emulator.healing
        if ours and theirs and worker_rows(ours, config.finetune) == worker_rows(theirs, written.finetune):
            sections["emulator"] = config.emulator.model_copy(update={"healing": theirs})
        return dataclasses.replace(self, config=config.model_copy(update=sections))

    @property
    def finetuning(self) -> Training:
        """The training of the adapter."""
        return Training(self.config.finetune, self.config.adapter, self.layout)

    @functools.cached_property
    def lengths(self) -> Lengths:
        """How long the rows to train on are, and the longest of those in files of their own that are scored."""
        scored = [self.lengths_of(split, packed=False).longest for split in _SCORED if self.rows_of(split) == split]
        return dataclasses.replace(self.lengths_of("train"), scored=max(scored, default=0.0))

    def lengths_of(self, split: str, packed: bool = True) -> Lengths:
        """How long the rows of a split are; as they are in its files where they are not ``packed``."""
        data = self.config.data if packed else self.config.data.model_copy(update={"packing": False})
        trust, image = self.config.model.trust_remote_code, self.layout.image.row_tokens
        files, elsewhere = self.files.get(split, ()), self._rows_elsewhere(split)
        read = files_read(files, rows_of_parts(getattr(data, split), files))

        def count() -> Lengths:
            return row_lengths(data, read, image, token_counter(self.source, trust), elsewhere)

        key = (self.source, self.source.looks, trust, image, *read.items(), elsewhere, data.model_dump_json())
        return _LENGTHS.get(key, count)

    def rows_of(self, split: str) -> str:
        """The split whose rows a split reads: train, where the config does not name it."""
        return "train" if getattr(self.config.data, split) is None else split

    @property
    def rows_held_out(self) -> dict[str, int]:
        """Rows that are taken out of train for each split that the config does not name; none where those of train are made or
        downloaded later."""
        config = self.config
        if not self.files.get("train"):
            return {}
        return held_out(
            self._rows_taken("train"),
            [name for name in splits_of(config) if getattr(config.data, name) is not None],
            num_selection_samples=config.correction.num_selection_samples,
            num_eval_samples=config.evaluation.num_samples,
            num_validation_samples=config.finetune.num_validation_samples if config.finetune.validates else None,
        )

    def num_rows(self, split: str = "train") -> int:
        """Rows of a split that are read: as many as the config asks for, without those held out of train. Estimated where they
        are made or downloaded later."""
        config, others = self.config, self.rows_held_out
        if split in others:
            return others[split]
        asked = {
            "calibration": config.calibration.num_calibration_samples,
            "selection": config.correction.num_selection_samples,
            "eval": config.evaluation.num_samples,
        }
        if split == "train" or (split == "calibration" and config.data.calibration is None):
            rows = self._rows_taken("train") - sum(others.values())
        elif getattr(config.data, split) is None:
            rows = UNKNOWN_ROWS // 10  # the most that is taken out of train
        else:
            rows = self._rows_taken(split)
        return min(rows, asked.get(split) or rows)

    def knows_rows(self, split: str) -> bool:
        """Whether the rows of a split, those of train where the config does not name it, are all in files that are here."""
        split = self.rows_of(split)
        return bool(self.files.get(split)) and not self._rows_elsewhere(split)

    def _rows_taken(self, split: str) -> int:
        section: SplitConfig | None = getattr(self.config.data, split)
        here = sum(rows_of_parts(section, self.files.get(split, ())).values())
        taken = here + self._rows_elsewhere(split) or UNKNOWN_ROWS
        return min(taken, (section and section.num_samples) or taken)

    def _rows_elsewhere(self, split: str) -> int:
        """A split's rows that are on the hub: by their cards, or the guess."""
        section: SplitConfig | None = getattr(self.config.data, split)
        named = [HubSplit.of(place, split) for place in (section.hub if section is not None else ())]
        return sum(self.hub_rows.get(part, UNKNOWN_ROWS) for part in named)

    def calibration_tokens(self, tokens_per_row: float) -> float:
        """The tokens that calibration reads, at a mean of so many a row: the smallest of the config's bounds and of what its rows
        have. With ``data.packing``, at the mean of the rows that are joined."""
        section = self.config.calibration
        if self.config.data.packing:
            tokens_per_row = self.lengths_of(self.rows_of("calibration"), packed=False).mean
        known = self.knows_rows("calibration")
        rows = self.num_rows("calibration") if known else section.num_calibration_samples or UNKNOWN_ROWS
        tokens = rows * tokens_per_row
        return min(tokens, section.num_calibration_tokens or tokens)


_LENGTHS = Shared[Lengths](4096)  # to tokenize a few hundred rows takes longer than all else of a plan
_SCORED = ("eval", "validation", "selection")
_OF_A_STEP = ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing")


def _with(section: Settings, written: Settings, *keys: str) -> Settings:
    return section.model_copy(update={key: getattr(written, key) for key in keys})


def worker_rows(section: FinetuneConfig | HealingConfig, finetune: FinetuneConfig) -> int:
    """Rows of a worker's optimizer step."""
    micro_batch = section.per_device_train_batch_size or finetune.per_device_train_batch_size
    return micro_batch * (section.gradient_accumulation_steps or finetune.gradient_accumulation_steps)


def splits_of(config: RunConfig) -> tuple[str, ...]:
    """The splits of a run; ``healing`` is among them where the config names rows to heal on, ``validation`` where the emulator
    is scored while it is trained."""
    heals = config.data.healing is not None and config.emulator.heals is not None
    return (*SPLITS, *(["healing"] if heals else []), *(["validation"] if config.finetune.validates else []))


class Submit(Protocol):
    """Starts a call, perhaps in another thread; returns a function that waits for its result, or raises what it raised."""

    def __call__(
        self, function: Callable[Parameters, Result], /, *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Callable[[], Result]:
        """``functools.partial`` calls the function each time that the result is asked for."""


@dataclass(frozen=True)
class Lookups:
    """What a preparation waits for: a run's directory, its model and its data may be on an object store or the hub."""

    manifest: Callable[[], dict[str, Any]]  # of the run directory, without what stages made
    source: Callable[[], ModelSource]
    files: Mapping[str, Callable[[], Looks]]
    upper_bound: Callable[[], None]
    hub_rows: Mapping[HubSplit, Callable[[], int | None]] = dataclasses.field(default_factory=dict)


def start_lookups(config: RunConfig, needs_weights: bool = True, submit: Submit = functools.partial) -> Lookups:
    """Starts all that :func:`prepare` waits for; ``submit`` may run it in other threads."""
    model = config.model
    places = {name: places_here(config, name) for name in splits_of(config)}
    named = [(name, section) for name in places if (section := getattr(config.data, name)) is not None]
    hub = {HubSplit.of(place, name) for name, section in named for place in section.hub}
    return Lookups(
        submit(_check_run, config.run_dir),
        submit(resolve_source, model.source, model.revision, model.trust_remote_code, needs_weights),
        {name: submit(look_at_files, here, f"data.{name}.path") for name, here in places.items() if here},
        submit(_check_upper_bound, config.evaluation.upper_bound),
        {split: submit(num_rows, split) for split in hub},
    )


def prepare(config: RunConfig, needs_weights: bool = True, lookups: Lookups | None = None) -> Prepared:
    """Checks the whole config against the model, the data and the disk; a plan does not need the model's weights. ``lookups``:
    :func:`start_lookups` of the same. Raises ConfigError with every error at once, one sentence a line; nothing was written."""
    lookups = lookups or start_lookups(config, needs_weights)
    written_config, config = config, config.with_gpus(gpus_expected(config))
    errors: list[str] = []

    def attempt(check: Callable[[], Result]) -> Result | None:
        try:
            return check()
        except EmlocError as error:
            errors.extend(str(error).split("\n"))
            return None

    run = RunDirectory(config.run_dir)
    attempt(lookups.manifest)
    source = attempt(lookups.source)
    model = None if source is None else attempt(lambda: read_model(config, source))
    reads_images = model is None or model[1].image.row_tokens > 0
    if config.data.generate == "vqa" and not reads_images:
        errors.append(f"data.generate: vqa shows images, and {NO_PROCESSOR}.")
    files = {
        name: attempt(functools.partial(check_split, config, name, reads_images, lookups.files.get(name)))
        for name in splits_of(config)
    }
    formats = {source.format for sources in files.values() for source in sources or ()}
    formats |= {config.data.row_format} - {"auto"}
    if source is not None and model is not None:
        attempt(functools.partial(check_formats, config, source, model[0], formats))
    attempt(lambda: check_apart(run, None if source is None else source.directory, files))
    attempt(lambda: check_held_out(config, files))
    attempt(lambda: check_columns(config.data, files))
    attempt(lambda: _check_image_roots(config.data.image_roots))
    attempt(lookups.upper_bound)
    attempt(lambda: check_resources(config))
    attempt(lambda: check_packages(config))
    zero_config = attempt(lambda: check_training(config))
    file_dtype = None if source is None else attempt(lambda: file_dtype_of(source))
    if errors or source is None or model is None:
        raise ConfigError("\n".join(dict.fromkeys(errors)))  # splits may share a bad file
    known = {name: sources for name, sources in files.items() if sources}
    counted = {split: rows for split, look in lookups.hub_rows.items() if (rows := look()) is not None}
    return Prepared(config, run, source, *model, known, zero_config, file_dtype, written_config, hub_rows=counted)


def _check_run(place: str) -> dict[str, Any]:
    manifest = RunDirectory(place).check()
    large = ("outputs", "result")  # hundreds of tasks' are held at once
    stages = manifest.get("stages", {}).items()
    return {**manifest, "stages": {name: {k: v for k, v in entry.items() if k not in large} for name, entry in stages}}


def _check_image_roots(roots: Sequence[str]) -> None:
    for root in filter(is_store_uri, roots):
        Objects(root, "data.image_roots")


def _check_upper_bound(bound: str | None) -> None:
    if bound is None:
        return
    advice = (
        "run this config with emulator.compression_ratio=1.0 emulator.quantization=none evaluation.upper_bound=null and"
        " another run_dir, and name that."
    )
    run: RunDirectory | None = None
    try:
        run = RunDirectory(bound)
        metrics = run.existing().metrics()
    except ConfigError as error:
        if run is not None and MANIFEST not in run.names():
            raise ConfigError(f"evaluation.upper_bound {bound} is no run yet: {advice}") from error
        raise ConfigError(re.sub("^run_dir ", "evaluation.upper_bound ", str(error))) from error
    emulator = metrics.get("emulator") or {}
    whole = emulator.get("compression_ratio") == 1 and emulator.get("quantization", "none") == "none"
    if "evaluation" not in metrics or not whole:
        raise ConfigError(f"evaluation.upper_bound {bound} is no finished run at ratio 1.0 in floats: {advice}")
