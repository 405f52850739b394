"""Checks what a config passes on to transformers and DeepSpeed, before anything starts."""

import argparse
from typing import Any

from emloc_ray.config.schema import RunConfig
from emloc_ray.errors import ConfigError
from emloc_ray.modeling.zero_config import check_zero_config, read_zero_config
from emloc_ray.text import one_line

_BATCHES = ("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate")


def check_training(config: RunConfig) -> dict[str, Any] | None:
    """Makes transformers check its arguments as the workers would; returns the DeepSpeed config, if any."""
    import tempfile

    from transformers import TrainingArguments

    section = config.finetune
    extra = dict(section.model_extra or {})
    ours = section.model_dump(include=set(_BATCHES))
    extra["bf16"] = section.bf16 is True
    given = {"use_cpu": True, "report_to": "none", **ours, **extra}
    if section.gpus:  # only workers know what their GPUs can do
        given = {key: value for key, value in given.items() if key not in ("bf16", "fp16", "tf32", "optim")}
    with tempfile.TemporaryDirectory() as folder:
        try:
            arguments = TrainingArguments(output_dir=folder, **given)
            _make_schedule(arguments)
        except (ValueError, TypeError, ImportError, OSError) as error:
            detail = one_line(error)
            raise ConfigError(f"finetune: transformers refuses its settings ({detail}): fix them.") from error
    if extra.get("use_liger_kernel") and not section.gpus and not config.ray.joins:
        raise ConfigError("finetune.use_liger_kernel is of kernels for GPUs, and finetune has none: remove it.")
    _check_reporters([arguments.report_to] if isinstance(arguments.report_to, str) else arguments.report_to or [])
    if section.deepspeed is None:
        return None
    for key in ("use_cpu", "accelerator_config"):
        if extra.get(key):
            raise ConfigError(f"finetune.{key} does not go with finetune.deepspeed: remove one of them.")
    zero_config = read_zero_config(section.deepspeed)
    asked = zero_config.get("bf16")  # which auto follows
    follows = section.bf16 == "auto" and isinstance(asked, dict) and asked.get("enabled") is True
    extra["bf16"] = section.bf16 is True or follows
    training = argparse.Namespace(**{**vars(arguments), **extra})
    check_zero_config(section.deepspeed, zero_config, training, section.num_workers)
    if (healing := config.emulator.heals) is not None:  # trains under the same config
        own = healing.model_dump(include={"learning_rate", "per_device_train_batch_size"}, exclude_none=True)
        training = argparse.Namespace(**{**vars(training), **own})
        check_zero_config(section.deepspeed, zero_config, training, section.num_workers, "emulator.healing")
    emulator = config.emulator
    if (emulator.quantization != "none" or emulator.budget) and zero_config["zero_optimization"]["stage"] == 3:
        what = "remove emulator.budget" if emulator.budget else "set emulator.quantization to none"
        raise ConfigError(
            f"finetune.deepspeed {section.deepspeed} is ZeRO stage 3, which cannot scatter weights in few bits: give stage 2,"
            f" or {what}."
        )
    return zero_config


def _make_schedule(arguments: Any) -> None:
    """Raises TypeError or ValueError where ``lr_scheduler_kwargs`` are another schedule's than ``lr_scheduler_type``."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], arguments.learning_rate)
    get_scheduler(arguments.lr_scheduler_type, optimizer, 1, 10, arguments.lr_scheduler_kwargs)


def _check_reporters(names: list[str]) -> None:
    """Raises ConfigError where ``finetune.report_to`` names an unknown or missing integration."""
    from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

    try:
        get_reporting_integration_callbacks(names)
    except ValueError as error:
        raise ConfigError(f"finetune.report_to: {error}") from error
    # transformers does not check these two.
    missing = set(names) - {*get_available_reporting_integrations(), "azure_ml", "flyte"}
    if missing:
        raise ConfigError(f"finetune.report_to: {min(missing)} is not installed: install it, or leave it out.")
