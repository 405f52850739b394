"""Ray's names where Ray is not installed: the stages' modules import them, and a run of plain functions calls none."""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _Names(ModuleType):
    """A module that has every name: classes, for all that Ray's are inherited and caught as, which refuse to be called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*_: Any, **__: Any) -> None:
            raise RuntimeError(f"{self.__name__}.{name}: Ray is not installed here.")

        setattr(self, name, type(name, (Exception,), {"__new__": refuse}))
        return self.__dict__[name]


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "ray" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Names(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def lend_ray_s_names() -> None:
    """Has ``import ray`` succeed, and say that no Ray runs; nothing where Ray is installed."""
    if find_spec("ray") is not None:
        return
    sys.modules.pop("ray", None)  # None where a test hides it
    sys.meta_path.insert(0, _Finder())  # first: a hidden one is installed all the same
    ray: Any = importlib.import_module("ray")
    importlib.import_module("ray.exceptions")
    ray.is_initialized = lambda: False
    ray.method = lambda **options: lambda function: function
