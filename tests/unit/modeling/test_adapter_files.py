"""Adapters by their files alone: the scale that their config says, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from emloc_ray.errors import ArtifactError, ConfigError
from emloc_ray.modeling.adapter_files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Adapter,
    LoraModule,
    adapter_scale,
    lora_config,
    portable_form,
    write_adapter,
)


def test_null_patterns_as_older_peft_writes_them() -> None:
    config = {"r": 4, "lora_alpha": 8, "rank_pattern": None, "alpha_pattern": None}
    assert adapter_scale(config, "x.q_proj") == 2.0


@pytest.fixture
def adapter_dir(tmp_path: Path) -> Path:
    module = LoraModule("model.layers.0.self_attn.q_proj", torch.ones(2, 8), torch.ones(6, 2), 1.0)
    write_adapter(tmp_path / "a", lora_config({"revision": "v1"}, [module]), [module])
    return tmp_path / "a"


def test_the_bases_revision_is_kept(adapter_dir: Path) -> None:
    assert json.loads((adapter_dir / CONFIG_NAME).read_text())["revision"] == "v1"


def changed(adapter_dir: Path, directory: Path, **changes: Any) -> Path:
    directory.mkdir()
    config = json.loads((adapter_dir / CONFIG_NAME).read_text()) | changes
    (directory / CONFIG_NAME).write_text(json.dumps(config))
    save_file(load_file(adapter_dir / WEIGHTS_NAME), directory / WEIGHTS_NAME)
    return directory


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"target_parameters": ["mlp.gate.e_score_correction_bias"]}, "e_score_correction_bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"peft_type": "BOFT"}, "BOFT"),
    ],
)
def test_variants_that_are_not_s_b_a(tmp_path: Path, adapter_dir: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        Adapter(changed(adapter_dir, tmp_path / "x", **changes))
    assert str(tmp_path / "x") in str(caught.value)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva"])
def test_plain_initialisations_are_taken(tmp_path: Path, adapter_dir: Path, init: Any) -> None:
    assert Adapter(changed(adapter_dir, tmp_path / "x", init_lora_weights=init)).names


def test_how_an_adapter_was_begun_is_not_written() -> None:
    """PEFT begins it so again before it loads it, and an orthogonal one not at all on a base in 4 bits."""
    module = LoraModule("q_proj", torch.ones(2, 4), torch.ones(3, 2), 2.0)
    config, _ = portable_form({"r": 2, "lora_alpha": 4, "init_lora_weights": "orthogonal"}, [module])
    assert config["init_lora_weights"] is True


@pytest.mark.parametrize("missing", [CONFIG_NAME, WEIGHTS_NAME])
def test_missing_files(tmp_path: Path, adapter_dir: Path, missing: str) -> None:
    directory = changed(adapter_dir, tmp_path / "x")
    (directory / missing).unlink()
    with pytest.raises(ArtifactError, match=f"holds no {missing}"):
        Adapter(directory)
