"""Adapters on live models, through PEFT: attached to factorized layers or to an original's, loaded, detached, saved.

Which methods there are is in ``adapter_methods.py``, how they sit on factors in ``adapter_layers.py``, their files in
``adapter_files.py``.
"""

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor

from emloc_ray.errors import ArtifactError
from emloc_ray.io.store.atomic import atomic_directory
from emloc_ray.io.store.node_cache import ensure
from emloc_ray.modeling.adapter_files import CONFIG_NAME
from emloc_ray.modeling.adapter_layers import attachable, start_magnitudes
from emloc_ray.modeling.expert_adapters import as_linears, readable, store_as_peft_does
from emloc_ray.modeling.matching import Patterns, suffixes
from emloc_ray.text import one_line


def attach_adapter(model: Any, config: PeftConfig) -> PeftModel:
    """A fresh adapter on an emulator or an original."""
    flag = getattr(config, "fan_in_fan_out", None)
    with attachable(model, config), as_linears():
        attached = get_peft_model(model, config, low_cpu_mem_usage=False)
    start_magnitudes(attached)
    if flag is not None:  # of the original's linears, which is what the saved config is for
        config.fan_in_fan_out = flag  # type: ignore[attr-defined]
    return attached


def load_adapter(
    model: Any, directory: Path, *, trainable: bool = False, lora_dropout: float | None = None
) -> PeftModel:
    """A saved adapter, frozen unless ``trainable``, on an emulator or on its original, and on its device: it is read on the
    CPU, for PEFT reads it on the first GPU, whichever one the model is on. ``lora_dropout`` is that of a training where the
    files have none, as those of experts' adapters. Raises ArtifactError where PEFT does not load all of it."""
    ensure(Path(directory))
    with readable(Path(directory), model) as folder:
        config: Any = PeftConfig.from_pretrained(str(folder))
        if lora_dropout is not None:
            config.lora_dropout = lora_dropout
        prompts = config.is_prompt_learning  # which PEFT opens to be used alone, its encoder trainable all the same
        with attachable(model, config), as_linears(), _whole(directory):
            loaded = PeftModel.from_pretrained(
                model, folder, config=config, is_trainable=trainable and not prompts, torch_device="cpu"
            )
    if not trainable:
        return loaded.requires_grad_(False)
    config.inference_mode = False
    return loaded


def read_adapter(model: PeftModel, directory: Path) -> None:
    """Gives an adapter that is trained the numbers of a saved one, which is read on the CPU as by :func:`load_adapter`."""
    read = model.load_adapter(str(directory), model.active_adapter, is_trainable=True, torch_device="cpu")
    if read.missing_keys:
        raise _not_whole(directory, read.missing_keys[0])


@contextlib.contextmanager
def _whole(directory: Path) -> Iterator[None]:
    """Raises ArtifactError where PEFT, which warns, leaves modules of an adapter at their start."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys", UserWarning)
        try:
            yield
        except UserWarning as warning:
            raise _not_whole(directory, str(warning)) from warning


def _not_whole(directory: Path, what: str) -> ArtifactError:
    return ArtifactError(
        f"{directory}: PEFT {peft.__version__} does not load all of this adapter ({one_line(what)}): name these linears in"
        " adapter.exclude_modules, or install the PEFT that wrote it."
    )


def detach_adapter(model: PeftModel) -> Any:
    """The model below its adapters, which are gone from it."""
    return model.get_base_model() if model.active_peft_config.is_prompt_learning else model.unload()


def save_trained_adapter(
    model: PeftModel, directory: Path, *, targets: Patterns, base_model: str, state: dict[str, Tensor] | None = None
) -> None:
    """Saves the adapter as trained, under the original's module names and with portable ``target_modules``. ``state`` are its
    parameters by name, where those of ``model`` itself are scattered over processes."""
    with atomic_directory(directory) as temporary:
        model.save_pretrained(str(temporary), safe_serialization=True, save_embedding_layers=False, state_dict=state)
        path = temporary / CONFIG_NAME
        config = json.loads(path.read_text())
        if "feedforward_modules" in config:
            targets, config["feedforward_modules"] = _portable_feedforward(config, targets)
        if "target_modules" in config:
            config["target_modules"] = targets if isinstance(targets, str) else list(targets)
        config["base_model_name_or_path"] = base_model
        if config.get("tokenizer_name_or_path"):  # read when a prompt is begun, from where only this training could
            config["tokenizer_name_or_path"] = base_model
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (temporary / "README.md").unlink(missing_ok=True)
        store_as_peft_does(temporary, model)


def _portable_feedforward(config: dict[str, Any], targets: Patterns) -> tuple[Patterns, list[str]]:
    """IA³'s targets and which of them are feed-forward: suffixes where PEFT, which wants the one inside the other and goes
    by the ends of names, reads the same from them; else full names. ``config`` has full names of both."""
    adapted, forward = sorted(config["target_modules"]), sorted(config["feedforward_modules"])  # PEFT keeps sets
    short = suffixes(forward)
    others = [name for name in adapted if name not in forward]
    inside = isinstance(targets, str) or set(short) <= set(targets)
    if inside and not any(name.endswith(end) for name in others for end in short):
        return targets, short
    return (targets if isinstance(targets, str) else adapted), forward
