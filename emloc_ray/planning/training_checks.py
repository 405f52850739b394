"""Checks what a config passes on to transformers and DeepSpeed, before anything starts."""

import argparse
import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from emloc_ray.config.schema import RunConfig
from emloc_ray.errors import ConfigError
from emloc_ray.modeling.compiling import KEYS, is_compiled
from emloc_ray.modeling.zero_config import check_zero_config, read_zero_config
from emloc_ray.text import listed, one_line

# What optimizer and schedule are made from.
_OPTIMIZER = ("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon")
_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs")
_SOME_STEPS = 100
_BATCHES = ("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate")
_STATE = threading.Lock()  # two checks at once would each put back what the other left


@contextlib.contextmanager
def _accelerate_s_state_kept() -> Iterator[None]:
    """Puts back accelerate's state of this process, which TrainingArguments sets anew and every Accelerator reads."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    with _STATE:
        states = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
        before = [dict(state) for state in states]
        try:
            yield
        finally:
            for state, values in zip(states, before, strict=True):  # in place, as instances share the dict
                state.clear()
                state.update(values)


@_accelerate_s_state_kept()
def check_training(config: RunConfig) -> dict[str, Any] | None:
    """Makes transformers check its arguments as the workers would; returns the DeepSpeed config, if any."""
    import tempfile

    from transformers import TrainingArguments

    section = config.finetune
    extra = dict(section.model_extra or {})
    ours = section.model_dump(include=set(_BATCHES))
    extra["bf16"] = section.bf16 is True
    given = {"use_cpu": True, "report_to": "none", **ours, **extra}
    scores: dict[str, Any] = {"eval_strategy": section.eval_strategy, "eval_steps": section.scores_every}
    if section.bf16 is True and extra.get("fp16"):
        raise ConfigError("finetune.fp16 and finetune.bf16 are both true: set one of them to false.")
    if section.gpus:  # only workers know what their GPUs can do, and what is installed beside them
        unknown = {"bf16", "fp16", "tf32", *(("optim",) if config.ray.joins else ())}
        given = {key: value for key, value in given.items() if key not in unknown}
    with tempfile.TemporaryDirectory() as folder:
        try:
            arguments = TrainingArguments(output_dir=folder, **scores, **given)
        except (ValueError, TypeError, ImportError, OSError) as error:
            detail = one_line(error)
            raise ConfigError(f"finetune: transformers refuses its settings ({detail}): fix them.") from error
        if config.emulator.heals is not None and section.validates:
            _check_unscored(TrainingArguments, {"output_dir": folder, **given, "eval_on_start": False})
    _check_made(arguments, extra)
    if section.deepspeed is None and not {*_OPTIMIZER, *_SCHEDULE}.isdisjoint(extra):
        _check_steps(arguments, extra)
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
        own = healing.model_dump(include={*_BATCHES}, exclude_none=True)
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


def _check_unscored(kind: Callable[..., Any], given: dict[str, Any]) -> None:
    """Raises ConfigError where the healing, which is not scored, cannot train by the settings of a training that is."""
    try:
        kind(**given)
    except ValueError as error:
        raise ConfigError(
            "emulator.healing trains by finetune's settings, but without scores, and transformers refuses that"
            f" ({one_line(error)}): give finetune other settings, or remove emulator.healing."
        ) from error


def _attempt(extra: Mapping[str, Any], keys: Sequence[str], make: Callable[[], Any]) -> None:
    """Raises ConfigError, which names the ``keys`` that are given, where something cannot be made of them."""
    try:
        make()
    except Exception as error:  # each library raises what it likes
        given = listed([f"finetune.{key}: {extra[key]}" for key in keys if key in extra], len(keys))
        raise ConfigError(f"{given} cannot be used ({one_line(error)}): change that.") from error


def _check_made(arguments: Any, extra: Mapping[str, Any]) -> None:
    """Makes what the Trainer and torch.compile make of settings that TrainingArguments takes as they are. Not a Trainer: that
    imports DeepSpeed where it is installed."""
    import torch
    from accelerate.utils import GradientAccumulationPlugin

    def compiled() -> None:
        backend = extra.get("torch_compile_backend") or "inductor"
        torch.compile(torch.nn.Identity(), backend=backend, mode=extra.get("torch_compile_mode"))

    accumulation = arguments.accelerator_config.gradient_accumulation_kwargs or {}
    _attempt(extra, ("accelerator_config",), lambda: GradientAccumulationPlugin(**accumulation))
    _attempt(extra, ("warmup_steps",), lambda: arguments.get_warmup_steps(_SOME_STEPS))
    if is_compiled(extra):
        _attempt(extra, KEYS, compiled)


def _check_steps(arguments: Any, extra: Mapping[str, Any]) -> None:
    """Makes the optimizer and the schedule of one weight, as the Trainer makes a training's. Raises ConfigError where they
    refuse their settings or miss a package, which the training would find only once the emulator is made."""
    import torch
    from transformers import Trainer, get_scheduler

    with torch.random.fork_rng(devices=[]):  # the caller's numbers are its own
        model: Any = torch.nn.Linear(1, 1)

    def optimizer() -> None:
        try:
            kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        except ValueError:
            if arguments.optim_target_modules is None:
                raise
            return  # it looks for linears of the model
        plain = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
        if plain and {"params", "model"}.isdisjoint(options):
            kind(model.parameters(), **options)

    def schedule() -> None:
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer=torch.optim.SGD(model.parameters(), lr=arguments.learning_rate),
            num_warmup_steps=arguments.get_warmup_steps(_SOME_STEPS),
            num_training_steps=_SOME_STEPS,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
        )

    _attempt(extra, _OPTIMIZER, optimizer)
    _attempt(extra, _SCHEDULE, schedule)


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
