"""Several sources in shares of their own, some of the hub, for which a local folder stands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emloc_ray.config.reading import parse_config
from emloc_ray.data.tokenizing import TokenizeOptions
from emloc_ray.errors import ConfigError
from emloc_ray.planning.first_rows import first_rows
from emloc_ray.planning.prepared import prepare
from emloc_ray.stages.tokens.tokens import rows_of_splits, split_sources


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_files_and_data_sets_of_the_hub_are_mixed(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": f"{i}", "completion": "b"} for i in range(90)])
    alpaca = [{"instruction": f"{i}", "input": "", "output": "c"} for i in range(50)]
    hub = f"hf:{write(tmp_path / 'hub' / 'train.jsonl', alpaca).parent}"
    values = {"run_dir": str(tmp_path / "run"), "model": str(tiny_model_dir("llama"))}
    data = {"train": {"path": {hub: 1, str(pairs): 3}}, "max_seq_length": 64}
    ready = prepare(parse_config({**values, "data": data}))
    shown = first_rows(ready, count=4)
    assert shown is not None
    assert (shown.num_rows, set(shown.formats), len(shown.rows)) == (None, {"alpaca", "prompt_completion"}, 4)

    sources = split_sources(ready, tmp_path / "out")
    assert [(source.num_rows, source.part, source.format) for source in sources["train"]] == [
        (50, 0, "alpaca"),
        (90, 1, "prompt_completion"),
    ]
    options = TokenizeOptions(str(ready.source.directory), "auto", 64)
    splits = rows_of_splits(ready.config, sources, options)
    rows = [row for name in ("train", "selection", "eval") for _, row in splits[name].read(0, 140)]
    assert sum("instruction" in row for row in rows) == 30
    assert len(rows) == 120
    made = [tokens for tokens in options.tokens(splits["train"].read(0, 140)) if tokens]
    assert len(made) == len(splits["train"])

    listed = parse_config({**values, "data": {"train": [str(pairs), hub]}})
    assert [source.num_rows for source in split_sources(prepare(listed), tmp_path / "all")["train"]] == [90, 50]


@pytest.mark.parametrize("path", [{}, {"a.jsonl": 0}, {"a.jsonl": -1}])
def test_shares_are_numbers_above_zero(path: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"data\.train\.path"):
        parse_config({"run_dir": "r", "model": "m", "data": {"train": {"path": path}}})
