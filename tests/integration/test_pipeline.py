"""The whole pipeline on local Ray, read back with plain transformers and PEFT."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from run_samples import finished_metrics, metric_keys
from safetensors import safe_open
from small_runs import LENGTH, FinishedRun, run_values, task_rows
from stage_artifacts import tensors_in
from tiny import EOS
from transformers import AutoModelForCausalLM

from emloc_ray.config.reading import load_config, parse_config
from emloc_ray.config.steps import VERBS
from emloc_ray.data.formats import Tokens
from emloc_ray.data.token_shards import TokenShards
from emloc_ray.io.formats.grams import GramStore
from emloc_ray.io.runs.directory import SPECTRA, RunDirectory
from emloc_ray.modeling.emulator import FactorizedLinear
from emloc_ray.runs.trace import read_trace
from emloc_ray.ui.timeline import stage_runs

VARIANTS = {"original", "emulator", "emulator_adapter", "uncorrected", "corrected", "merged"}

CUT = 42  # tokens of most chats, less one


@pytest.fixture(scope="session")
def qwen_run(make_run: Callable[..., FinishedRun], tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Biases on q, k, v; rsLoRA with patterns; packed text from CSV, scored while training; the covariance correction."""
    path = tmp_path_factory.mktemp("csv") / "rows.csv"
    texts = [row["prompt"] + row["completion"] for row in task_rows(80)]
    pa.csv.write_csv(pa.table({"text": texts, "number": list(range(80))}), path)
    adapter = {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "use_rslora": True,
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"down_proj": 6},
    }
    return make_run(
        path,
        "qwen2",
        data={"format": "text", "packing": True},
        adapter=adapter,
        finetune={"eval_strategy": "steps", "eval_steps": 4, "eval_original_every": 2},
        correction={"method": "covariance", "strength": 0.5},
    )


@pytest.fixture(scope="session")
def gpt2_run(make_run: Callable[..., FinishedRun], tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Conv1D, biases, bfloat16; chat messages from Parquet, most of them cut; the paper's correction."""
    path = tmp_path_factory.mktemp("parquet") / "rows.parquet"
    chats = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        for row in task_rows(80)
    ]
    pa.parquet.write_table(pa.table({"messages": chats}), path, row_group_size=30)
    return make_run(
        path,
        "gpt2",
        "bfloat16",
        data={"format": "messages", "max_seq_length": CUT},
        calibration={"tokens": "completion"},
        correction={"method": "projection", "clamp": 1.0},
    )


@pytest.fixture(scope="session")
def dense_run(llama_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Ratio 1.0, plain LoRA on the original, in the Llama's run directory."""
    copied = llama_run.copy(tmp_path_factory.mktemp("dense"))
    shutil.rmtree(copied.root / "calibration")  # not needed, so not missed
    one = {"num_workers": 1}
    values = copied.changed(
        calibration=one,
        emulator={**one, "compression_ratio": 1.0},
        finetune=one,
        merge=one,
        evaluation={**one, "num_exact_match": 0, "num_generations": 0},
    )
    return FinishedRun(copied.root, values, copied.model_dir, run_values(values))


RUNS = ("llama_run", "qwen_run", "gpt2_run", "dense_run")


@pytest.fixture(params=RUNS)
def any_run(request: pytest.FixtureRequest) -> FinishedRun:
    """Every kind of run in turn."""
    return request.getfixturevalue(request.param)


def adapter_updates(run: FinishedRun) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """``module: (B, A, s)``, with the one s that any server reads."""
    config = json.loads((run.root / "adapter" / "adapter_config.json").read_text())
    found = {}
    with safe_open(run.root / "adapter" / "adapter_model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118
            name = key.removeprefix("base_model.model.").split(".lora_")[0]
            if key.endswith("lora_A.weight"):
                lora_a = file.get_tensor(key)
                assert lora_a.shape[0] == config["r"]
                found[name] = (
                    file.get_tensor(key.replace("lora_A", "lora_B")),
                    lora_a,
                    config["lora_alpha"] / config["r"],
                )
    return found


def test_run_directory_is_laid_out_as_designed(llama_run: FinishedRun) -> None:
    names = {entry.name for entry in llama_run.root.iterdir() if not entry.name.startswith(".")}
    folders = {"data", "calibration", "emulator", "adapter_emulator", "adapter", "merged"}
    assert names == folders | {"manifest.json", "metrics.json", "config.yaml", "report.html", "log.jsonl", "trace.json"}
    assert not list(llama_run.root.rglob("*.tmp"))
    for adapter in ("adapter", "adapter_emulator"):
        files = {file.name for file in (llama_run.root / adapter).iterdir()}
        cards = {"README.md"} if adapter == "adapter" else set()
        assert files == {"adapter_config.json", "adapter_model.safetensors"} | cards
    assert (llama_run.root / "merged" / "tokenizer.json").is_file()
    originals = {file.name for file in llama_run.model_dir.glob("model*")}
    assert {file.name for file in (llama_run.root / "merged").glob("model*")} == originals
    assert load_config(llama_run.root / "config.yaml") == parse_config(llama_run.values)
    assert RunDirectory(llama_run.root).holder() is None


def test_metrics_have_their_keys(any_run: FinishedRun) -> None:
    metrics = any_run.metrics
    assert set(metrics["evaluation"]) == VARIANTS
    counts = {variant["num_tokens"] for variant in metrics["evaluation"].values()}
    assert len(counts) == 1
    assert counts.pop() > 50
    for variant in metrics["evaluation"].values():
        assert 0 < variant["loss"] < 20
        assert 0 <= variant["token_accuracy"] <= 1
    assert {"method", "clamp", "strength", "candidates", "modules"} <= set(metrics["correction"])
    assert {"data", *VERBS} - {"calibrate", "heal"} <= set(metrics["stages"])
    for stage in metrics["stages"].values():
        assert stage["wall_s"] >= 0
        assert stage["peak_rss_bytes"] > 0
        assert stage["peak_pss_bytes"] > 0
    for name, section in (("finetune", "finetune"), ("evaluate", "evaluation")):
        assert metrics["stages"][name]["num_workers"] == any_run.values[section]["num_workers"]
    assert {"parameters_kept", "mean_relative_error"} <= set(metrics["emulator"])
    assert metrics["disk_bytes"]["merged"] > 0


def test_the_trace_has_what_workers_did_and_layers_have_spectra(any_run: FinishedRun) -> None:
    run = RunDirectory(any_run.root)
    spans = read_trace(run)[0]
    working = {"factorize", "finetune", "correct", "merge", "evaluate"} | (
        {"calibrate"} & any_run.metrics["stages"].keys()
    )
    assert {span.stage for span in spans} >= working
    stages = {stage.name: stage for stage in stage_runs(run.manifest())}
    assert [span.begun_at for span in spans] == sorted(span.begun_at for span in spans)
    for span in spans:
        assert span.worker.startswith(("slot ", "rank ", "process "))
        assert stages["data"].begun_at < span.begun_at <= span.finished_at <= stages["evaluate"].finished_at + 0.1
    assert all(span.peak_bytes > 0 for span in spans if not span.worker.startswith("rank "))
    layers = json.loads((any_run.root / "emulator" / SPECTRA).read_text())
    assert layers.keys() == {name for name, layer in any_run.metrics["emulator"]["layers"].items() if layer["rank"]}
    html = (any_run.root / "report.html").read_text()
    assert html.count("popovertarget=") == len(layers)
    assert 'href="trace.json"' in html


def test_training_lowered_the_loss(any_run: FinishedRun) -> None:
    loss = {name: variant["loss"] for name, variant in any_run.metrics["evaluation"].items()}
    assert loss["emulator_adapter"] < loss["emulator"] - 0.02
    assert loss["merged"] < loss["original"] - 0.02
    history = [step["loss"] for step in any_run.metrics["finetune"]["history"]]
    assert len(history) == 8
    assert history[-1] < history[0]


def test_emulator_and_original_are_scored_while_training(qwen_run: FinishedRun) -> None:
    first, last = qwen_run.metrics["finetune"]["validation"]["history"]
    assert (first["step"], last["step"]) == (4, 8)
    assert "original_loss" not in first
    measured = qwen_run.metrics["evaluation"]["uncorrected"]["loss"]  # on other rows
    assert last["original_loss"] == pytest.approx(measured, abs=0.5)
    assert last["loss"] < first["loss"] + 0.1


def test_merged_scores_as_the_corrected_adapter(any_run: FinishedRun) -> None:
    evaluation = any_run.metrics["evaluation"]
    # Rounding W + s B A to bfloat16 is what a bf16 checkpoint asks for.
    tolerance = 2e-2 if "bfloat16" in any_run.root.name else 1e-4
    assert evaluation["merged"]["loss"] == pytest.approx(evaluation["corrected"]["loss"], abs=tolerance)


@pytest.fixture(scope="module")
def read_plainly(request: pytest.FixtureRequest) -> dict[Path, dict[str, Any]]:
    """What plain transformers and PEFT read of each run, in one process, which imports them once."""
    runs: list[FinishedRun] = [request.getfixturevalue(name) for name in RUNS]
    script = Path(__file__).with_name("plain_check.py")
    places = [str(place) for run in runs for place in (run.model_dir, run.root)]
    output = subprocess.run([sys.executable, str(script), *places], capture_output=True, text=True, check=True).stdout
    lines = [line for line in output.splitlines() if line.startswith("{")]
    return {run.root: json.loads(line) for run, line in zip(runs, lines, strict=True)}


def test_plain_libraries_read_adapter_and_merged_alike(
    any_run: FinishedRun, read_plainly: dict[Path, dict[str, Any]]
) -> None:
    found = read_plainly[any_run.root]
    assert not found["imported"]
    assert found["unused"] == []
    assert "emloc_emulator" in found["emulator_error"]
    dtype = any_run.root.name.split("-")[1]
    assert found["merged_dtype"] == f"torch.{dtype}"
    assert found["difference"] <= (1e-4 if dtype == "float32" else 2e-2) * max(1.0, found["scale"])
    assert found["moved"] > 2 * found["difference"]


def test_merged_tensors_are_the_original_plus_the_update(any_run: FinishedRun) -> None:
    originals, merged = tensors_in(any_run.model_dir), tensors_in(any_run.root / "merged")
    updates = adapter_updates(any_run)
    assert merged.keys() == originals.keys()
    changed = 0
    for name, original in originals.items():
        assert merged[name].dtype == original.dtype
        module = name.removesuffix(".weight")
        if module not in updates or name == module:
            assert torch.equal(merged[name].view(torch.uint8), original.view(torch.uint8)), name
            continue
        lora_b, lora_a, s = updates[module]
        update = s * (lora_b @ lora_a)
        expected = original.float() + (update.T if "gpt2" in any_run.root.name else update)
        if original.dtype == torch.float32:
            torch.testing.assert_close(merged[name], expected, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(merged[name], expected.to(original.dtype)), name
        changed += not torch.equal(merged[name], original)
    assert changed == len(updates) > 0


def test_emulator_loads_with_the_originals_auto_class(any_run: FinishedRun) -> None:
    model, loading = AutoModelForCausalLM.from_pretrained(
        any_run.root / "emulator", dtype="auto", output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    kept = {n: m for n, m in model.named_modules() if isinstance(m, FactorizedLinear)}
    assert set(kept) == set(any_run.metrics["emulator"]["layers"])
    # What the model on disk scores is what the report says of it.
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == any_run.metrics["emulator"]["parameters"]


def test_grams_are_those_of_all_calibration_tokens(llama_run: FinishedRun) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_run.model_dir)
    store = GramStore(llama_run.root / "calibration")
    shards = TokenShards(llama_run.root / "data" / "tokens" / "calibration")
    assert shards.num_shards == 4
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in llama_run.metrics["emulator"]["layers"]}
    for name, inputs in seen.items():
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, to=inputs: to.append(args[0][0]))
    with torch.no_grad():
        for position in range(len(shards)):
            model(input_ids=torch.tensor([shards.row(position).input_ids]))
    for name, inputs in seen.items():
        x = torch.cat(inputs).double()
        expected = x.T @ x
        assert store.num_tokens(name) == len(x) == llama_run.metrics["calibration"]["num_tokens"]
        torch.testing.assert_close(store.read(name).double(), expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


def test_no_row_is_in_two_splits(llama_run: FinishedRun) -> None:
    rows = {}
    for split in ("train", "calibration", "selection", "eval"):
        shards = TokenShards(llama_run.root / "data" / "tokens" / split)
        rows[split] = {tuple(shards.row(position).input_ids) for position in range(len(shards))}
    assert rows["calibration"] <= rows["train"]  # sampled from train where not given
    assert not rows["train"] & (rows["selection"] | rows["eval"])
    assert not rows["selection"] & rows["eval"]
    assert len(rows["train"]) + len(rows["selection"]) + len(rows["eval"]) == 120
    assert any("12 rows instead of the 256 asked for" in note for note in llama_run.reporter.notes)


def test_auto_chooses_what_gains_most_or_none(llama_run: FinishedRun) -> None:
    choice = llama_run.metrics["correction"]
    tried = choice["candidates"]
    measured = [found for found in tried if not found["interpolated"]]
    keys = ("method", "clamp", "strength")
    assert [found["method"] for found in measured] == ["none", "covariance", "adapted", "adapted"]
    chosen = next(found for found in tried if [found[key] for key in keys] == [choice[key] for key in keys])
    assert chosen["gain"] == max(found["gain"] for found in tried)
    own = next(f["certainty"] for f in tried if [f[key] for key in keys] == [choice["considered"][key] for key in keys])
    assert choice["considered"]["certainty"] == pytest.approx(max(0, 1 - (len(tried) - 1) * (1 - own)))
    assert choice["scored_tokens"] == len(measured) * choice["selection_tokens"]
    assert choice["max_tokens"] is None


def test_covariance_closes_the_shortfall_of_every_module(qwen_run: FinishedRun) -> None:
    choice = qwen_run.metrics["correction"]
    assert (choice["method"], choice["strength"]) == ("covariance", 0.5)
    modules = choice["modules"]
    assert set(modules) == {
        name for name in adapter_updates(qwen_run) if name in qwen_run.metrics["emulator"]["layers"]
    }
    assert all(module["after"] < module["before"] for module in modules.values())


def test_rslora_and_patterns_reach_the_adapter(qwen_run: FinishedRun) -> None:
    config = json.loads((qwen_run.root / "adapter_emulator" / "adapter_config.json").read_text())
    assert config["use_rslora"] is True
    assert config["rank_pattern"] == {"v_proj": 2}
    assert config["alpha_pattern"] == {"down_proj": 6}
    assert set(config["target_modules"]) == {"q_proj", "v_proj", "down_proj"}
    assert {name.rsplit(".", 1)[-1] for name in adapter_updates(qwen_run)} == {"q_proj", "v_proj", "down_proj"}


def test_bfloat16_stays_bfloat16(gpt2_run: FinishedRun) -> None:
    assert {t.dtype for t in tensors_in(gpt2_run.root / "emulator").values()} == {torch.bfloat16}
    store = GramStore(gpt2_run.root / "calibration")
    assert store.read("transformer.h.0.attn.c_attn").dtype == torch.float32


def test_ratio_one_is_plain_lora_on_the_original(dense_run: FinishedRun) -> None:
    metrics = dense_run.metrics
    assert dense_run.reporter.skipped == ["data"]
    assert dense_run.reporter.started == ["factorize", "finetune", "correct", "merge", "evaluate"]
    assert not (dense_run.root / "calibration").exists()
    assert metrics["correction"]["method"] == "none"
    assert metrics["emulator"]["parameters_kept"] == 1.0
    originals, emulator = tensors_in(dense_run.model_dir), tensors_in(dense_run.root / "emulator")
    assert emulator.keys() == originals.keys()
    assert all(torch.equal(emulator[name], originals[name]) for name in originals)
    trained, corrected = (tensors_in(dense_run.root / name) for name in ("adapter_emulator", "adapter"))
    assert trained.keys() == corrected.keys()
    assert all(torch.equal(trained[name], corrected[name]) for name in trained)
    evaluation = metrics["evaluation"]
    assert evaluation["emulator"]["loss"] == pytest.approx(evaluation["original"]["loss"], abs=1e-6)
    assert evaluation["emulator_adapter"]["loss"] == pytest.approx(evaluation["corrected"]["loss"], abs=1e-6)


def test_gap_closed_is_measured_against_the_named_run(
    dense_run: FinishedRun, llama_run: FinishedRun, qwen_run: FinishedRun, tmp_path: Path
) -> None:
    copied = llama_run.copy(tmp_path)
    reporter = run_values(copied.changed(evaluation={"upper_bound": str(dense_run.root)}))
    assert not reporter.started
    metrics = json.loads((copied.root / "metrics.json").read_text())
    gap = metrics["gap_closed"]
    original, corrected = (metrics["evaluation"][name]["loss"] for name in ("original", "corrected"))
    bound = dense_run.metrics["evaluation"]["corrected"]["loss"]
    # What the tests of the report take for a run's. Where `auto` takes `adapted` there is no shortfall of modules.
    shortfalls = {"correction": {"modules": qwen_run.metrics["correction"]["modules"]}}
    assert metric_keys(finished_metrics()) <= metric_keys(metrics) | metric_keys(shortfalls)
    assert gap["upper_bound_loss"] == bound
    assert gap["corrected"] == pytest.approx((original - corrected) / (original - bound))


def split_rows(run: FinishedRun, split: str) -> list[Tokens]:
    shards = TokenShards(run.root / "data" / "tokens" / split)
    return [shards.row(position) for position in range(len(shards))]


def test_rows_are_packed_where_asked(qwen_run: FinishedRun) -> None:
    for split, count in qwen_run.metrics["data"].items():
        rows = split_rows(qwen_run, split)
        assert count["rows"] == len(rows)
        assert count["tokens"] == sum(map(len, rows))
        assert max(map(len, rows)) <= LENGTH
    packed = [row.input_ids.count(EOS) for row in split_rows(qwen_run, "calibration")]
    assert sum(packed) == 32  # the rows asked for, each with its end
    assert max(packed) > 1


def test_truncation_is_told_in_numbers(gpt2_run: FinishedRun) -> None:
    for split, count in gpt2_run.metrics["data"].items():
        rows = split_rows(gpt2_run, split)
        assert max(map(len, rows)) == CUT
        assert 0 < count["truncated_rows"] <= sum(len(row) == CUT for row in rows)
        assert count["truncated_tokens"] >= count["truncated_rows"]
        told = f"data.{split}: {count['truncated_rows']} rows cut to {CUT} tokens"
        assert any(note.startswith(told) for note in gpt2_run.reporter.notes)


def test_completion_tokens_alone_are_calibrated_on_where_asked(gpt2_run: FinishedRun) -> None:
    counted = sum(sum(row.completion_mask) for row in split_rows(gpt2_run, "calibration"))
    assert gpt2_run.metrics["calibration"]["num_tokens"] == counted
    assert counted < gpt2_run.metrics["data"]["calibration"]["tokens"]
