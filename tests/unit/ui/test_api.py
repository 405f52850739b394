"""The Python interface: configs from keywords, dicts and rows in memory; what came out; progress in a notebook."""

from __future__ import annotations

import datetime
import json
import os
import pickle
import re
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from small_runs import task_rows, write_jsonl
from tiny import make_tokenizer
from transformers import LlamaConfig

import emloc_ray
from emloc_ray.config.reading import parse_config
from emloc_ray.data.memory_rows import write_rows
from emloc_ray.errors import ConfigError
from emloc_ray.io.formats.checkpoint import write_index
from emloc_ray.modeling.architecture import empty_model
from emloc_ray.planning.plan import within_budget
from emloc_ray.planning.prepared import prepare
from emloc_ray.runs import run as pipeline
from emloc_ray.stages.order import STEPS
from emloc_ray.ui.api import RunResult, as_config
from emloc_ray.ui.notebook import NotebookReporter

ROWS = task_rows(20)
SETS = {"train": pd.DataFrame(ROWS), "test": pd.DataFrame(ROWS[:4])}  # as a DatasetDict


def test_rows_of_a_program_become_a_file_beside_the_run(tmp_path: Path) -> None:
    run_dir = str(tmp_path / "mine")
    config = as_config(
        None, ROWS, pd.DataFrame(ROWS[:4]), {"run_dir": run_dir, "model": "m", "finetune": {"max_steps": 3}}
    )
    assert (config.run_dir, config.model.source, config.finetune.max_steps) == (run_dir, "m", 3)
    train, held_out = (Path(str(split.path)) for split in (config.data.train, config.data.eval) if split is not None)
    assert train.parent == tmp_path / "mine.rows"
    assert [json.loads(line) for line in train.read_text().splitlines()] == ROWS
    assert pd.read_parquet(held_out).to_dict("records") == ROWS[:4]
    before = train.stat().st_mtime_ns
    again = as_config({"run_dir": run_dir, "model": "m", "data": {"train": iter(ROWS)}})
    assert again.data.train == config.data.train
    assert train.stat().st_mtime_ns == before
    assert sorted(train.parent.iterdir()) == sorted([train, held_out])


@pytest.mark.parametrize(
    "edit", [lambda rows: rows[: len(rows) // 2], lambda rows: rows.replace(b"a", b"b", 1), bytes.upper]
)
def test_rows_whose_file_was_cut_or_edited_are_written_anew(tmp_path: Path, edit: Callable[[bytes], bytes]) -> None:
    path = Path(write_rows(ROWS, "train", str(tmp_path / "mine")))
    whole = path.read_bytes()
    path.write_bytes(edit(whole))
    assert Path(write_rows(ROWS, "train", str(tmp_path / "mine"))) == path
    assert path.read_bytes() == whole


def test_what_a_killed_call_left_beside_rows_goes_after_a_day(tmp_path: Path) -> None:
    for name, days in (("killed", 2), ("at work", 0)):
        left = tmp_path / "mine.rows" / f".{name}.tmp"
        left.mkdir(parents=True)
        (left / "train").write_text("half")
        os.utime(left, times=(0, time.time() - days * 86_400))
    path = Path(write_rows(ROWS, "train", str(tmp_path / "mine")))
    assert {file.name for file in path.parent.iterdir()} == {".at work.tmp", path.name}


def test_rows_may_have_numbers_of_numpy_and_dates(tmp_path: Path) -> None:
    day = datetime.datetime(2024, 5, 1, 12)
    given = {
        "id": np.int64(3),
        "scores": np.array([0.5, 1.0]),
        "at": day,
        "on": pd.Timestamp(day),
        "is_new": np.bool_(1),
    }
    config = as_config(None, [{**ROWS[0], **given}], None, {"run_dir": f"file://{tmp_path}/mine", "model": "m"})
    assert config.data.train is not None
    path = Path(str(config.data.train.path))
    assert path.parent == tmp_path / "mine.rows"
    time = "2024-05-01T12:00:00"
    plain = {"id": 3, "scores": [0.5, 1.0], "at": time, "on": time, "is_new": True}
    assert json.loads(path.read_text()) == {**ROWS[0], **plain}


def test_a_config_s_data_may_be_rows_alone(tmp_path: Path) -> None:
    config = as_config({"run_dir": tmp_path / "mine", "model": "m", "data": pd.DataFrame(ROWS)})
    assert config.data.train is not None
    assert pd.read_parquet(str(config.data.train.path)).to_dict("records") == ROWS


def test_keywords_are_keys_over_those_of_a_config(tmp_path: Path) -> None:
    values = {
        "run_dir": "r",
        "model": "org/m",
        "data": {"train": "a.jsonl"},
        "finetune": {"max_steps": 3, "bf16": False},
    }
    config = as_config(values, keys={"finetune": {"max_steps": 9}, "memory_budget": "24GiB"})
    assert (config.finetune.max_steps, config.finetune.bf16, config.memory_budget) == (9, False, 24 * 2**30)
    assert as_config(config) == config
    assert as_config(config, keys={"seed": 4}) == config.model_copy(update={"seed": 4})
    assert as_config(None, "a.jsonl", None, {"model": "org/m"}).run_dir == "runs/m"
    assert emloc_ray.load_config({**values, "run_dir": tmp_path, "model": tmp_path}, ["seed=4"]) == as_config(
        values, keys={"run_dir": tmp_path, "model": tmp_path, "seed": 4}
    )
    paths = as_config(
        {"run_dir": tmp_path, "data": {"eval": {"path": [tmp_path / "b"]}}}, tmp_path / "a", None, {"model": tmp_path}
    )
    assert (paths.run_dir, paths.model.source) == (str(tmp_path), str(tmp_path))
    assert [split and split.path for split in (paths.data.train, paths.data.eval)] == [
        str(tmp_path / "a"),
        [str(tmp_path / "b")],
    ]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"train": [1, 2]}, "train, row 1 is int: give a dict for each row"),
        ({"train": [{"a": object()}]}, "train, row 1 cannot be written as JSON"),
        ({"train": [{"text": "a\ud800"}]}, "train, row 1 cannot be written as JSON"),
        (
            {"train": [{"image": np.zeros((2, 2, 3))}]},
            "train, row 1 cannot be written as JSON .*name images by their paths",
        ),
        ({"train": []}, "train has no rows: give at least one"),
        ({"data": []}, "train has no rows: give at least one"),
        ({"train": iter(())}, r"train has no rows: give at least one \(an iterator can be read once\)"),
        ({"train": pa.RecordBatchReader.from_batches(pa.schema({"text": pa.string()}), [])}, "train has no rows"),
        (
            {"train": pd.DataFrame({"prompt": ["a", 3]})},
            r"train cannot be written as a table \(Expected bytes, .* column prompt .*\): give a list of dicts, or make each",
        ),
        ({"train": pd.DataFrame({"messages": ["a", [{"role": "user"}]]})}, "train cannot be written as a table"),
        ({"train": pd.DataFrame({"a": [object()]})}, "train cannot be written as a table"),
        ({"train": pd.DataFrame([[1, 2]], columns=["a", "a"])}, r"as a table \(Duplicate column names found"),
        ({"train": pd.Series(["a"])}, "train cannot be written as a table"),
        ({"train": pa.table({"a": [{}]})}, "train cannot be written as a table"),
        (
            {"train": ROWS, "run_dir": "/dev/null/mine"},
            "run_dir: the rows' folder /dev/null/mine.rows: /dev/null is a file",
        ),
        ({"train": ROWS, "run_dir": "/proc/mine"}, "run_dir: the rows' folder /proc/mine.rows cannot be written"),
        ({"train": SETS}, r"train is no set of rows but holds several \(train, test\): give one .* as rows\['train'\]"),
        ({"data": {"eval": SETS}}, "eval is no set of rows but holds several"),
        ({"train": {"prompt": ["a"]}}, "data.train.prompt is not a key"),
        ({"train": 7}, "train is int: give a path, a list of dicts"),
        ({"train": ROWS, "run_dir": "s3://b/run"}, "train are rows, and run_dir s3://b/run is on an object store"),
        ({"train": "a.jsonl", "lr": 3}, "lr is not a key"),
        ({"train": ROWS, "finetune": {"max_stepz": 1}}, "max_stepz is not a key"),
        ({"train": ROWS, "run_dir": None}, "run_dir"),
        ({"train": "a.jsonl", "model": 3}, "model"),
        ({}, "data is missing"),
        ({"config": 3}, "A config of the type int cannot be read: give a YAML file's path, or a mapping of its keys"),
    ],
)
def test_a_bad_call_is_our_error(
    given: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call = {"model": "org/m", "run_dir": "mine", **given}
    with pytest.raises(ConfigError, match=words):
        emloc_ray.run(**call)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"adapter": {"use_dora": True}}, "adapter.use_dora"),
        ({"adapter": {"modules_to_save": ["lm_head"]}}, "adapter.modules_to_save"),
        ({"adapter": {"method": "loha", "foo": 1}}, "adapter.foo is not a key"),
        ({"finetune": {"push_to_hub": True}}, "finetune.push_to_hub would push the adapter as trained"),
        ({"finetune": {"hub_token": "hush"}}, "finetune.hub_token is a secret"),
        ({"ray": {"foo": 1}}, "ray.foo is not a key"),
        ({"data": {"train": "${EMLOC_UNSET}/rows.jsonl"}}, "the variable EMLOC_UNSET"),
    ],
)
def test_a_config_that_a_program_made_is_checked_as_its_values_are(sections: dict[str, Any], words: str) -> None:
    config = emloc_ray.RunConfig(**{"run_dir": "r", "model": {"source": "m"}, "data": {"train": "a.jsonl"}, **sections})
    for given in (config, config.model_copy(update={"seed": 4})):
        with pytest.raises(ConfigError, match=re.escape(words)):
            as_config(given)


def test_validate_says_what_the_command_says(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    call: dict[str, Any] = {
        "model": str(tiny_model_dir()),
        "train": str(rows),
        "run_dir": str(tmp_path / "mine"),
        "data": {"max_seq_length": 64},
        "adapter": {"r": 4},
    }
    assert emloc_ray.validate(**call)[0].startswith("The config is valid: 14 of 14 linears")
    assert emloc_ray.plan(**call).parameters > 0
    with pytest.raises(ConfigError, match=r"adapter\.r is 33"):
        emloc_ray.validate(**{**call, "adapter": {"r": 33}})


def test_what_deepspeed_s_ranks_share_is_not_chosen_within_a_memory_budget(
    tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a b c"}] * 20)
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    call: dict[str, Any] = {
        "model": str(tiny_model_dir("llama")),
        "train": str(rows),
        "run_dir": str(tmp_path / "mine"),
        "data": {"max_seq_length": 64},
        "finetune": {"deepspeed": str(tmp_path / "zero.json")},
    }
    with pytest.raises(ConfigError, match=r"^finetune\.deepspeed: plan cannot choose within a memory budget"):
        emloc_ray.plan(**call, memory_budget="900MiB")
    del call["train"]
    config = parse_config({**call, "data": {"train": str(rows), "max_seq_length": 64}, "memory_budget": "900MiB"})
    assert emloc_ray.plan(config).choice is None


@pytest.mark.slow
@pytest.mark.parametrize("given", [False, True])
def test_a_plan_recommends_what_fits_the_batches_as_written(tmp_path: Path, given: bool) -> None:
    sizes: dict[str, Any] = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    heads: dict[str, Any] = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    config = LlamaConfig(vocab_size=8000, dtype="float32", **sizes, **heads)
    config.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    named = dict.fromkeys(empty_model(config).state_dict(), "model-00001-of-00001.safetensors")
    write_index(tmp_path / "model", named, 0, 0)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a b c d e f " * 40}] * 20)
    call: dict[str, Any] = {
        "model": str(tmp_path / "model"),
        "data": {"train": str(rows), "max_seq_length": 256},
        "run_dir": str(tmp_path / "mine"),
        "finetune": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
        "evaluation": {"batch_size": 256},
    }
    asked = parse_config({**call, "memory_budget": "900MiB"})
    planned = emloc_ray.plan(call, memory_budget="900MiB") if given else emloc_ray.plan(asked)
    as_written = within_budget(prepare(asked, needs_weights=False), STEPS, planned.speeds)
    assert planned.choice is not None
    assert planned.choice.overrides == as_written.overrides
    assert planned.choice.asked.emulator.model_fields_set == as_written.asked.emulator.model_fields_set
    assert planned.choice.asked.finetune.per_device_train_batch_size == 8
    assert planned.prepared.config.evaluation.batch_size < asked.evaluation.batch_size


def test_a_result_is_its_metrics_and_knows_its_places(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = {"evaluation": {"merged": {"loss": 1.5}}, "disk_bytes": {"adapter": 1, "merged": 2}}
    monkeypatch.setattr(pipeline, "run", lambda config, **options: metrics)
    run_dir = str(tmp_path / "mine")
    result = emloc_ray.run(
        model=str(tiny_model_dir()), train=ROWS, run_dir=run_dir, adapter={"r": 4}, data={"max_seq_length": 64}
    )
    assert result == metrics == result.metrics
    assert (result.adapter, result.merged) == (f"{run_dir}/adapter", f"{run_dir}/merged")
    assert result.report == f"{run_dir}/report.html"
    assert repr(result) == f"<run in {run_dir}; held-out loss: merged 1.5000>"
    finished = RunResult({"disk_bytes": {"adapter": 1, "adapter_finished": 1}}, "s3://b/run?region=x")
    assert (finished.adapter, finished.merged) == ("s3://b/run/adapter_finished?region=x", None)
    copied = pickle.loads(pickle.dumps(finished))
    assert (copied, copied.adapter) == (finished, finished.adapter)


@pytest.mark.parametrize("is_notebook", [True, False])
def test_a_run_in_a_notebook_or_one_of_its_kin_shows_progress(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, is_notebook: bool
) -> None:
    class ZMQInteractiveShell:
        pass

    class Shell(ZMQInteractiveShell if is_notebook else object):
        """As Colab's is called."""

    shown: list[Any] = []

    def run(config: Any, **options: Any) -> dict[str, Any]:
        options["reporter"].note("well")
        return {}

    display = types.ModuleType("IPython.display")
    display.__dict__.update(HTML=str, display=lambda *_, **__: types.SimpleNamespace(update=shown.append))
    ipython = types.ModuleType("IPython")
    ipython.__dict__.update(get_ipython=Shell)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(pipeline, "run", run)
    emloc_ray.run(
        model=tiny_model_dir(), train=ROWS, run_dir=tmp_path / "r", adapter={"r": 4}, data={"max_seq_length": 64}
    )
    assert shown == (["! well"] if is_notebook else [])


def test_a_notebook_shows_one_output_that_changes() -> None:
    shown: list[str] = []
    reporter = NotebookReporter(shown.append, interval_s=0)
    reporter.skip("data")
    progress = reporter.start("merge")
    progress(1, 4)
    assert '<progress value="1" max="4"></progress>' in shown[-1]
    reporter.note("a <b>")
    reporter.finish("merge", {"merged_tensors": 3}, {"wall_s": 2.0, "peak_pss_bytes": 2**20})
    assert shown[-1].count("<br>") == 2
    assert "a &lt;b&gt;" in shown[-1]
    assert "done before" in shown[-1]
