"""Runs of a tiny model that are prepared and never run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bare_runs import tiny_run

from emloc_ray.planning.gpu_speeds import ask_gpus
from emloc_ray.planning.prepared import Prepared


@pytest.fixture
def much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a budget models are held whole, whatever the machine has free."""
    monkeypatch.setattr("emloc_ray.planning.calibration_memory.available_bytes", lambda: 2**42)


@pytest.fixture
def asked_anew() -> Iterator[None]:
    """Nothing is known of the machine's GPUs before, nor after."""
    ask_gpus.cache_clear()
    yield
    ask_gpus.cache_clear()


@pytest.fixture
def prepared(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> Callable[..., Prepared]:
    """``prepared(key=value, section={…})``: a tiny Llama's run on rows of 20 tokens."""
    return lambda **sections: tiny_run(tmp_path, tiny_model_dir("llama"), **{"memory_budget": None, **sections})
