"""emloc_ray: fine-tune a large model through a small emulator of it, on Ray (EMLoC, arXiv 2506.12015).

Importing this package lets transformers' Auto classes open an emulator directory, whichever of the two is imported first.
It imports neither transformers, torch nor ray (some 0.1 s): the emulator's model type is registered when transformers'
Auto classes are loaded, and the public names below are imported when they are first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emloc_ray.config.reading import load_config
    from emloc_ray.config.schema import RunConfig
    from emloc_ray.core.factorization import Factorization, LowRankFactors, factorize
    from emloc_ray.core.gram import Gram
    from emloc_ray.errors import EmlocError
    from emloc_ray.modeling.emulator import FactorizedLinear
    from emloc_ray.ui.api import RunResult, plan, run, validate


__version__ = "0.1.0"

_PUBLIC = {
    "RunConfig": "emloc_ray.config.schema",
    "load_config": "emloc_ray.config.reading",
    "EmlocError": "emloc_ray.errors",
    "Gram": "emloc_ray.core.gram",
    "Factorization": "emloc_ray.core.factorization",
    "LowRankFactors": "emloc_ray.core.factorization",
    "factorize": "emloc_ray.core.factorization",
    "FactorizedLinear": "emloc_ray.modeling.emulator",
    "plan": "emloc_ray.ui.api",
    "run": "emloc_ray.ui.api",
    "validate": "emloc_ray.ui.api",
    "RunResult": "emloc_ray.ui.api",
}

__all__ = [
    "EmlocError",
    "Factorization",
    "FactorizedLinear",
    "Gram",
    "LowRankFactors",
    "RunConfig",
    "RunResult",
    "factorize",
    "load_config",
    "plan",
    "run",
    "validate",
]


def _when_imported(module: str, function: str) -> None:
    """Has the function called with transformers' module as soon as that is imported; at once where wrapt is missing, as it
    may be where torch, transformers and peft alone are."""
    where = "emloc_ray.modeling.emulator_type"
    try:
        from wrapt import register_post_import_hook
    except ImportError:
        getattr(importlib.import_module(where), function)(importlib.import_module(module))
    else:
        register_post_import_hook(f"{where}:{function}", module)


_when_imported("transformers.models.auto.configuration_auto", "register_config")
_when_imported("transformers.models.auto.modeling_auto", "register_models")


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'emloc_ray' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
