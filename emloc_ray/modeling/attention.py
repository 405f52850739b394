"""Attention kernels that do not come with torch: FlashAttention's packages, and kernels of the hub."""

import importlib.metadata
from typing import Any

from transformers.integrations.hub_kernels import is_kernel
from transformers.utils import is_kernels_available

from emloc_ray.errors import ConfigError

_DISTRIBUTIONS = {
    "flash_attention_2": "flash-attn",
    "flash_attention_3": "flash-attn-3",
    "flash_attention_4": "flash-attn-4",
}


def needs_kernel(attn_implementation: str | None) -> bool:
    """Whether an ``attn_implementation`` is one of these: it computes on GPUs alone, and a model is planned without it."""
    return attn_implementation in _DISTRIBUTIONS or is_kernel(attn_implementation)


def is_flash(attn_implementation: str | None) -> bool:
    """Whether it is FlashAttention, which takes packs as one row."""
    return "flash" in str(attn_implementation)


def check_takes_kernel(model: Any, attn_implementation: str) -> None:
    """Raises ConfigError where transformers' class of a model does not take FlashAttention, and that is asked for."""
    if is_flash(attn_implementation) and not getattr(model, "_supports_flash_attn", False):
        raise ConfigError(
            f"model.attn_implementation is {attn_implementation}, and {type(model).__name__} does not take FlashAttention:"
            " leave it out."
        )


def missing_package(attn_implementation: str) -> str | None:
    """What has to be installed for a kernel; None where all is. Without FlashAttention's own package transformers takes it
    from the hub by ``kernels``."""
    if is_kernels_available():
        return None
    distribution = _DISTRIBUTIONS.get(attn_implementation)
    if distribution is None:
        return "the kernels package: pip install 'transformers[kernels]'"
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return f"the {distribution} package, or kernels, which fetches it from the hub: pip install 'transformers[kernels]'"
    return None
