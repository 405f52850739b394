"""Runs of a tiny model that are prepared and never run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from emloc_ray.config.reading import parse_config
from emloc_ray.planning.gpu_speeds import ask_gpus
from emloc_ray.planning.prepared import Prepared, prepare


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
    data = tmp_path / "rows.jsonl"
    data.write_text((json.dumps({"text": "x" * 20}) + "\n") * 12)

    def make(**sections: Any) -> Prepared:
        values = {
            "run_dir": str(tmp_path / "run"),
            "memory_budget": None,
            "data": {"train": {"path": str(data)}, "max_seq_length": 64},
            **sections,
            "model": {"source": str(tiny_model_dir("llama")), **sections.get("model", {})},
        }
        return prepare(parse_config(values))

    return make
