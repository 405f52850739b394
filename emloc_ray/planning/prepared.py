"""Everything that can be known before a weight moves: the model's layers, the patterns' matches, the data's first rows.

All of it is checked before Ray starts and before anything is written, and every error is told at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from emloc_ray.config.schema import WORKER_SECTIONS, RunConfig
from emloc_ray.core.healing import healed_layers
from emloc_ray.data.processors import example, open_processor
from emloc_ray.data.reading import SourceFile
from emloc_ray.data.splits import SPLITS
from emloc_ray.data.token_shards import PAD_MULTIPLE, padded_length
from emloc_ray.errors import ConfigError, EmlocError
from emloc_ray.io.formats.checkpoint import SINGLE_NAME, read_index, read_shard
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.modeling.adapter_methods import count_parameters
from emloc_ray.modeling.architecture import empty_model
from emloc_ray.modeling.inputs import has_encoder
from emloc_ray.modeling.loading import ModelSource, check_source, read_model_config, resolve_source
from emloc_ray.modeling.zero_config import check_zero_config, read_zero_config
from emloc_ray.planning.data_checks import check_held_out, check_split
from emloc_ray.planning.layout import Layout, Skeleton, adapter_settings, make_layout, skeleton_of
from emloc_ray.text import size, size_up

UNKNOWN_ROWS = 8000  # of a split that is made or downloaded later
_BATCHES = ("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate")
Result = TypeVar("Result")


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
    file_dtype: torch.dtype | None = None  # of the model's files, where they are here and safetensors

    def calibration_tokens(self, tokens_per_row: float) -> float:
        """Tokens that calibration will see, at a mean of so many a row: the least of what the config bounds them by."""
        section = self.config.calibration
        files = self.files.get("calibration") or self.files.get("train")
        rows = sum(source.num_rows for source in files) if files else UNKNOWN_ROWS
        tokens = (section.num_calibration_samples or rows) * tokens_per_row
        return min(tokens, section.num_calibration_tokens or tokens)


def splits_of(config: RunConfig) -> tuple[str, ...]:
    """The splits that a run has rows of: one for the healing alone where it heals and such rows are named."""
    return (*SPLITS, "healing") if config.data.healing is not None and config.emulator.heals is not None else SPLITS


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
    reads_images = found is None or found[1].image.row_tokens > 0
    if config.data.generate == "vqa" and not reads_images:
        errors.append("data.generate: vqa shows images, which the model has no processor for: choose one that has.")
    files = {name: attempt(lambda name=name: check_split(config, name, reads_images)) for name in splits_of(config)}  # type: ignore[misc]
    attempt(lambda: check_held_out(config, files))
    attempt(lambda: _check_upper_bound(config))
    attempt(lambda: _check_resources(config))
    attempt(lambda: _check_quantization(config))
    zero_config = attempt(lambda: _check_training(config))
    file_dtype = None if source is None else attempt(lambda: _file_dtype(source))
    if errors or source is None or found is None:
        raise ConfigError("\n".join(dict.fromkeys(errors)))  # splits may share a bad file
    known = {name: sources for name, sources in files.items() if sources}
    return Prepared(config, run, source, found[0], found[1], known, zero_config, file_dtype)


def _file_dtype(source: ModelSource) -> torch.dtype | None:
    if source.gguf_file is not None:
        return None
    file = source.directory / min(read_index(source.directory).values(), default=SINGLE_NAME)
    if not file.is_file():  # of the hub, and not fetched yet
        return None
    return next((entry.dtype for entry in read_shard(file).entries if entry.dtype.is_floating_point), None)


def _read_model(config: RunConfig, source: ModelSource) -> tuple[Any, Layout]:
    options = config.model
    found = _skeleton(source, options.trust_remote_code, options.attn_implementation, _look(source))
    if has_encoder(found.config):
        _check_encoder_decoder(config)
    if found.image.row_tokens and config.adapter.is_prompt:
        raise ConfigError(
            f"adapter.method is {config.adapter.method}, whose virtual tokens would move a model's images from where it looks"
            " for them: choose a method that adapts linears, as lora."
        )
    _check_length(config, found)
    if config.data.format == "messages" and source.gguf_file is None:
        _check_template(source, options.trust_remote_code)
    layout = make_layout(config, found)
    _check_healing(config, layout)
    if not config.adapter.is_lora:
        settings = json.dumps(adapter_settings(config.adapter, layout, found.config), sort_keys=True)
        parameters = _adapter_parameters(source, options.trust_remote_code, settings, _look(source))
        layout = dataclasses.replace(layout, adapter_parameters=parameters)
    return found.config, layout


def _check_length(config: RunConfig, found: Skeleton) -> None:
    """Rows, and a prompt's virtual tokens before them, have to lie within the model's positions; where it computes those,
    for any number of them, the prompt has to leave rows within what it was made for."""
    length, positions = config.data.max_seq_length, found.positions
    virtual = config.adapter.settings.get("num_virtual_tokens", 0) if config.adapter.is_prompt else 0
    if virtual and positions is None:
        positions = getattr(found.config.get_text_config(), "max_position_embeddings", None)
    if positions is None or padded_length(length) + virtual <= positions:
        return
    fits = (positions - virtual) // PAD_MULTIPLE * PAD_MULTIPLE
    if virtual:
        raise ConfigError(
            f"data.max_seq_length is {length}, with {virtual} virtual tokens before them, the model has {positions}"
            f" positions: lower it to {fits}, or adapter.num_virtual_tokens."
        )
    raise ConfigError(f"data.max_seq_length is {length}, the model has {positions} positions: lower it to {fits}.")


@functools.lru_cache(maxsize=8)
def _adapter_parameters(
    source: ModelSource, trust_remote_code: bool, settings: str, files: tuple[tuple[str, int, int], ...]
) -> int:
    """How many parameters an adapter trains; raises ConfigError where it does not fit the model."""
    named = json.loads(settings)
    model = empty_model(read_model_config(source, trust_remote_code), trust_remote_code)
    return count_parameters(model, named.pop("method"), named)


def _check_healing(config: RunConfig, layout: Layout) -> None:
    healing = config.emulator.heals
    if healing is not None and not healed_layers(layout.ranks, healing.r):
        highest = max(layout.ranks.values(), default=0)
        raise ConfigError(
            f"emulator.healing.r is {healing.r}, and no linear's rank is above it (the highest is {highest}): lower it, or"
            " raise emulator.compression_ratio."
        )


def _check_template(source: ModelSource, trust_remote_code: bool) -> None:
    """Messages are written out by a chat template of the model's own: its processor's, or its tokenizer's."""
    from transformers import AutoTokenizer

    processor = open_processor(str(source.directory), trust_remote_code)
    if processor is not None and processor.chat_template:
        return
    tokenizer = AutoTokenizer.from_pretrained(source.directory, trust_remote_code=trust_remote_code)
    if not tokenizer.chat_template:
        owner = "tokenizer has" if processor is None else "processor and tokenizer have"
        raise ConfigError(
            f"data.format is messages, and the model's {owner} no chat template: save one beside the model as"
            " chat_template.jinja, or use data.format prompt_completion or text."
        )


def _check_encoder_decoder(config: RunConfig) -> None:
    """A model with an encoder reads a row's prompt there."""
    if config.data.format == "text":
        raise ConfigError(
            "data.format is text, and the model reads a prompt with its encoder: use prompt_completion or messages."
        )
    if config.data.packing:
        raise ConfigError("data.packing joins rows, which a model with an encoder cannot tell apart: set it to false.")
    if config.adapter.is_prompt:
        raise ConfigError(
            f"adapter.method is {config.adapter.method}, whose virtual tokens are for models that are a decoder alone: choose"
            " a method that adapts linears, as lora."
        )


def _look(source: ModelSource) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the files that a model is read from."""
    named = [source.directory / source.gguf_file] if source.gguf_file else sorted(source.directory.iterdir())
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in named if file.is_file())


@functools.lru_cache(maxsize=8)  # of hundreds of tasks, most have the same model
def _skeleton(
    source: ModelSource,
    trust_remote_code: bool,
    attn_implementation: str | None,
    files: tuple[tuple[str, int, int], ...],
) -> Skeleton:
    model_config = read_model_config(source, trust_remote_code)
    try:
        model = empty_model(model_config, trust_remote_code, attn_implementation)
    except (ValueError, ImportError) as error:
        detail = " ".join(str(error).split())[:200]
        raise ConfigError(f"model: transformers cannot build it ({detail}): mend the model section.") from error
    check_source(source, model, trust_remote_code)
    shown = None if source.gguf_file else example(source.directory, trust_remote_code)
    return skeleton_of(model_config, model, shown, trust_remote_code)


def _check_upper_bound(config: RunConfig) -> None:
    bound = config.evaluation.upper_bound
    if bound is None:
        return
    metrics = RunDirectory(bound).existing().metrics()
    emulator = metrics.get("emulator") or {}
    whole = emulator.get("compression_ratio") == 1 and emulator.get("quantization", "none") == "none"
    if "evaluation" not in metrics or not whole:
        raise ConfigError(
            f"evaluation.upper_bound {bound} is no finished run at ratio 1.0: run the same config with"
            " emulator.compression_ratio=1.0, not quantized, and another run_dir, and name that."
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
    for key in ("use_cpu", "accelerator_config"):
        if extra.get(key):
            raise ConfigError(f"finetune.{key} does not go with finetune.deepspeed: remove one of them.")
    zero_config = read_zero_config(section.deepspeed)
    wanted = argparse.Namespace(**{**vars(arguments), **extra})
    check_zero_config(section.deepspeed, zero_config, wanted, section.num_workers)
    if (healing := config.emulator.heals) is not None:  # trains under the same
        learned = healing.model_dump(include={"learning_rate", "per_device_train_batch_size"}, exclude_none=True)
        wanted = argparse.Namespace(**{**vars(wanted), **learned})
        check_zero_config(section.deepspeed, zero_config, wanted, section.num_workers, "emulator.healing")
    if config.emulator.quantization != "none" and zero_config["zero_optimization"]["stage"] == 3:
        raise ConfigError(
            f"finetune.deepspeed {section.deepspeed} is ZeRO stage 3, which cannot scatter weights in 4 bits: give stage 2,"
            " or set emulator.quantization to none."
        )
    return zero_config


def _check_quantization(config: RunConfig) -> None:
    wanted = config.emulator.quantization
    if wanted != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"emulator.quantization: {wanted} needs the bitsandbytes package: pip install 'emloc-ray[quantization]'."
        )


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
    cpus = config.ray.num_cpus or os.cpu_count() or 1
    gpus = torch.cuda.device_count() if config.ray.num_gpus is None else config.ray.num_gpus
    check_resources(config, cpus, gpus)


def check_resources(config: RunConfig, cpus: float, gpus: float) -> None:
    """Raises ConfigError where a stage asks a Ray that is started here for more than it has: it would wait for ever."""
    if config.ray.joins:
        return
    problems = []
    for name in WORKER_SECTIONS:
        section = getattr(config, name)
        together = section.num_workers if name == "finetune" else 1
        if section.cpus_per_worker * together > cpus:
            asked = section.cpus_per_worker * together
            problems.append(
                f"{name} asks Ray for {asked:g} CPUs at once, this machine has {cpus:g}: lower"
                f" {name}.{'num_workers' if together > 1 else 'cpus_per_worker'}."
            )
        if section.gpus_per_worker * together > gpus:
            asked = section.gpus_per_worker * together
            problems.append(
                f"{name} asks Ray for {asked:g} GPUs at once, this machine has {gpus:g}: lower {name}.gpus_per_worker,"
                " name a cluster in ray.address, or, to plan for another machine, give ray.num_gpus."
            )
    if problems:
        raise ConfigError("\n".join(problems))


def check_disk(run: RunDirectory, needed: int) -> None:
    """Raises ConfigError where the disk of the run directory has less room than is ``needed``, in bytes."""
    existing = next(parent for parent in itertools.chain([run.root], run.root.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ConfigError(
            f"run_dir {run.root} needs about {size_up(needed)}, its disk has {size(free)} free:"
            " free some, or name another place."
        )
