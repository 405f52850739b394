"""The dtype of a model's files, where not all their tensors have the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from emloc_ray.config.reading import parse_config
from emloc_ray.io.formats.checkpoint import INDEX_NAME, SINGLE_NAME
from emloc_ray.modeling.loading import ModelSource
from emloc_ray.planning.memory import MemoryModel
from emloc_ray.planning.model_files import file_dtype_of
from emloc_ray.planning.prepared import Prepared, prepare

BIAS, WEIGHT = "layers.0.gate.e_score_correction_bias", "layers.0.down_proj.weight"


def test_a_few_wide_tensors_do_not_make_a_checkpoint_wide(tmp_path: Path) -> None:
    save_file({BIAS: torch.zeros(8), WEIGHT: torch.zeros(8, 8, dtype=torch.bfloat16)}, tmp_path / SINGLE_NAME)
    assert file_dtype_of(ModelSource(tmp_path)) is torch.bfloat16


def test_all_shards_count(tmp_path: Path) -> None:
    save_file({BIAS: torch.zeros(8)}, tmp_path / "model-1.safetensors")
    save_file({WEIGHT: torch.zeros(8, 8, dtype=torch.float16)}, tmp_path / "model-2.safetensors")
    files = {BIAS: "model-1.safetensors", WEIGHT: "model-2.safetensors"}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": files}))
    assert file_dtype_of(ModelSource(tmp_path)) is torch.float16
    (tmp_path / "model-2.safetensors").unlink()
    assert file_dtype_of(ModelSource(tmp_path)) is torch.float32  # a download that has come so far


@pytest.mark.parametrize("budget", ["3 bits", "200KiB"])
def test_a_budget_is_spent_as_in_a_checkpoint_of_one_dtype(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], budget: str
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny_model_dir("llama", dtype="bfloat16"), directory)
    (tmp_path / "rows.jsonl").write_text((json.dumps({"text": "a row"}) + "\n") * 5)

    def prepared() -> Prepared:
        values = {
            "run_dir": str(tmp_path / "run"),
            "model": {"source": str(directory)},
            "data": {"train": {"path": str(tmp_path / "rows.jsonl")}},
            "emulator": {"budget": budget},
        }
        return prepare(parse_config(values))

    alike = prepared()
    tensors = {name: tensor for shard in directory.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    wide = {name: tensor.float() if "norm" in name else tensor for name, tensor in tensors.items()}
    (directory / INDEX_NAME).unlink()
    save_file(wide, directory / SINGLE_NAME, {"format": "pt"})
    mixed = prepared()
    assert mixed.layout == alike.layout
    assert MemoryModel(mixed).emulator_files == MemoryModel(alike).emulator_files
