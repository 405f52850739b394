"""Refinement on Ray, after factorize: what it leaves, and what it goes on from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from small_runs import Stopping, make_values, run_values

from emloc_ray.errors import Stopped


@pytest.mark.parametrize(
    "emulator",
    [{}, {"compression_ratio": None, "budget": "3.5 bits", "objective": "predictions"}],
    ids=["factors", "budget"],
)
def test_broken_off_it_goes_on_and_what_follows_is_of_what_it_leaves(
    ray_session: None,
    tmp_path: Path,
    tiny_model_dir: Callable[..., Path],
    task_file: Path,
    emulator: dict[str, Any],
) -> None:
    emulator = {**emulator, "refinement": {"steps": 8}}
    values = make_values(tmp_path / "run", tiny_model_dir("llama"), task_file, emulator=emulator)
    with pytest.raises(Stopped):
        run_values(values, Stopping("refine", 1), until="factorize")
    assert run_values(values, until="factorize").started == ["refine"]
    place = tmp_path / "run"
    found = json.loads((place / "metrics.json").read_text())["refinement"]
    assert 0 < found["blocks_refined"] <= found["blocks"] == 2
    assert 0 < found["error_left"] < 1
    assert sum(after < before for before, after in found["errors"]) == found["blocks_refined"]
    assert not (place / "refinement").exists()
    for file in (place / "emulator").glob("*.safetensors"):
        ours, theirs = load_file(place / "emulator_refined" / file.name), load_file(file)
        assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in theirs.items()}
