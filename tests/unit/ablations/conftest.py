"""Ablation files on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emloc_ray.io.formats.yaml_text import write_yaml

Write = Callable[..., Path]
RATIO = "emulator.compression_ratio"


@pytest.fixture
def write(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> Write:
    """``write(**keys)``: a file of three methods at two ratios, some keys changed."""

    def written(**keys: Any) -> Path:
        base = {"model": {"source": str(tiny_model_dir())}, "data": {"max_seq_length": 64}}
        base |= {"calibration": {"num_calibration_samples": 64}, "correction": {"method": "projection"}}
        (tmp_path / "base.yaml").write_text(write_yaml(base))
        values = {
            "base": "base.yaml",
            "run_dir": str(tmp_path / "run"),
            "datasets": ["summaries", "code"],
            "seeds": [0, 1],
            "upper_bound": "lora",
            "methods": [
                {"name": "lora", RATIO: 1.0},
                {"name": "paper"},
                {"name": "fixed", "emulator": {"compression_ratio": 0.4}, "finetune.max_steps": 3},
            ],
            "grid": {RATIO: [0.5, 0.25]},
        }
        values = {key: value for key, value in {**values, **keys}.items() if value is not None}
        (tmp_path / "try.yaml").write_text(write_yaml(values))
        return tmp_path / "try.yaml"

    return written
