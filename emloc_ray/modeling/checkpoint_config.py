"""What a checkpoint's own configs name beside the checkpoint: code, kernels, other weights."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emloc_ray.errors import ConfigError
from emloc_ray.io.runs.secret_values import leaves

_KERNELS = {"attn_implementation", "_attn_implementation"}
_ADAPTER = "adapter_config.json"
_REPEATED = re.compile(r"(layers?|experts)$")  # keys that say how often a module is made
_MOST = 4096


def is_at_commit(kernel: str) -> bool:
    """Whether a kernel of the hub, ``OWNER/REPO@REVISION:NAME``, is named at a commit, which nobody can change."""
    return re.search("@[0-9a-f]{40}(:|$)", kernel) is not None


def config_leaves(directory: Path, source: str) -> Iterator[tuple[Path, tuple[str, ...], Any]]:
    """The single values of a model's configs: each with its file and the keys that lead to it. Raises ConfigError, naming
    ``source``, where a config is no JSON."""
    for file in sorted(directory.glob("*config.json")):
        try:
            values = list(leaves(json.loads(file.read_text("utf-8"))))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{source}: {file.name} is no JSON: name another checkpoint.") from error
        yield from ((file, path, value) for path, value in values)


def check_config(directory: Path, trust_remote_code: bool = False) -> None:
    """Raises ConfigError where a checkpoint would have transformers open something else than its own files: compiled code of
    the hub, which it may name with ``trust_remote_code`` at a commit, weights of another name, or an adapter; and where it asks
    for layers without end."""
    if (directory / _ADAPTER).is_file():
        raise ConfigError(
            f"{directory} holds {_ADAPTER}, and transformers would open the model with that adapter, which its weights do not"
            " hold: remove it, or merge the adapter and name the merged model."
        )
    for file, path, value in config_leaves(directory, str(directory)):
        if "transformers_weights" in path:
            raise ConfigError(
                f"{file} names its weights itself (transformers_weights): take that out, and call them as transformers does."
            )
        if path and _REPEATED.search(path[-1]) and type(value) is int and value > _MOST:
            raise ConfigError(
                f"{file} has {path[-1]} {value:,}, and at most {_MOST:,} are made, one after another: correct it."
            )
        if _KERNELS.isdisjoint(path) or "/" not in str(value) or (trust_remote_code and is_at_commit(str(value))):
            continue
        what_to_do = (
            "write OWNER/REPO@COMMIT there (40 hex digits)"
            if trust_remote_code
            else "take that out, and set model.attn_implementation where you want a kernel"
        )
        raise ConfigError(
            f"{file} has the attention computed by {value}, which is code of the hub that would run with your rights:"
            f" {what_to_do}."
        )
