"""The command line refuses bad configs, models, data, run directories and machines before anything is written or started."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from cli_calls import ROWS, VERBS, Call, lines_of
from typer.testing import Result
from vlms import save_vlm

from emloc_ray.io.formats.checkpoint import INDEX_NAME
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.modeling import attention
from emloc_ray.planning import calibration_memory
from emloc_ray.planning.gpu_speeds import ask_gpus

pytestmark = pytest.mark.usefixtures("no_ray")


def assert_refused(result: Result, run_dir: Path, *words: str) -> list[str]:
    """Exit code 2, sentences on stderr that hold the words, nothing written; gives the sentences."""
    assert result.exit_code == 2, (result.exception, result.output)
    lines = result.stderr.splitlines()
    assert lines
    assert all(line.startswith("Error: ") and line.endswith(".") for line in lines), lines
    for word in words:
        assert word in result.stderr
    assert not run_dir.parent.exists()
    return lines


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_a_misspelt_key_and_names_the_nearest(call: Call, verb: str) -> None:
    call.values["emulator"] = {"compresion_ratio": 0.5}
    lines = assert_refused(call(verb), call.run_dir, "emulator.compresion_ratio", "the nearest is compression_ratio")
    assert len(lines) == (2 if verb == "validate" else 1)  # which says what it has not come to


def test_every_error_is_told_at_once(call: Call) -> None:
    call.values["model"]["source"] = str(call.config.parent / "nowhere")
    call.values["data"]["train"]["path"] = str(call.config.parent / "nothing.jsonl")
    call.values["merge"] = {"cpus_per_worker": 1000}
    call.values["evaluation"] = {"upper_bound": str(call.config.parent / "no-run")}
    lines = assert_refused(call("run"), call.run_dir, "nowhere", "nothing.jsonl", "merge.cpus_per_worker", "no-run")
    assert len(lines) == 4


def copied_model(call: Call, name: str, **changes: Any) -> Path:
    """The config's model, copied, with other values in one of its files."""
    copied = call.config.parent / "copied"
    shutil.copytree(call.values["model"]["source"], copied)
    values = json.loads((copied / name).read_text())
    (copied / name).write_text(json.dumps({**values, **changes}))
    call.values["model"]["source"] = str(copied)
    return copied


@pytest.mark.parametrize("verb", ["run", "validate", "plan"])
def test_weights_outside_the_model_s_folder_are_refused(call: Call, verb: str) -> None:
    copied_model(call, INDEX_NAME, weight_map={"model.embed_tokens.weight": "../outside.safetensors"})
    words = "names '../outside.safetensors' as a file of weights, which leads out of its folder"
    assert len(assert_refused(call(verb), call.run_dir, words)) == 1


@pytest.mark.parametrize("verb", ["run", "validate", "plan"])
def test_code_of_another_repository_is_refused(call: Call, verb: str) -> None:
    copied_model(call, "config.json", auto_map={"AutoConfig": "else/where--code.Config"})
    call.values["model"]["trust_remote_code"] = True
    words = "config.json takes code from else/where, at no commit"
    assert len(assert_refused(call(verb), call.run_dir, words)) == 1


def test_no_secret_is_shown_by_a_refusal(call: Call) -> None:
    source = "/none/" + "hf_" + "aBcDeFgHiJkLmNoPq" * 2
    assert_refused(
        call("run", f"model.source={source}"), call.run_dir, "model.source /none/(hidden) is no model directory"
    )


def test_code_of_the_hub_at_no_commit_is_refused(call: Call) -> None:
    call.values["model"] = {"source": "someone/model", "revision": "main", "trust_remote_code": True}
    words = "code of someone/model on the hub, which a branch or a tag can change"
    assert len(assert_refused(call("run"), call.run_dir, words)) == 1


def test_images_that_rows_may_not_read_are_refused(call: Call) -> None:
    folder = call.config.parent
    call.values["model"]["source"] = str(save_vlm("LLaVA", folder / "vlm"))
    (folder / "outside.png").write_bytes(b"here")
    (folder / "rows").mkdir()
    shown = [{"type": "image", "path": "../outside.png"}, {"type": "text", "text": "q"}]
    messages = [{"role": "user", "content": shown}, {"role": "assistant", "content": "a"}]
    rows = folder / "rows" / "rows.jsonl"
    rows.write_text(lines_of([{"messages": messages}] * 20))
    call.values["data"] |= {"train": {"path": str(rows)}, "format": "messages"}
    words = "rows.jsonl, row 1: image 1 ../outside.png is not read: "
    assert len(assert_refused(call("run"), call.run_dir, words)) == 1


def test_each_file_of_each_split_is_checked(call: Call, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.parquet", tmp_path / "bad.parquet"
    pa.parquet.write_table(pa.table({"prompt": ["a"], "completion": ["b"]}), good)
    pa.parquet.write_table(pa.table({"prompt": ["a"], "completion": [None]}), bad)
    lines = assert_refused(
        call("run", f"data.eval={{path: [{good}, {bad}]}}", f"data.selection={{path: {bad}}}"), call.run_dir
    )
    assert len(lines) == 1  # the same file twice: once is enough
    assert "bad.parquet, row 1: field 'completion' is null" in lines[0]


def test_rows_past_the_first_thousand_wait_for_the_run(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*(ROWS * 50), {"prompt": "late"}]))
    assert call("validate", f"data.train.path={path}").exit_code == 0
    path.write_text("".join(json.dumps(row) + "\n" for row in [*(ROWS * 50)[:999], {"prompt": "late"}]))
    assert_refused(call("validate", f"data.train.path={path}"), call.run_dir, "long.jsonl, row 1000")


def test_a_run_directory_with_foreign_files_is_refused_and_left_alone(call: Call) -> None:
    call.run_dir.mkdir(parents=True)
    (call.run_dir / "thesis.tex").write_text("years of work")
    for arguments in (["run"], ["run", "--fresh"], ["plan"], ["validate"]):
        result = call(arguments[0], *arguments[1:])
        assert result.exit_code == 2
        assert "thesis.tex" in result.stderr
        assert [entry.name for entry in call.run_dir.iterdir()] == ["thesis.tex"]


def test_another_runs_name_is_refused(call: Call) -> None:
    RunDirectory(call.run_dir.with_name("theirs")).create({})
    call.run_dir.with_name("theirs").rename(call.run_dir)
    before = (call.run_dir / "manifest.json").read_bytes()
    result = call("run", "--fresh")
    assert result.exit_code == 2
    assert "holds the run 'theirs'" in result.stderr
    assert (call.run_dir / "manifest.json").read_bytes() == before


def test_a_full_disk_is_told_before_anything_is_written(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil._ntuple_diskusage(2**40, 2**40 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert_refused(call("run"), call.run_dir, "needs about", "1000 B free")
    RunDirectory(call.run_dir).create({})  # begun and killed
    assert "1000 B free" in call("run").stderr


@pytest.mark.parametrize(
    ("overrides", "capability", "words"),
    [
        (
            ["finetune.gpus_per_worker=1", "ray.num_gpus=0"],
            9.0,
            "finetune asks Ray for 1 GPU at once, this machine has 0",
        ),
        (["finetune.bf16=true", "ray.num_gpus=1"], 7.5, "finetune.bf16 needs a GPU of compute capability 8 or higher"),
        (["evaluation.gpus_per_worker=0.01", "ray.num_gpus=1"], 9.0, "evaluation.gpus_per_worker is 0.01, of which 22"),
    ],
    ids=["absent", "too old", "a small share"],
)
def test_a_gpu_that_will_not_do_is_told_before_ray_starts(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, overrides: list[str], capability: float, words: str
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f'#!/bin/sh\ncase "$*" in *compute_cap*) echo {capability};; *) echo 24564;; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ask_gpus.cache_clear()
    try:
        assert len(assert_refused(call("run", *overrides), call.run_dir, words)) == 1
    finally:
        ask_gpus.cache_clear()


def test_flash_attention_is_planned_where_it_is_missing_and_a_run_is_refused(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(attention, "is_kernels_available", lambda: False)  # newer versions of transformers come with it
    asked = ["model.attn_implementation=flash_attention_2", "ray.num_gpus=1"]
    for verb in ("validate", "plan"):
        assert call(verb, *asked).exit_code == 0
    assert len(assert_refused(call("run", *asked), call.run_dir, "flash_attention_2 needs the flash-attn package")) == 1


def test_a_gpu_that_ray_would_only_count_is_planned_with_and_refused_in_a_run(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for verb in ("validate", "plan"):
        assert call(verb, "ray.num_gpus=1").exit_code == 0
    told = "ray.num_gpus is 1, and torch sees 0 GPUs of this machine"
    assert len(assert_refused(call("run", "ray.num_gpus=1"), call.run_dir, told)) == 1
    on_cpus = [f"{section}.gpus_per_worker=0" for section in ("calibration", "emulator", "finetune", "evaluation")]
    assert "Ray was started" in call("run", "ray.num_gpus=1", *on_cpus).output


def test_a_config_and_an_index_can_be_planned_and_not_run(call: Call) -> None:
    bare = call.config.parent / "bare"
    bare.mkdir()
    whole = Path(call.values["model"]["source"])
    for name in ("config.json", "model.safetensors.index.json"):
        shutil.copy(whole / name, bare)
    call.values["model"] = {"source": str(bare), "dtype": "float32"}
    result = call("plan")
    assert result.exit_code == 0, result.output
    assert "whole model" in result.stdout
    for verb in ("validate", "run"):
        assert_refused(call(verb), call.run_dir, "is missing, though the checkpoint's index names it")


@pytest.mark.parametrize("verb", ["validate", "plan", "run"])
def test_a_training_that_no_gpu_can_hold_is_refused(call: Call, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call.values["ray"] = {"num_gpus": 1}
    for section in ("calibration", "emulator", "evaluation"):
        call.values[section] = {**call.values.get(section, {}), "gpus_per_worker": 0}
    monkeypatch.setattr(calibration_memory, "gpu_bytes", lambda: 2**19)
    assert_refused(call(verb), call.run_dir, "finetune is planned to hold", "of a GPU of which 471 KiB can be filled")
