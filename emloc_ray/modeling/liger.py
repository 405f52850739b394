"""Liger's kernels, which the Trainer puts into a model that it trains: for which models they compute what these do.

They take the place of rotations, norms and the products of MLPs, whose linears they call, factors and adapters too. The
loss is ours all the same: Liger's own is for a model that is called with labels.
"""

from collections.abc import Collection, Mapping

from emloc_ray.errors import ConfigError


def check_liger(model_type: str, has_experts: bool, kernels: Mapping[str, bool] | None) -> None:
    """Raises ConfigError where a model is not to be trained with Liger; ``kernels``: which of them are wanted, as
    ``finetune.liger_kernel_config`` has it."""
    if has_experts and (kernels or {}).get("swiglu", True):
        raise ConfigError(
            "finetune.use_liger_kernel would compute experts from fused weights, and emulators and adapters have them apart:"
            " set finetune.liger_kernel_config to {swiglu: false}, or remove it."
        )
    types = _types()
    if types is not None and model_type not in types:
        raise ConfigError(
            f"finetune.use_liger_kernel: Liger has no kernels for the model's type, {model_type}: remove it."
        )


def _types() -> Collection[str] | None:
    """The types of models that Liger knows; None where it cannot be imported, as without Triton."""
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError:
        return None
    return set(MODEL_TYPE_TO_APPLY_LIGER_FN)
