"""A DeepSpeed JSON for ``finetune.deepspeed``: read, completed and held against the config that names it."""

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

from emloc_ray.errors import ConfigError

# What follows from the finetune section where the JSON does not say it.
_FOLLOWING = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
# Other ways to spread a model, under which ranks no longer have rows of their own.
_REFUSED = ("tensor_parallel", "pipeline", "sequence_parallel_size", "autotp_size")


def read_zero_config(path: str) -> dict[str, Any]:
    """The JSON at ``path``, relative to the working directory, with what it leaves out set to follow the config. Raises
    ConfigError where the deepspeed package is missing, or the file or its ZeRO stage is none."""
    where = f"finetune.deepspeed {path}"
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(f"{where} needs the deepspeed package: pip install 'emloc-ray[deepspeed]'.")
    try:
        content = json.loads(Path(path).expanduser().read_text("utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{where} cannot be read ({error.strerror}): give the path of a JSON file, from the working directory."
        ) from error
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON ({error}): fix it there.") from error
    zero = content.get("zero_optimization") if isinstance(content, dict) else None
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if type(stage) is not int or not 0 <= stage <= 3:
        said = "names none" if stage is None else f"is {stage!r}"
        raise ConfigError(f"{where}: zero_optimization.stage {said}: give 0, 1, 2 or 3.")
    for key in _REFUSED:
        if content.get(key):
            raise ConfigError(f"{where} asks for {key}, which this pipeline does not do: remove it.")
    return _completed(content)


def _completed(content: dict[str, Any]) -> dict[str, Any]:
    zero = dict(content["zero_optimization"])
    gathering = "stage3_gather_16bit_weights_on_model_save"
    if zero["stage"] == 3 and zero.get(gathering, "auto") == "auto":
        zero[gathering] = True  # of the adapter alone; without it a checkpoint holds the frozen weights too
    following: dict[str, Any] = dict.fromkeys(_FOLLOWING, "auto")
    for dtype in ("bf16", "fp16"):
        following[dtype] = {"enabled": "auto"}
    return {**following, **content, "zero_optimization": zero}


def check_zero_config(
    path: str, content: dict[str, Any], arguments: Any, num_workers: int, section: str = "finetune"
) -> None:
    """Raises ConfigError where ``content`` says other numbers than TrainingArguments, ``arguments`` of a ``section``, do."""
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    try:
        seen = HfTrainerDeepSpeedConfig(content)
        seen.trainer_config_process(argparse.Namespace(**{**vars(arguments), "world_size": num_workers}))
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise ConfigError(
            f"finetune.deepspeed {path} has a value of another type than DeepSpeed takes ({error}): fix it there."
        ) from error
    if seen.mismatches:
        mismatches = "; ".join(
            line.removeprefix("- ds ").replace(" vs hf ", f", {section} says ") for line in seen.mismatches
        )
        raise ConfigError(f'finetune.deepspeed {path} says {mismatches}: set "auto" there, or the same here.')
