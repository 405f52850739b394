"""Whether an emulator can be made of a model's checkpoint, by its configs, its index and its files' headers."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from emloc_ray.errors import ConfigError
from emloc_ray.io.formats.checkpoint import Checkpoint, read_index
from emloc_ray.modeling.architecture import block_linears, outside_linears
from emloc_ray.modeling.loading import ModelSource, open_tokenizer
from emloc_ray.modeling.stored_names import StoredParameter, missing_parameters, stored_parameters

_WEIGHTS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_CODES = "and codes are no weights to factorize or to merge into: name the checkpoint that it was made from"
_LESS_MEMORY = "emulator.quantization: nf4 is for less memory"


def check_source(source: ModelSource, model: Any, trust_remote_code: bool = False) -> None:
    """Raises ConfigError where no emulator can be made of a model: the checkpoint is stored quantized, its code comes with it,
    it lacks parameters that ``model`` (on the meta device) has, which transformers would fill with random numbers, its shapes
    are not those of ``model``, or it has no tokenizer."""
    if source.gguf_file is not None:
        return
    _check_kind(source, model.config)
    if source.hub_id is None and not source.only_index:
        check_weights(source, model, source.directory)
    elif names := read_index(source.directory):
        _check_names(source, model, stored_parameters(model, names))
    if not source.only_index:
        open_tokenizer(source, "save one beside the weights", trust_remote_code=trust_remote_code)


def check_weights(source: ModelSource, model: Any, directory: Path) -> None:
    """As :func:`check_source`, of the weights alone: those in ``directory``, once a model of the hub is there."""
    checkpoint = Checkpoint(directory)
    stored = stored_parameters(model, {entry.name: entry.shape for entry in checkpoint})
    _check_names(source, model, stored)
    _check_tensors(source, model, stored, checkpoint)


def _check_names(source: ModelSource, model: Any, stored: Mapping[str, StoredParameter]) -> None:
    _check_linears(source, model, stored)
    _check_others(source, model, stored)


def _check_kind(source: ModelSource, config: Any) -> None:
    stored_as, inner = (getattr(c, "quantization_config", None) for c in (config, config.get_text_config()))
    if stored_as := stored_as or inner:
        method = stored_as.get("quant_method") if isinstance(stored_as, dict) else type(stored_as).__name__
        known = AUTO_QUANTIZATION_CONFIG_MAPPING.get(str(method))
        undone = ""
        if known is not None and "dequantize" in inspect.signature(known).parameters:
            undone = (
                ", or open it with transformers' from_pretrained(…, quantization_config="
                f"{known.__name__}(dequantize=True)) and name what save_pretrained writes"
            )
        raise ConfigError(
            f"model.source {source.name} is stored quantized ({method}), {_CODES}{undone}; {_LESS_MEMORY}."
        )
    if type(config).__module__.startswith("transformers_modules"):
        raise ConfigError(
            f"model.source {source.directory} is of the type {config.model_type}, whose code comes with the model: an"
            " emulator is opened by transformers' own classes; name a model of a type that transformers knows."
        )
    if getattr(config, "rescale_every", 0):
        raise ConfigError(
            f"model.source {source.directory} is of the type {config.model_type}, which divides its own weights when it"
            " predicts: set rescale_every to 0 in its config.json."
        )


def _check_linears(source: ModelSource, model: Any, stored: Mapping[str, StoredParameter]) -> None:
    head = model.get_output_embeddings()  # which may be the embedding itself
    outside = [name for name in outside_linears(model) if model.get_submodule(name) is not head]
    names = [*(spec.weight_name for spec in block_linears(model)), *(f"{name}.weight" for name in outside)]
    missing = [name for name in names if name not in stored]
    if missing:
        if (other := model.all_tied_weights_keys.get(missing[0])) in stored:
            raise ConfigError(
                f"model.source {source.name} is of the type {model.config.model_type}, whose blocks share weights ({missing[0]}"
                f" is {other}), and no emulator of such is made: name another model."
            )
        raise ConfigError(
            f"model.source {source.name} holds no {missing[0]} ({len(missing)} linears of config.json's model are"
            " missing): copy the checkpoint again, fix config.json, or name another."
        )
    shared = {f"{name}.weight" for name in outside if isinstance(stored[f"{name}.weight"].part, tuple)}
    converted = next((name for name in names if not stored[name].parts or name in shared), None)
    if converted is not None:
        raise ConfigError(
            f"model.source {source.name} holds {converted} in a form that only transformers can convert: load it with"
            " transformers, save it again with save_pretrained(save_original_format=False), and name that."
        )


def _check_others(source: ModelSource, model: Any, stored: Mapping[str, StoredParameter]) -> None:
    if missing := missing_parameters(model, stored):
        raise ConfigError(
            f"model.source {source.name} lacks {missing[0]} (parameters missing in all: {len(missing)}), which"
            " transformers would fill with random numbers: copy it again, or name a checkpoint with a language-model head."
        )


def _check_tensors(
    source: ModelSource, model: Any, stored: Mapping[str, StoredParameter], checkpoint: Checkpoint
) -> None:
    """Raises ConfigError where tensors are of other shapes than ``model``'s, or hold codes in place of weights."""
    own = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    for name, parameter in stored.items():
        held = [checkpoint.entry(part) for parts in parameter.parts for part in parts]
        codes = next((e for e in held if own[name].is_floating_point() and e.dtype not in _WEIGHTS), None)
        if codes is not None:
            kind = str(codes.dtype).removeprefix("torch.")
            raise ConfigError(f"model.source {source.name} holds {codes.name} in {kind}, {_CODES}; {_LESS_MEMORY}.")
        shape = checkpoint.entry(parameter.own_name).shape if parameter.own_name else shapes[name]
        if shape != shapes[name]:
            raise ConfigError(
                f"model.source {source.name}: {parameter.own_name} is of shape {list(shape)}, config.json asks for"
                f" {list(shapes[name])}: the two are not of one model."
            )
