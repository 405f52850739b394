"""Checks a config against its model, before a weight moves."""

import dataclasses
import importlib.metadata
import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
import transformers

from emloc_ray.config.schema import RunConfig
from emloc_ray.core.healing import healed_layers
from emloc_ray.data.processors import example, open_processor
from emloc_ray.data.row_formats import CHATS
from emloc_ray.data.token_shards import PAD_MULTIPLE, padded_length
from emloc_ray.errors import ConfigError, EmlocError
from emloc_ray.io.store.shared import Shared
from emloc_ray.modeling.adapter_methods import count_parameters
from emloc_ray.modeling.architecture import empty_model
from emloc_ray.modeling.attention import check_takes_kernel, is_flash, needs_kernel
from emloc_ray.modeling.inputs import has_encoder
from emloc_ray.modeling.liger import check_liger
from emloc_ray.modeling.loading import ModelSource, read_model_config
from emloc_ray.modeling.packing import why_rows_mix
from emloc_ray.modeling.source_checks import check_source
from emloc_ray.planning.emulator_budget import spend_evenly
from emloc_ray.planning.holding import blocks_share
from emloc_ray.planning.layout import Layout, adapter_settings, make_layout
from emloc_ray.planning.model_files import file_dtype_of, named_dtype
from emloc_ray.planning.skeleton import Skeleton, skeleton_of
from emloc_ray.text import one_line


def read_model(config: RunConfig, source: ModelSource) -> tuple[Any, Layout]:
    """The model's transformers config and its layout under this config, from its files' headers alone. Raises ConfigError where
    the model does not go with the config."""
    options = config.model
    looks = source.looks
    opened = source, options.trust_remote_code, options.attn_implementation
    skeleton = _SKELETONS.get((*opened, looks), lambda: _skeleton(*opened))
    if has_encoder(skeleton.config):
        _check_encoder_decoder(config)
    if skeleton.image.row_tokens and config.adapter.is_prompt:
        raise ConfigError(
            f"adapter.method is {config.adapter.method}, whose virtual tokens would move images away from where the model"
            " expects them: choose a method that adapts linears, such as lora."
        )
    _check_length(config, skeleton)
    if config.finetune.packing:
        mixing = _MIXING.get((source, options.trust_remote_code, looks), lambda: _why_rows_mix(*opened[:2]))
        mixing = "shows images beside the text" if skeleton.image.row_tokens else mixing
        if mixing is not None:
            raise ConfigError(
                f"finetune.packing needs a model that keeps packed rows apart, and this one {mixing}: set it to false."
            )
    _check_liger(config, skeleton)
    _check_16_bits(config, source, skeleton)
    layout = make_layout(config, skeleton)
    if config.emulator.budget is not None:
        dtype = file_dtype_of(source) or named_dtype(config, source, skeleton.config)
        layout = spend_evenly(layout, config.emulator, dtype.itemsize)
    _check_names(config, layout, skeleton)
    check_healing(config, layout)
    _check_refinement(config, skeleton)
    if not config.adapter.is_lora:
        settings = adapter_settings(config.adapter, layout, skeleton.config)
        parameters = _PARAMETERS.get(
            (source, options.trust_remote_code, json.dumps(settings, sort_keys=True), looks),
            lambda: _adapter_parameters(source, options.trust_remote_code, settings),
        )
        layout = dataclasses.replace(layout, adapter_parameters=parameters)
    return skeleton.config, layout


def check_formats(config: RunConfig, source: ModelSource, model_config: Any, formats: Collection[str]) -> None:
    """Raises ConfigError where the model takes no rows of one of the ``formats``."""
    chats = [name for name in formats if name in CHATS]
    if chats and source.gguf_file is None:
        _check_template(source, config.model.trust_remote_code, chats[0])
    if "text" in formats and has_encoder(model_config):
        raise ConfigError(
            "data.format is text, and the model reads a prompt with its encoder: use prompt_completion or messages."
        )


def _check_names(config: RunConfig, layout: Layout, skeleton: Skeleton) -> None:
    """PEFT must load what is written, which is LoRA, or becomes that when it is corrected."""
    renamed = set(skeleton.renamed).intersection(layout.adapted)
    if renamed and (config.adapter.is_lora or config.adapter.is_additive):
        ends = ", ".join(sorted({".".join(name.split(".")[-2:]) for name in renamed}))
        raise ConfigError(
            f"adapter: PEFT {importlib.metadata.version('peft')} would not load what is trained for {len(renamed)} linears of"
            f" this model ({min(renamed)}), as it looks for them under other names: set adapter.exclude_modules to [{ends}]."
        )


def _check_liger(config: RunConfig, skeleton: Skeleton) -> None:
    extra = config.finetune.model_extra or {}
    if extra.get("use_liger_kernel"):
        experts = any(spec.routed_share is not None for spec in skeleton.specs)
        check_liger(skeleton.config.model_type, experts, extra.get("liger_kernel_config"))


def _check_16_bits(config: RunConfig, source: ModelSource, skeleton: Skeleton) -> None:
    """FlashAttention computes in 16 bits alone. Passes on a GPU load a float32 checkpoint in bfloat16; a training without
    autocast does not."""
    name, finetune = config.model.attn_implementation, config.finetune
    if not is_flash(name):
        return
    alone = f"model.attn_implementation: {name} computes in 16 bits alone, and"
    if config.model.dtype == "float32":
        raise ConfigError(f"{alone} model.dtype is float32: leave one of them out.")
    autocasts = finetune.bf16 is not False or (finetune.model_extra or {}).get("fp16")
    dtype = file_dtype_of(source) or named_dtype(config, source, skeleton.config)
    if config.model.dtype == "auto" and not autocasts and dtype == torch.float32:
        raise ConfigError(
            f"{alone} finetune.bf16: false trains this float32 checkpoint in float32: leave it at auto, or set model.dtype to"
            " bfloat16."
        )


def _check_length(config: RunConfig, skeleton: Skeleton) -> None:
    """Rows and a prompt's virtual tokens must fit the model's positions; a model that computes positions takes any row, and
    with a prompt those that it was made for."""
    length, positions = config.data.max_seq_length, skeleton.positions
    virtual = config.adapter.settings.get("num_virtual_tokens", 0) if config.adapter.is_prompt else 0
    if virtual and positions is None:
        positions = getattr(skeleton.config.get_text_config(), "max_position_embeddings", None)
    if positions is None or padded_length(length) + virtual <= positions:
        return
    fits = (positions - virtual) // PAD_MULTIPLE * PAD_MULTIPLE
    if virtual:
        raise ConfigError(
            f"data.max_seq_length is {length}, {virtual} virtual tokens come before, and the model has {positions}"
            f" positions: lower it to {fits}, or adapter.num_virtual_tokens."
        )
    raise ConfigError(f"data.max_seq_length is {length}, the model has {positions} positions: lower it to {fits}.")


# Most tasks of a batch have the same model.
_SKELETONS, _MIXING, _PARAMETERS = Shared[Skeleton](8), Shared[str | None](8), Shared[int](8)
_LACKING = Shared[str | None](8)


def _adapter_parameters(source: ModelSource, trust_remote_code: bool, settings: Mapping[str, Any]) -> int:
    """The number of parameters that an adapter trains; raises ConfigError where it does not fit the model."""
    model = empty_model(read_model_config(source, trust_remote_code), trust_remote_code)
    return count_parameters(model, settings["method"], {name: settings[name] for name in settings if name != "method"})


def _why_rows_mix(source: ModelSource, trust_remote_code: bool) -> str | None:
    return why_rows_mix(empty_model(read_model_config(source, trust_remote_code), trust_remote_code))


def check_healing(config: RunConfig, layout: Layout) -> None:
    """Raises ConfigError where the healing has no factors to grow."""
    healing = config.emulator.heals
    if healing is not None and not healed_layers(layout.ranks, healing.r):
        budget, highest = config.emulator.budget, max(layout.ranks.values(), default=0)
        if budget is not None and not highest:
            raise ConfigError(
                f"emulator.healing grows factors of a rank above healing.r ({healing.r}), and emulator.budget: {budget} leaves"
                " room for whole weights instead: remove healing, or give a smaller budget."
            )
        raise ConfigError(
            f"emulator.healing.r is {healing.r}, and no linear's rank is above it (the highest is {highest}): lower it, or"
            f" {'raise emulator.compression_ratio' if budget is None else 'remove healing'}."
        )


def _check_refinement(config: RunConfig, skeleton: Skeleton) -> None:
    if config.emulator.refines is not None and blocks_share(skeleton.config, config.model.trust_remote_code):
        raise ConfigError(
            "emulator.refinement takes one block after another, and this model's blocks read what is inside others: remove it."
        )


def _check_template(source: ModelSource, trust_remote_code: bool, format: str) -> None:
    """Messages need a chat template of the model: its processor's, or its tokenizer's."""
    key = source, trust_remote_code, source.looks
    lacking = _LACKING.get(key, lambda: _lacks_template(source, trust_remote_code))
    if lacking is not None:
        raise ConfigError(
            f"data.format is {format}, and the model's {lacking} no chat template: save one beside the model as"
            " chat_template.jinja, or use data.format prompt_completion or text."
        )


def _lacks_template(source: ModelSource, trust_remote_code: bool) -> str | None:
    """Which of the model's parts have no chat template, with the verb; None where one has."""
    from transformers import AutoTokenizer

    processor = open_processor(str(source.directory), trust_remote_code)
    if processor is not None and processor.chat_template:
        return None
    tokenizer = AutoTokenizer.from_pretrained(source.directory, trust_remote_code=trust_remote_code)
    if tokenizer.chat_template:
        return None
    return "tokenizer has" if processor is None else "processor and tokenizer have"


def _check_encoder_decoder(config: RunConfig) -> None:
    """A model with an encoder reads a row's prompt there."""
    if config.data.packing:
        raise ConfigError("data.packing joins rows, which a model with an encoder cannot tell apart: set it to false.")
    if config.finetune.loss_on == "all":
        raise ConfigError(
            "finetune.loss_on is all, and a model with an encoder predicts the completion alone: set it to completion."
        )
    if config.calibration.tokens == "completion":
        raise ConfigError(
            "calibration.tokens is completion, and a model's encoder reads the prompt alone: set it to all."
        )
    if config.adapter.is_prompt:
        raise ConfigError(
            f"adapter.method is {config.adapter.method}, whose virtual tokens go with decoder-only models: choose a method"
            " that adapts linears, such as lora."
        )


def _skeleton(source: ModelSource, trust_remote_code: bool, attn_implementation: str | None) -> Skeleton:
    model_config = read_model_config(source, trust_remote_code)
    kernel = attn_implementation if needs_kernel(attn_implementation) else None
    try:
        model = empty_model(model_config, trust_remote_code, attn_implementation if kernel is None else None)
    except ConfigError:
        raise
    except Exception as error:  # a model's class takes its config's numbers for good ones
        raise ConfigError(
            f"model: transformers cannot build it ({one_line(error)}): fix the model section, or the model's config.json."
        ) from error
    if kernel is not None:
        check_takes_kernel(model, kernel)
    check_source(source, model, trust_remote_code)
    shown = None if source.gguf_file else example(source.directory, trust_remote_code)
    try:
        return skeleton_of(model_config, model, shown, trust_remote_code)
    except EmlocError:
        raise
    except Exception as error:  # a model's code may be wrong for text, or for what its config says
        raise ConfigError(
            f"model: {type(model).__name__} of transformers {transformers.__version__} cannot be run ({one_line(error)}): fix"
            " the model's config.json, or install a transformers that runs it."
        ) from error
