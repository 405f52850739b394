"""emloc_ray: fine-tune a large model through a small emulator of it, on Ray (EMLoC, arXiv 2506.12015).

Importing this package registers the emulator's model type with transformers, so that Auto classes open an emulator
directory. That imports transformers and torch (2 to 4 s on a cold start); ray is imported by the stages only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from emloc_ray.modeling.emulator import register as _register

if TYPE_CHECKING:
    from emloc_ray.config import RunConfig
    from emloc_ray.config_reading import load_config
    from emloc_ray.core.factorization import Factorization, LowRankFactors, factorize
    from emloc_ray.core.gram import Gram
    from emloc_ray.modeling.emulator import FactorizedLinear
    from emloc_ray.pipeline import run

__version__ = "0.1.0"

_PUBLIC = {
    "RunConfig": "emloc_ray.config",
    "load_config": "emloc_ray.config_reading",
    "Gram": "emloc_ray.core.gram",
    "Factorization": "emloc_ray.core.factorization",
    "LowRankFactors": "emloc_ray.core.factorization",
    "factorize": "emloc_ray.core.factorization",
    "FactorizedLinear": "emloc_ray.modeling.emulator",
    "run": "emloc_ray.pipeline",
}

__all__ = [
    "Factorization",
    "FactorizedLinear",
    "Gram",
    "LowRankFactors",
    "RunConfig",
    "factorize",
    "load_config",
    "run",
]

_register()


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'emloc_ray' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PUBLIC[name]), name)
