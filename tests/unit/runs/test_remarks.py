"""What a reader is told of a run though nothing is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import make_values, task_rows, write_jsonl
from tiny import PAD, VOCABULARY, make_tokenizer
from transformers import Llama4ForCausalLM, Llama4TextConfig

from emloc_ray.config.emulator import EmulatorConfig
from emloc_ray.config.finetune import FinetuneConfig
from emloc_ray.config.reading import parse_config
from emloc_ray.config.schema import CorrectionConfig
from emloc_ray.planning.memory import MemoryModel
from emloc_ray.planning.plan import make_plan
from emloc_ray.planning.prepared import Prepared, prepare
from emloc_ray.runs.remarks import (
    bfloat16_beyond_gpus,
    emulated_bfloat16,
    idle_cpus,
    late_warmup,
    left_in_blocks,
    moved_for_completions,
    of_settings,
    over_budget,
    repeated_rows,
    unread_at_ratio_one,
    unread_choice,
    unread_correction,
    unread_group_size,
    unread_patterns,
    unread_residuals,
    unscaled_float16,
)
from emloc_ray.stages.factorize.stage import FACTORIZE, thin_calibration
from emloc_ray.stages.heal.stage import no_healing
from emloc_ray.stages.order import STEPS
from emloc_ray.stages.tokens.stage import cut_rows, too_few_rows
from emloc_ray.text import size

Make = Callable[..., Prepared]


@pytest.fixture
def prepared(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> Make:
    """``prepared(memory_budget=…, calibration={…})``: of 600 rows."""
    path = write_jsonl(tmp_path / "rows.jsonl", task_rows(600))

    def make(memory_budget: Any = None, **sections: Any) -> Prepared:
        values = make_values(tmp_path / "run", tiny_model_dir("llama"), path, **sections)
        return prepare(parse_config({**values, "memory_budget": memory_budget}))

    return make


def test_experts_that_are_no_linears_are_told(prepared: Make, tmp_path: Path) -> None:
    assert left_in_blocks(prepared().layout) is None
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "intermediate_size_mlp": 64, "head_dim": 16}
    heads: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Llama4TextConfig(vocab_size=VOCABULARY, num_local_experts=4, pad_token_id=PAD, **sizes, **heads)
    Llama4ForCausalLM(config).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    layout = prepared(model={"source": str(tmp_path / "model")}).layout
    assert str(left_in_blocks(layout)).startswith(
        "67% of the blocks' parameters are no linears, most of them in Llama4TextExperts: "
    )


@pytest.mark.parametrize(
    ("split", "count", "words"),
    [
        ("calibration", {"rows": 128, "dropped_rows": 0}, None),
        ("calibration", {"rows": 100, "dropped_rows": 28}, None),
        ("calibration", {"rows": 100, "dropped_rows": 0}, "100 rows instead of the 128 asked for"),
        ("selection", {"rows": 3, "dropped_rows": 0}, "3 rows instead of the 8"),
        ("train", {"rows": 3, "dropped_rows": 0}, None),
    ],
)
def test_fewer_rows_than_asked_are_told(prepared: Make, split: str, count: dict[str, int], words: str | None) -> None:
    said = too_few_rows(prepared(calibration={"num_calibration_samples": 128}).config, split, {"tokens": 10, **count})
    assert (said is None) == (words is None)
    assert words is None or words in str(said)


def test_a_budget_that_stages_exceed_is_told_with_these(prepared: Make) -> None:
    def said_of(*budget: str) -> str | None:
        run = prepared(*budget)
        return over_budget(run.config, make_plan(STEPS, run).worker_bytes)

    assert said_of() is None
    assert said_of("64GiB") is None
    said = str(said_of("1MiB"))
    assert said.startswith("memory_budget is 1.00 MiB a worker, but the plan says data ")
    assert "calibrate" in said
    assert "finetune" in said


def test_rows_that_are_packed_are_read_as_often(prepared: Make, tmp_path: Path) -> None:
    (tmp_path / "short.jsonl").write_text((json.dumps({"text": "x" * 20}) + "\n") * 600)
    data = {"train": {"path": str(tmp_path / "short.jsonl")}, "format": "text", "max_seq_length": 256}
    epochs = {"num_train_epochs": 40, "max_steps": -1}
    told = [repeated_rows(prepared(data=data, finetune={**epochs, "packing": on})) for on in (False, True)]
    assert told[0] == told[1]
    assert "about 40 times each" in str(told[0])
    data["train"] = {"path": [str(tmp_path / "short.jsonl"), "hf:some/rows"]}  # whose number is not known
    assert repeated_rows(prepared(data=data, finetune=epochs)) is None


def test_what_completions_move_is_told_where_blocks_come_over_a_link(prepared: Make) -> None:
    asked = {"num_exact_match": 6, "num_generations": 2, "max_new_tokens": 7, "batch_size": 4}
    over_link = {**asked, "gpus_per_worker": 1}
    run = prepared(model={"hold": "offloaded"}, evaluation=over_link, ray={"num_gpus": 1})
    memory, said = MemoryModel(run), str(moved_for_completions(run))
    moved, together = size(memory.moved("offloaded", 1, 1)), min(6, memory.prompts_at_once())
    assert (
        f"6 prompts on the offloaded original, {together} together: its weights move once for each token, up to 7 × {moved}"
        in said
    )
    assert (
        moved_for_completions(prepared(model={"hold": "resident"}, evaluation=over_link, ray={"num_gpus": 1})) is None
    )
    assert moved_for_completions(prepared(model={"hold": "offloaded"}, evaluation=asked)) is None  # mapped here


def test_cpus_that_a_run_leaves_idle_are_told(prepared: Make) -> None:
    ones = {key: {"num_workers": 1} for key in ("calibration", "emulator", "finetune", "merge", "evaluation")}
    silent, asking = prepared(**ones).config, prepared(**{**ones, "emulator": {"num_workers": 4}}).config
    assert str(idle_cpus([silent], 16)).startswith("The cluster has 16 CPUs, and no stage asks for more than one: set")
    assert idle_cpus([silent], 1) is None
    assert idle_cpus([silent, silent], 16) is None  # which go side by side
    assert idle_cpus([asking], 16) is None


@pytest.mark.parametrize(
    ("finetune", "capabilities", "is_told"),
    [
        ({"bf16": True}, {"architecture": "x86_64", "avx2": True, "avx512_bf16": False}, True),
        ({"bf16": True}, {"architecture": "x86_64", "avx512_bf16": True}, False),
        ({"bf16": True}, {"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, False),
        ({"bf16": True}, {"architecture": "aarch64"}, False),  # nothing is known of those
        ({"bf16": True}, {}, False),
        ({"bf16": True, "gpus_per_worker": 1}, {"architecture": "x86_64"}, False),
        ({}, {"architecture": "x86_64"}, False),
    ],
)
def test_bfloat16_that_a_cpu_lacks_is_told(
    prepared: Make, finetune: dict[str, Any], capabilities: dict[str, Any], is_told: bool
) -> None:
    run = prepared(finetune={"gpus_per_worker": 0, **finetune}, ray={"num_gpus": 2})
    assert (emulated_bfloat16([run.config], capabilities) is not None) == is_told


@pytest.mark.parametrize(
    ("name", "capability", "words"),
    [
        (
            "Tesla T4",
            "7.5",
            "are made in float32, at 8 times float16's time or more; set model.dtype: float16 with finetune.fp16",
        ),
        ("Quadro RTX 6000", "7.5", "at several times float16's time"),
        ("Tesla P100", "6.0", "are made in float32; set model.dtype: float32, in which"),
        ("NVIDIA L4", "8.9", None),
    ],
)
def test_bfloat16_that_a_gpu_lacks_is_told(
    prepared: Make, monkeypatch: pytest.MonkeyPatch, name: str, capability: str, words: str | None
) -> None:
    asked = {"name": ("NVIDIA L4", name), "compute_cap": ("8.9", capability), "memory.total": ("16384", "16384")}
    monkeypatch.setattr("emloc_ray.planning.machine.ask_gpus", asked.__getitem__)
    on_cpus = {section: {"gpus_per_worker": 0} for section in ("calibration", "finetune", "evaluation")}
    on_gpu: dict[str, Any] = {**on_cpus, "finetune": {"gpus_per_worker": 1}, "ray": {"num_gpus": 1}}
    said = bfloat16_beyond_gpus(prepared(model={"dtype": "bfloat16"}, **on_gpu))
    assert (said is None) == (words is None)
    assert words is None or (words in str(said) and f"which {name} (compute capability {capability}" in str(said))
    for others in ({"model": {"dtype": "float16"}, **on_gpu}, {"model": {"dtype": "bfloat16"}, **on_cpus}):
        assert bfloat16_beyond_gpus(prepared(**others)) is None


@pytest.mark.parametrize(
    ("dtype", "finetune", "gpu", "is_told"),
    [
        ("float16", {}, None, True),
        ("float16", {"bf16": True}, None, False),
        ("float16", {}, "7.5", True),
        ("float16", {"fp16": True}, "7.5", False),
        ("float16", {}, "8.9", False),
        ("bfloat16", {}, None, False),
    ],
)
def test_float16_without_a_scaled_loss_is_told(
    dtype: str,
    finetune: dict[str, Any],
    gpu: str | None,
    is_told: bool,
    prepared: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = {"name": ("A card",), "compute_cap": (gpu or "",), "memory.total": ("16384",)}
    monkeypatch.setattr("emloc_ray.planning.machine.ask_gpus", asked.__getitem__ if gpu else lambda key: ())
    on_cpus = {section: {"gpus_per_worker": 0} for section in ("calibration", "evaluation")}
    ray: dict[str, Any] = {"ray": {"num_gpus": 1}} if gpu else {}
    training = {"gpus_per_worker": int(gpu is not None), **finetune}
    run = prepared(model={"dtype": dtype}, **on_cpus, finetune=training, **ray)
    assert (unscaled_float16(run) is not None) == is_told


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({}, None),
        ({"clamp": 3.0, "strength": 1.0}, None),
        ({"method": "projection", "clamp": 1.0}, None),
        ({"clamp": None}, "correction.clamp is not read: auto"),
        ({"clamp": 1.0, "strength": 0.5}, "correction.clamp, correction.strength are not read: auto"),
        (
            {"method": "none", "strength": 0.5},
            "correction.strength is not read by correction.method none: leave it out.",
        ),
        (
            {"method": "adapted", "clamp": 1.0, "strength": 0.5},
            "correction.clamp is not read by correction.method adap",
        ),
    ],
)
def test_settings_that_a_correction_does_not_read_are_told(section: dict[str, Any], words: str | None) -> None:
    said = unread_correction(CorrectionConfig.model_validate(section))
    assert (said is None) == (words is None)
    assert words is None or str(said).startswith(words)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"ratios": {"q_proj": 0.3}}, None),
        ({"compression_ratio": 1.0, "quantization": "int4", "objective": "weights"}, None),
        (
            {"compression_ratio": 1.0, "ratios": {"q_proj": 0.3}},
            "emulator.ratios is not read: at compression_ratio 1.0",
        ),
        (
            {"compression_ratio": 1, "storage": "pivoted", "rank_multiple": 1},
            "emulator.storage, emulator.rank_multiple are",
        ),
        ({"compression_ratio": 1.0, "objective": "predictions"}, "emulator.objective is not read: at"),
        ({"budget": "3 bits", "storage": "pivoted"}, None),
    ],
)
def test_settings_of_ranks_are_told_where_nothing_is_factorized(section: dict[str, Any], words: str | None) -> None:
    said = unread_at_ratio_one(EmulatorConfig.model_validate(section))
    assert (said is None) == (words is None)
    assert words is None or str(said).startswith(words)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"eval_original_every": 2}, None),
        ({"early_stopping_patience": 1, "early_stopping_threshold": 0.1}, None),
        ({"load_best_model_at_end": True, "early_stopping_threshold": 0.1}, "finetune.early_stopping_threshold is not"),
        (
            {"eval_original_every": 2, "metric_for_best_model": "eval_original_loss"},
            "finetune.metric_for_best_model is",
        ),
        (
            {
                "eval_original_every": 2,
                "metric_for_best_model": "eval_original_loss",
                "lr_scheduler_type": "reduce_lr_on_plateau",
                "load_best_model_at_end": True,
            },
            "finetune.metric_for_best_model is not read by lr_scheduler_type reduce_lr_on_plateau: it goes by the emulator's",
        ),
    ],
)
def test_settings_of_a_choice_are_told_where_there_is_none(section: dict[str, Any], words: str | None) -> None:
    said = unread_choice(FinetuneConfig.model_validate({"eval_strategy": "steps", **section}))
    assert (said is None) == (words is None)
    assert words is None or str(said).startswith(words)


@pytest.mark.parametrize(
    ("section", "told"),
    [({"quantization": "nf4"}, True), ({}, True), ({"quantization": "int4"}, False), ({"budget": "3 bits"}, False)],
)
def test_a_size_of_groups_that_there_are_none_of_is_told(section: dict[str, Any], told: bool) -> None:
    assert unread_group_size(EmulatorConfig()) is None
    assert (unread_group_size(EmulatorConfig.model_validate({"group_size": 32, **section})) is not None) is told


def test_patterns_of_linears_that_are_left_out_are_told(prepared: Make) -> None:
    tables: dict[str, Any] = {"emulator": {"ratios": {"q_proj": 0.3}}, "adapter": {"rank_pattern": {"[qk]_proj": 2}}}
    read = prepared(**tables)
    assert unread_patterns(read.config, read.layout) is None
    tables["emulator"]["exclude_modules"] = ["q_proj"]
    tables["adapter"]["target_modules"] = ["v_proj"]
    unread = prepared(**tables)
    said = unread_patterns(unread.config, unread.layout)
    assert str(said).startswith("emulator.ratios.q_proj, adapter.rank_pattern.[qk]_proj are not read: ")


@pytest.mark.parametrize(("ratio", "told"), [(0.5, True), (0.99, True), (1.0, False)])
def test_factors_beside_integers_that_there_are_none_of_are_told(prepared: Make, ratio: float, told: bool) -> None:
    found = prepared(emulator={"compression_ratio": ratio, "quantization": "int4", "residual_rank": 4})
    assert (unread_residuals(found.config, found.layout) is not None) is told


def test_factors_beside_integers_that_would_outgrow_the_linears_are_told(prepared: Make) -> None:
    whole = {"compression_ratio": 1.0, "quantization": "int8", "residual_rank": 1000}
    found = prepared(emulator={**whole, "target_modules": ["q_proj", "k_proj"]})
    said = str(unread_residuals(found.config, found.layout))
    assert "residual_rank: 1000 is lowered to" in said
    assert " in model.layers.0.self_attn.q_proj and 3 more, as ranks end at" in said


def test_stages_that_a_config_asks_for_and_leaves_out_are_told_before_the_run(prepared: Make) -> None:
    asked = {"healing": {"steps": 2}, "refinement": {"steps": 2}}
    one = prepared(emulator={"compression_ratio": 1.0, **asked}, finetune={"exact_steps": 6})
    said = "\n".join(of_settings(one, {}))
    for words in (
        "so there is nothing to refine",
        "no factors to heal",
        "so finetune.exact_steps: 6 is not read: add them to",
    ):
        assert words in said
    half = prepared(emulator={"compression_ratio": 0.5, **asked}, finetune={"exact_steps": 6})
    assert not any(
        "to refine" in line or "factors to" in line or "exact_steps" in line for line in of_settings(half, {})
    )


@pytest.mark.parametrize(
    ("emulator", "objective"),
    [
        ({"compression_ratio": 1.0, "quantization": "int4", "objective": "predictions"}, "activations"),
        ({"compression_ratio": 1.0, "quantization": "int4", "objective": "weights"}, "weights"),
        ({"compression_ratio": 0.5, "objective": "predictions"}, "predictions"),
    ],
)
def test_the_objective_in_the_figures_is_the_one_that_was_read(
    prepared: Make, emulator: dict[str, Any], objective: str
) -> None:
    figures = FACTORIZE.metrics(prepared(emulator=emulator), {"factorize": {"mean_relative_error": 0.1, "layers": {}}})
    assert figures["emulator"]["objective"] == objective


def test_cut_rows_are_told(prepared: Make) -> None:
    config = prepared().config
    count = {"truncated_rows": 0, "truncated_tokens": 0, "dropped_rows": 0}
    assert cut_rows(config, "train", count) is None
    assert cut_rows(config, "train", {"truncated_rows": 3, "truncated_tokens": 40, "dropped_rows": 1}) == (
        "data.train: 3 rows cut to 64 tokens (at least 40 tokens left out), 1 dropped with no completion or not all of an image"
        " left."
    )


@pytest.mark.parametrize(
    ("calibration", "key"),
    [({}, "num_calibration_samples"), ({"num_calibration_tokens": 9}, "num_calibration_tokens")],
)
def test_fewer_tokens_than_ranks_are_told(prepared: Make, calibration: dict[str, Any], key: str) -> None:
    ready = prepared(calibration=calibration)
    highest = max(ready.layout.ranks.values())
    assert thin_calibration(ready.config, highest, ready.layout) is None
    assert thin_calibration(ready.config, None, ready.layout) is None
    said = thin_calibration(ready.config, highest - 1, ready.layout)
    assert (
        said == f"Calibration saw {highest - 1} tokens, fewer than the highest rank {highest}: raise calibration.{key}."
    )
    plain = prepared(calibration=calibration, emulator={"objective": "weights"})
    assert thin_calibration(plain.config, highest - 1, plain.layout) is None


@pytest.mark.parametrize(
    ("emulator", "told"),
    [
        ({"compression_ratio": 0.5}, False),
        ({"compression_ratio": 0.5, "healing": {"steps": 2}}, False),
        ({"compression_ratio": 1.0, "healing": {"steps": 2}}, True),
    ],
)
def test_healing_of_the_original_itself_is_told_to_be_none(
    prepared: Make, emulator: dict[str, Any], told: bool
) -> None:
    assert (no_healing(prepared(emulator=emulator).config) is not None) is told


def test_a_warm_up_that_outlasts_a_training_is_told(prepared: Make) -> None:
    def said(healing: int | None, **finetune: Any) -> str:
        emulator = {} if healing is None else {"healing": {"steps": healing, "r": 2}}
        return late_warmup(prepared(emulator=emulator, finetune={"warmup_steps": 60, **finetune})) or ""

    epochs: dict[str, Any] = {"max_steps": -1, "num_train_epochs": 2.0}
    assert said(None, max_steps=100) == said(20, max_steps=100) == said(100, **epochs) == ""
    assert said(20, max_steps=50).startswith("finetune.warmup_steps is 60, and there are 50 steps:")
    assert said(20, **epochs).startswith("finetune.warmup_steps is 60, and emulator.healing has 20 steps:")
