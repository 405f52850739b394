"""``hf:`` data goes through the datasets library into Parquet of the run; a local folder stands for the hub here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from emloc_ray.config.reading import parse_config
from emloc_ray.data.hub import download
from emloc_ray.data.token_shards import TokenShards
from emloc_ray.errors import ConfigError, DataError
from emloc_ray.planning.prepared import prepare
from emloc_ray.stages.tokens.tokens import tokenize_data

pytestmark = pytest.mark.deep

pytest.importorskip("datasets")


def _config(model: Path, run_dir: Path, train: str, evaluation: str) -> Any:
    return parse_config(
        {
            "run_dir": str(run_dir),
            "model": {"source": str(model)},
            "data": {
                "format": "prompt_completion",
                "max_seq_length": 64,
                "train": {"path": train},
                "eval": {"path": evaluation},
            },
            "calibration": {"num_calibration_samples": 4},
        }
    )


def _write(path: Path, prefix: str, count: int) -> None:
    rows = ({"prompt": f"{prefix} {i}", "completion": f"number {i}"} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_dataset_becomes_the_runs_parquet(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], ray_session: None
) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    _write(folder / "train.jsonl", "train", 40)
    _write(folder / "test.jsonl", "test", 7)
    model = tiny_model_dir("llama")
    config = _config(model, tmp_path / "run", f"hf:{folder}", f"hf:{folder}")
    counts = tokenize_data(prepare(config), model, tmp_path / "data")["splits"]
    assert counts["eval"]["rows"] == 7
    assert counts["train"]["rows"] + counts["selection"]["rows"] == 40
    assert (tmp_path / "data" / "rows" / "eval.parquet").is_file()
    assert len(TokenShards(tmp_path / "data" / "tokens" / "eval")) == 7


def test_a_split_can_be_named_and_a_wrong_name_is_told(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], ray_session: None
) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    for split, count in (("train", 40), ("validation", 30)):
        _write(folder / f"{split}.jsonl", split, count)
    model = tiny_model_dir("llama")
    config = _config(model, tmp_path / "run", f"hf:{folder}", f"hf:{folder}:validation")
    assert tokenize_data(prepare(config), model, tmp_path / "data")["splits"]["eval"]["rows"] == 30
    trained_on = _config(model, tmp_path / "run", f"hf:{folder}", f"hf:{folder}:train")
    with pytest.raises(ConfigError, match=rf"data\.eval and data\.train both read hf:{folder}:train: held-out rows"):
        prepare(trained_on)
    wrong = _config(model, tmp_path / "other", f"hf:{folder}", f"hf:{tmp_path / 'nowhere'}")
    with pytest.raises(DataError, match="nowhere"):
        tokenize_data(prepare(wrong), model, tmp_path / "data2")


@pytest.mark.without_ray
def test_a_slice_of_a_split_is_loaded_and_looked_at(tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    _write(folder / "train.jsonl", "train", 40)
    place = f"hf:{folder}:train[75%:]"
    download(place, "train", tmp_path / "all.parquet")
    assert pq.read_table(tmp_path / "all.parquet")["prompt"].to_pylist() == [f"train {i}" for i in range(30, 40)]
    download(place, "train", tmp_path / "first.parquet", first=3)  # streamed, which knows no slices
    assert pq.read_table(tmp_path / "first.parquet")["prompt"].to_pylist() == [f"train {i}" for i in range(3)]
