"""Healings of tiny models, made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from healings import Healing

from emloc_ray.stages.finetune.session import own_environment


@pytest.fixture(autouse=True)
def own_environment_variables() -> Iterator[None]:
    with own_environment():
        yield


@pytest.fixture(scope="module")
def healing(
    tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Healing]:
    """``healing(family, dtype)``, made once."""
    made: dict[tuple[str, str], Healing] = {}

    def get(family: str, dtype: str = "float32") -> Healing:
        if (family, dtype) not in made:
            root = tmp_path_factory.mktemp("healing")
            made[family, dtype] = Healing(tiny_model_dir(family, dtype=dtype), root)
        return made[family, dtype]

    return get
