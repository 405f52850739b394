"""Everything that can be known before a weight moves: the model's layers, the patterns' matches, the data's first rows.

All of it is checked before Ray starts and before anything is written, and every error is told at once.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from emloc_ray.config import AdapterConfig, RunConfig, SplitConfig
from emloc_ray.core.ranks import rank_for_ratio
from emloc_ray.data.formats import FIELDS, check_row
from emloc_ray.data.reading import SourceFile, each, list_files, read_rows, scan
from emloc_ray.data.splits import SPLITS
from emloc_ray.errors import ArtifactError, ConfigError, EmlocError
from emloc_ray.io.run_directory import RunDirectory
from emloc_ray.modeling.adapter import portable_targets
from emloc_ray.modeling.architecture import LinearSpec, block_linears, empty_model, learned_positions, shared_inputs
from emloc_ray.modeling.loading import ModelSource, check_source, read_model_config, resolve_source
from emloc_ray.modeling.matching import check_table, lookup, select
from emloc_ray.modeling.zero_config import check_zero_config, read_zero_config

CHECKED_ROWS = 1000  # of a file
UNKNOWN_ROWS = 8000  # of a split that is made or downloaded later
MAX_CHECKED_ROWS = 16_000  # of a split, but for one of each file
_BATCHES = ("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Layout:
    """The model's linears and what the config makes of them."""

    specs: tuple[LinearSpec, ...]
    groups: tuple[tuple[LinearSpec, ...], ...]
    ranks: dict[str, int]
    compressed: tuple[str, ...]
    adapted: tuple[str, ...]
    portable_targets: str | tuple[str, ...]
    num_parameters: int
    head_parameters: int
    hidden_size: int

    @property
    def parameters_targeted(self) -> int:
        """Parameters of the linears that compression targets."""
        targeted = set(self.compressed)
        return sum(spec.num_parameters for spec in self.specs if spec.name in targeted)

    @property
    def parameters_factorized(self) -> int:
        """What those linears keep in the emulator."""
        targeted = set(self.compressed)
        return sum(self.kept(spec) for spec in self.specs if spec.name in targeted)

    def kept(self, spec: LinearSpec) -> int:
        """Parameters of one linear in the emulator."""
        rank = self.ranks.get(spec.name)
        return spec.num_parameters if rank is None else rank * (spec.out_features + spec.in_features)


@dataclass(frozen=True)
class Prepared:
    """A config with all that was found out about it."""

    config: RunConfig
    run: RunDirectory
    source: ModelSource
    model_config: Any
    layout: Layout
    files: dict[str, tuple[SourceFile, ...]]
    zero_config: dict[str, Any] | None = None

    def calibration_tokens(self, tokens_per_row: float) -> float:
        """Tokens that calibration will see, at a mean of so many a row: the least of what the config bounds them by."""
        section = self.config.calibration
        files = self.files.get("calibration") or self.files.get("train")
        rows = sum(source.num_rows for source in files) if files else UNKNOWN_ROWS
        tokens = (section.num_calibration_samples or rows) * tokens_per_row
        return min(tokens, section.num_calibration_tokens or tokens)


def prepare(config: RunConfig) -> Prepared:
    """Checks the whole config against the model, the data and the disk.

    Raises:
        ConfigError: with every error at once, one sentence a line; nothing was written.
    """
    errors: list[str] = []

    def attempt(check: Callable[[], Result]) -> Result | None:
        try:
            return check()
        except EmlocError as error:
            errors.extend(str(error).split("\n"))
            return None

    run = RunDirectory(config.run_dir)
    attempt(run.check)
    source = attempt(lambda: resolve_source(config.model.source, config.model.revision))
    found = None
    if source is not None:
        found = attempt(lambda: _read_model(config, source))
    files = {name: attempt(lambda name=name: _check_split(config, name)) for name in SPLITS}  # type: ignore[misc]
    attempt(lambda: _check_upper_bound(config))
    attempt(lambda: _check_resources(config))
    zero_config = attempt(lambda: _check_training(config))
    if errors or source is None or found is None:
        raise ConfigError("\n".join(dict.fromkeys(errors)))  # splits may share a bad file
    known = {name: sources for name, sources in files.items() if sources}
    return Prepared(config, run, source, found[0], found[1], known, zero_config)


def _read_model(config: RunConfig, source: ModelSource) -> tuple[Any, Layout]:
    model_config = read_model_config(source, config.model.trust_remote_code)
    try:
        model = empty_model(model_config, config.model.trust_remote_code, config.model.attn_implementation)
    except (ValueError, ImportError) as error:
        detail = " ".join(str(error).split())[:200]
        raise ConfigError(f"model: transformers cannot build it ({detail}): mend the model section.") from error
    check_source(source, model, config.model.trust_remote_code)
    positions = learned_positions(model)
    if positions is not None and config.data.max_seq_length > positions:
        raise ConfigError(
            f"data.max_seq_length is {config.data.max_seq_length}, the model has {positions} positions: lower it to that."
        )
    return model_config, make_layout(config, model)


def make_layout(config: RunConfig, model: Any) -> Layout:
    """Matches the config's patterns against a model on the meta device.

    Raises:
        ConfigError: naming every pattern that fits nothing, one sentence a line.
    """
    specs = block_linears(model)
    names = [spec.name for spec in specs]
    compressed, adapted = _matched(config, specs)
    by_name = {spec.name: spec for spec in specs}
    ranks = ranks_at(config, specs, compressed)
    groups = tuple(tuple(by_name[name] for name in group) for group in shared_inputs(model, specs))
    targets = _portable(config, adapted, names)
    head = model.get_output_embeddings()
    return Layout(
        tuple(specs),
        groups,
        ranks,
        tuple(compressed),
        tuple(adapted),
        targets,
        sum(parameter.numel() for parameter in model.parameters()),
        head.weight.numel(),
        head.weight.shape[-1],
    )


def _matched(config: RunConfig, specs: Sequence[LinearSpec]) -> tuple[list[str], list[str]]:
    """The linears that are compressed, and those that are adapted."""
    names = [spec.name for spec in specs]
    emulator, adapter = config.emulator, config.adapter
    errors: list[str] = []

    def attempt(check: Callable[[], Result]) -> Result | None:
        try:
            return check()
        except ConfigError as error:
            errors.append(str(error))
            return None

    compressed = attempt(
        lambda: select(names, emulator.target_modules, emulator.exclude_modules, "emulator.target_modules")
    )
    adapted = attempt(lambda: select(names, adapter.target_modules, adapter.exclude_modules, "adapter.target_modules"))
    for key, table in (
        ("emulator.ratios", emulator.ratios),
        ("adapter.rank_pattern", adapter.rank_pattern),
        ("adapter.alpha_pattern", adapter.alpha_pattern),
    ):
        attempt(lambda table=table, key=key: check_table(names, table, key))  # type: ignore[misc]
    if not errors:
        attempt(lambda: _check_adapter_ranks(adapter, [spec for spec in specs if spec.name in set(adapted or ())]))
    if errors or compressed is None or adapted is None:
        raise ConfigError("\n".join(errors))
    return compressed, adapted


def _check_adapter_ranks(adapter: AdapterConfig, specs: Sequence[LinearSpec]) -> None:
    for spec in specs:
        r = lookup(spec.name, adapter.rank_pattern, adapter.r)
        key = "adapter.r" if r == adapter.r else "adapter.rank_pattern"
        smaller = min(spec.out_features, spec.in_features)
        if r > smaller:
            raise ConfigError(f"{key} is {r}, above the smaller side {smaller} of {spec.name}: lower it.")


def ranks_at(config: RunConfig, specs: Sequence[LinearSpec], compressed: Sequence[str]) -> dict[str, int]:
    """The rank of every linear that the config compresses; those that stay dense are left out."""
    emulator = config.emulator
    if emulator.compression_ratio == 1:  # plain LoRA on the original: no pattern compresses anything then
        return {}
    by_name = {spec.name: spec for spec in specs}
    ratios = {name: lookup(name, emulator.ratios, emulator.compression_ratio) for name in compressed}
    ranks = {
        name: rank_for_ratio(by_name[name].out_features, by_name[name].in_features, ratio)
        for name, ratio in ratios.items()
    }
    return {name: rank for name, rank in ranks.items() if rank is not None}


def _portable(config: RunConfig, adapted: list[str], names: list[str]) -> str | tuple[str, ...]:
    asked = config.adapter.target_modules
    if asked is None or asked == "all-linear" or config.adapter.exclude_modules is not None:
        return tuple(portable_targets(adapted, names))
    return asked if isinstance(asked, str) else tuple(asked)


def _check_split(config: RunConfig, name: str) -> tuple[SourceFile, ...]:
    split: SplitConfig | None = getattr(config.data, name)
    if split is None or config.data.generate is not None or _is_hub(split):
        return ()
    try:
        sources = _checked_sources(split.path, f"data.{name}.path", config.data.format)
    except ArtifactError as error:  # a store that does not answer
        raise ConfigError(f"data.{name}.path: {error}") from error
    others = sum(getattr(config.data, other) is None for other in ("selection", "eval"))  # taken out of train
    rows = sum(source.num_rows for source in sources)
    if name == "train" and rows <= others:
        raise ConfigError(
            f"data.train.path has {rows} rows, of which {others} are held out: give more, or paths of their own to"
            " data.selection and data.eval."
        )
    return sources


def _checked_sources(patterns: str | Sequence[str], key: str, form: str) -> tuple[SourceFile, ...]:
    places = list_files(patterns, key)
    stored = any(isinstance(place, str) for place in places)
    sources = each(scan, places, stored)
    checked = max(1, min(CHECKED_ROWS, MAX_CHECKED_ROWS // len(sources)))

    def check(source: SourceFile) -> None:
        for number, row in read_rows(source, range(min(source.num_rows, checked)), FIELDS[form]):
            check_row(row, form, f"{source.name}, row {number + 1}")

    each(check, sources, stored)
    return tuple(sources)


def _is_hub(split: SplitConfig) -> bool:
    if isinstance(split.path, str) and split.path.startswith("hf:") and importlib.util.find_spec("datasets") is None:
        raise ConfigError(f"{split.path} needs the datasets package: pip install 'emloc-ray[hub]'.")
    return isinstance(split.path, str) and split.path.startswith("hf:")


def _check_upper_bound(config: RunConfig) -> None:
    bound = config.evaluation.upper_bound
    if bound is None:
        return
    metrics = RunDirectory(bound).existing().metrics()
    if "evaluation" not in metrics or (metrics.get("emulator") or {}).get("compression_ratio") != 1:
        raise ConfigError(
            f"evaluation.upper_bound {bound} is no finished run at ratio 1.0: run the same config with"
            " emulator.compression_ratio=1.0 and another run_dir, and name that."
        )


def _check_training(config: RunConfig) -> dict[str, Any] | None:
    """Has transformers check what is passed through to it, as the workers will; the DeepSpeed config, where there is one."""
    import tempfile

    from transformers import TrainingArguments

    section = config.finetune
    extra = dict(section.model_extra or {})
    ours = section.model_dump(include=set(_BATCHES))
    given = {"use_cpu": True, "report_to": "none", **ours, **extra}
    if section.gpus_per_worker:  # what GPUs can do is known on the workers alone
        given = {key: value for key, value in given.items() if key not in ("bf16", "fp16", "tf32", "optim")}
    with tempfile.TemporaryDirectory() as folder:
        try:
            arguments = TrainingArguments(output_dir=folder, **given)
        except (ValueError, TypeError, ImportError, OSError) as error:
            detail = " ".join(str(error).split())[:200]
            raise ConfigError(f"finetune: transformers refuses its settings ({detail}): mend them.") from error
    _check_reporters([arguments.report_to] if isinstance(arguments.report_to, str) else arguments.report_to or [])
    if section.deepspeed is None:
        return None
    for key in ("use_cpu", "fsdp", "fsdp_config", "accelerator_config", "parallelism_config"):
        if extra.get(key):
            raise ConfigError(f"finetune.{key} does not go with finetune.deepspeed: remove one of them.")
    zero_config = read_zero_config(section.deepspeed)
    wanted = argparse.Namespace(**{**vars(arguments), **extra})
    check_zero_config(section.deepspeed, zero_config, wanted, section.num_workers)
    return zero_config


def _check_reporters(names: list[str]) -> None:
    """Those whom ``finetune.report_to`` names, before the stages ahead of it have taken their hours."""
    from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

    try:
        get_reporting_integration_callbacks(names)
    except ValueError as error:
        raise ConfigError(f"finetune.report_to: {error}") from error
    # transformers does not look for these two by themselves.
    missing = set(names) - {*get_available_reporting_integrations(), "azure_ml", "flyte"}
    if missing:
        raise ConfigError(f"finetune.report_to: {min(missing)} is not installed: install it, or leave it out.")


def _check_resources(config: RunConfig) -> None:
    """What a stage asks of a Ray that is started here must be there, or it would wait for ever."""
    if config.ray.joins:
        return
    import os

    cpus = config.ray.num_cpus or os.cpu_count() or 1
    gpus = torch.cuda.device_count() if config.ray.num_gpus is None else config.ray.num_gpus
    problems = []
    for name in ("calibration", "emulator", "finetune", "merge", "evaluation"):
        section = getattr(config, name)
        together = section.num_workers if name == "finetune" else 1
        if section.cpus_per_worker * together > cpus:
            asked = section.cpus_per_worker * together
            problems.append(
                f"{name} asks Ray for {asked:g} CPUs at once, this machine has {cpus}: lower"
                f" {name}.{'num_workers' if together > 1 else 'cpus_per_worker'}."
            )
        if section.gpus_per_worker * together > gpus:
            asked = section.gpus_per_worker * together
            problems.append(
                f"{name} asks Ray for {asked:g} GPUs at once, this machine has {gpus}: lower {name}.gpus_per_worker,"
                " or name a cluster in ray.address."
            )
    if problems:
        raise ConfigError("\n".join(problems))


def check_disk(run: RunDirectory, needed: int) -> None:
    """Raises ConfigError where the disk of the run directory has less room than the plan says."""
    if run.store is not None:
        return  # the store has room; a node's cache makes its own
    existing = next(parent for parent in itertools.chain([run.root], run.root.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ConfigError(
            f"run_dir {run.root} needs about {needed / 2**30:.1f} GiB, its disk has {free / 2**30:.1f} GiB free:"
            " free some, or name another place."
        )
