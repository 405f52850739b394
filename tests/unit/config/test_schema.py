"""The config: strict about names and values, every error at once, overrides that read like YAML."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
from pydantic import ValidationError

from emloc_ray.config.reading import REMOVED_KEYS, parse_config
from emloc_ray.config.schema import RayConfig, RunConfig
from emloc_ray.errors import ConfigError

MINIMAL: dict[str, Any] = {
    "run_dir": "runs/x",
    "model": {"source": "some/dir"},
    "data": {"train": {"path": "train.jsonl"}},
}


def config(**sections: Any) -> RunConfig:
    """The minimal config with sections updated."""
    values = copy.deepcopy(MINIMAL)
    for name, section in sections.items():
        if isinstance(section, dict):
            values.setdefault(name, {}).update(section)
        else:
            values[name] = section
    return parse_config(values)


def error_of(**sections: Any) -> str:
    """The error's text."""
    with pytest.raises(ConfigError) as caught:
        config(**sections)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_defaults_are_what_the_design_says() -> None:
    made = config()
    assert made.seed == 0
    assert made.emulator.dampening_frac == 1e-6
    assert made.calibration.tokens == "all"
    assert made.correction.clamp == 3.0
    assert made.correction.method == "auto"
    assert made.finetune.loss_on == "completion"
    assert made.data.packing is False
    assert made.model.trust_remote_code is False


@pytest.mark.parametrize(
    ("sections", "key", "nearest"),
    [
        ({"sead": 1}, "sead", "seed"),
        ({"modle": {}}, "modle", "model"),
        ({"model": {"sourse": "x"}}, "model.sourse", "source"),
        ({"data": {"max_sequence_length": 9}}, "data.max_sequence_length", "max_seq_length"),
        ({"data": {"eval": {"path": "a.csv", "num_sample": 3}}}, "data.eval.num_sample", "num_samples"),
        (
            {"calibration": {"num_calibration_sample": 9}},
            "calibration.num_calibration_sample",
            "num_calibration_samples",
        ),
        ({"emulator": {"compresion_ratio": 0.5}}, "emulator.compresion_ratio", "compression_ratio"),
        ({"adapter": {"lora_alfa": 3}}, "adapter.lora_alfa", "lora_alpha"),
        ({"finetune": {"learning_rte": 1e-3}}, "finetune.learning_rte", "learning_rate"),
        ({"finetune": {"warmup_step": 3}}, "finetune.warmup_step", "warmup_steps"),
        ({"correction": {"clmp": 3}}, "correction.clmp", "clamp"),
        ({"merge": {"chunk_byte": 99999}}, "merge.chunk_byte", "chunk_bytes"),
        ({"evaluation": {"upper_bounds": "x"}}, "evaluation.upper_bounds", "upper_bound"),
        ({"ray": {"num_cpu": 2}}, "ray.num_cpu", "num_cpus"),
    ],
)
def test_unknown_key_is_named_with_its_nearest(sections: dict[str, Any], key: str, nearest: str) -> None:
    text = error_of(**sections)
    assert f"{key} is not a key: the nearest is {nearest}." in text
    assert len(text.splitlines()) == 1


def test_variants_keep_what_gains_are_of() -> None:
    chosen = config(evaluation={"variants": ["merged", "corrected", "original"]})
    assert chosen.evaluation.variants == ["original", "corrected", "merged"]
    text = error_of(evaluation={"variants": ["original", "merged"]})
    assert "evaluation.variants" in text
    assert "corrected must be among them" in text
    assert "evaluation.variants.0 is 'best'" in error_of(evaluation={"variants": ["best"]})


@pytest.mark.parametrize("key", REMOVED_KEYS)
def test_a_key_of_earlier_versions_is_told_what_to_do_instead(key: str) -> None:
    name, _, value = key.partition(": ")
    section, _, name = name.partition(".")
    told = error_of(**{section: {name: value or 1}})
    assert told.splitlines() == [f"the config: {key} was removed: {REMOVED_KEYS[key]}."]


def test_a_key_like_no_other_is_told_what_there_is() -> None:
    text = error_of(merge={"zzz": 1})
    assert "merge.zzz is not a key" in text
    assert "chunk_bytes" in text


@pytest.mark.parametrize(
    ("given", "samples", "tokens"),
    [
        ({}, 128, None),
        ({"num_calibration_tokens": None}, 128, None),
        ({"num_calibration_tokens": 5000}, None, 5000),
        ({"num_calibration_tokens": 5000, "num_calibration_samples": 64}, 64, 5000),
        ({"num_calibration_samples": None}, None, None),
    ],
)
def test_calibration_rows_are_bounded_by_what_is_set(given: dict[str, Any], samples: Any, tokens: Any) -> None:
    section = config(calibration=given).calibration
    assert (section.num_calibration_samples, section.num_calibration_tokens) == (samples, tokens)
    again = config(calibration=section.model_dump(mode="json")).calibration
    assert again == section


def test_a_kernel_of_the_hub_is_named_at_a_commit() -> None:
    kernel = f"some/one@{'0123456789' * 4}"
    for name in ("sdpa", kernel, f"{kernel}:f", None):
        assert config(model={"source": "x", "attn_implementation": name}).model.attn_implementation == name
    for name in ("kernels-community/flash-attn2", "some/one@main:f"):
        with pytest.raises(ConfigError, match="write OWNER/REPO@COMMIT, the commit that you trust"):
            config(model={"source": "x", "attn_implementation": name})


def test_every_error_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(
            {
                "run_dir": 3,
                "data": {"format": "txt", "train": {"path": "a", "num_samples": 0}},
                "emulator": {"compression_ratio": 0, "num_workers": 0},
                "adapter": {"r": "many", "targets": []},
                "ray": {"adress": "auto"},
            },
            "my.yaml",
        )
    lines = str(caught.value).splitlines()
    for key in (
        "run_dir",
        "model",
        "data.format",
        "data.train.num_samples",
        "emulator.compression_ratio",
        "emulator.num_workers",
        "adapter.r",
        "adapter.targets",
        "ray.adress",
    ):
        assert sum(line.startswith(f"my.yaml: {key} ") for line in lines) == 1, (key, lines)
    assert len(lines) == 9
    assert all(line.endswith(".") for line in lines)


@pytest.mark.parametrize("ratio", [0, -0.5, 1.0001, "half", None, float("nan")])
def test_ratio_outside_0_to_1(ratio: Any) -> None:
    assert "emulator.compression_ratio" in error_of(emulator={"compression_ratio": ratio})
    assert "emulator.ratios" in error_of(emulator={"ratios": {"q_proj": ratio}})


@pytest.mark.parametrize("ratio", [1, 1.0, 0.001])
def test_ratio_inside(ratio: float) -> None:
    assert config(emulator={"compression_ratio": ratio}).emulator.compression_ratio == ratio


@pytest.mark.parametrize(
    ("section", "key", "bad"),
    [
        ("data", "max_seq_length", 1),
        ("data", "format", "chatml"),
        ("calibration", "num_calibration_samples", 0),
        ("calibration", "num_calibration_tokens", 0),
        ("calibration", "tokens", "prompt"),
        ("adapter", "r", 0),
        ("adapter", "lora_dropout", 1.0),
        ("adapter", "init_lora_weights", "pissa"),
        ("finetune", "learning_rate", 0),
        ("correction", "clamp", 0),
        ("correction", "strength", -0.1),
        ("correction", "method", "best"),
        ("merge", "chunk_bytes", 1),
        ("evaluation", "num_samples", 0),
        ("model", "dtype", "int8"),
        ("emulator", "allocation", "best"),
        ("emulator", "objective", "best"),
        ("emulator", "storage", "best"),
    ],
)
def test_bad_value_names_its_key(section: str, key: str, bad: Any) -> None:
    assert f"{section}.{key}" in error_of(**{section: {key: bad}})


def test_frozen() -> None:
    made = config()
    with pytest.raises(ValidationError):
        made.seed = 3
    with pytest.raises(ValidationError):
        made.adapter.r = 3


# Sections that must agree.


def test_data_needs_a_source() -> None:
    with pytest.raises(ConfigError, match=r"data\.train\.path"):
        parse_config({**MINIMAL, "data": {"eval": {"path": "e.jsonl"}}})


def test_generated_data_takes_no_paths_and_one_format() -> None:
    made = parse_config({**MINIMAL, "data": {"generate": "docstrings", "format": "prompt_completion"}})
    assert made.data.train is None
    with pytest.raises(ConfigError, match=r"remove data\.selection\.path"):
        parse_config({**MINIMAL, "data": {"generate": "docstrings", "selection": {"path": "s.jsonl"}}})
    with pytest.raises(ConfigError, match=r"leave data\.format out"):
        parse_config({**MINIMAL, "data": {"generate": "docstrings", "format": "text"}})


# What passes through.


def test_training_arguments_pass_through() -> None:
    made = config(finetune={"weight_decay": 0.1, "lr_scheduler_type": "cosine", "num_workers": 2})
    assert made.finetune.model_extra == {"weight_decay": 0.1, "lr_scheduler_type": "cosine"}
    assert made.finetune.num_workers == 2


@pytest.mark.parametrize(
    "key", ["output_dir", "seed", "remove_unused_columns", "ignore_data_skip", "greater_is_better"]
)
def test_training_arguments_that_are_ours(key: str) -> None:
    assert f"finetune.{key} is set by emloc_ray itself: remove it." in error_of(finetune={key: 1})


@pytest.mark.parametrize(("key", "value"), [("fsdp", "full_shard"), ("fsdp_config", {}), ("parallelism_config", {})])
def test_what_scatters_a_model_is_deepspeed_alone(key: str, value: Any) -> None:
    text = error_of(finetune={key: value})
    assert f"finetune.{key} is not supported, as transformers' Trainer left FSDP2 out in silence" in text
    assert "finetune.deepspeed is what scatters a model over workers" in text


def test_no_files_are_an_error_of_their_own_key() -> None:
    assert "data.train.path is empty: give at least 1 item" in error_of(data={"train": {"path": []}})


NO_SIZES = ["1,5GiB", "24GiB 16GiB", "24GiB/2", "GiB", "-1GiB", "24Gi", "24 gigabytes", "8Gbit", True, []]


@pytest.mark.parametrize("size", NO_SIZES)
def test_a_size_is_a_number_and_a_unit(size: Any) -> None:
    assert f"memory_budget: {size!r} is no size: give a number and a unit, such as 24GiB" in error_of(
        memory_budget=size
    )
    assert config(memory_budget="1.5 GiB").memory_budget == 3 * 2**29


@pytest.mark.parametrize(("size", "told"), [(0, "greater than or equal to 1"), (24, "24 is 24 bytes: write 24GiB")])
def test_a_size_that_is_too_small_is_told(size: int, told: str) -> None:
    assert told in error_of(memory_budget=size)


@pytest.mark.parametrize(
    ("address", "variable", "joins"),
    [
        (None, None, False),
        ("local", None, False),
        ("auto", None, True),
        (None, "127.0.0.1:6379", True),
        ("local", "x:1", False),
    ],
)
def test_a_running_ray_is_joined_as_it_is(
    monkeypatch: pytest.MonkeyPatch, address: str | None, variable: str | None, joins: bool
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable is not None:  # as Ray sets it for a job that was submitted
        monkeypatch.setenv("RAY_ADDRESS", variable)
    ray = RayConfig(address=address, num_cpus=4, object_store_memory=10**8, namespace="mine")
    assert ray.joins is joins
    assert set(ray.init_options) == {"namespace"} | (set() if joins else {"num_cpus", "object_store_memory"})


@pytest.mark.parametrize(
    ("emulator", "asks"),
    [
        ({}, None),
        ({"allocation": "sensitivity"}, "emulator.allocation: sensitivity"),
        ({"objective": "predictions"}, "emulator.objective: predictions"),
        ({"objective": "predictions", "compression_ratio": 1.0}, None),
        ({"objective": "weights"}, None),
    ],
)
def test_what_asks_for_gradients(emulator: dict[str, Any], asks: str | None) -> None:
    assert config(emulator=emulator).emulator.asks_for_gradients == asks


def test_rows_to_heal_on_are_for_a_healing() -> None:
    data = {"train": {"path": "rows.jsonl"}, "healing": {"path": "other.jsonl"}}
    assert "data.healing names rows to heal on, but there is no healing: set emulator.healing.steps" in error_of(
        data=data
    )
    assert config(data=data, emulator={"healing": {"steps": 3}}).data.healing is not None


def test_ranks_that_follow_from_data_are_not_for_factors_that_look_at_none() -> None:
    told = error_of(emulator={"objective": "weights", "allocation": "sensitivity"})
    assert "emulator.objective: weights reads no data, but the ranks of emulator.allocation: sensitivity" in told


def test_the_gpus_of_a_worker_follow_from_those_that_ray_has() -> None:
    asked = config(finetune={"num_workers": 2}, calibration={"gpus_per_worker": 0}, evaluation={"gpus_per_worker": 0.5})
    assert [asked.emulator.gpus_per_worker, asked.emulator.gpus] == ["auto", 0]
    sections = ("calibration", "emulator", "finetune", "merge", "evaluation")
    for available, expected in ((0, [0, 0, 0, 0, 0.5]), (1, [0, 1, 0, 0, 0.5]), (2, [0, 1, 1, 0, 0.5])):
        decided = asked.with_gpus(available)
        assert [getattr(decided, name).gpus_per_worker for name in sections] == expected
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # pydantic's, of a value that is not of its field's type
            decided.model_dump(mode="json")
    assert "merging adds thin products" in error_of(merge={"gpus_per_worker": 1})


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"finetune": {"load_best_model_at_end": True}},
            "load_best_model_at_end needs validation losses: set eval_strategy",
        ),
        ({"finetune": {"early_stopping_patience": 2}}, "early_stopping_patience needs validation losses"),
        (
            {"finetune": {"eval_strategy": "steps", "deepspeed": "zero.json"}},
            "eval_strategy: steps does not go with deepspeed",
        ),
        (
            {"finetune": {"loraplus_lr_ratio": 16}, "adapter": {"method": "vera"}},
            "finetune.loraplus_lr_ratio is of LoRA's two factors, and vera has others",
        ),
        ({"finetune": {"metric_for_best_model": "f1"}}, "should be 'eval_loss' or 'eval_original_loss'"),
        ({"finetune": {"eval_original_every": 2}}, "eval_original_every needs validation losses"),
        (
            {"finetune": {"eval_strategy": "steps", "metric_for_best_model": "eval_original_loss"}},
            "eval_original_loss needs scores of the original: set eval_original_every",
        ),
        (
            {"data": {"train": {"path": "a"}, "validation": {"path": "b"}}},
            "and finetune.eval_strategy is no: set it to steps",
        ),
        (
            {"finetune": {"packing": True}, "adapter": {"method": "prompt_tuning", "num_virtual_tokens": 4}},
            "finetune.packing does not go with adapter.method prompt_tuning",
        ),
        (
            {"finetune": {"packing": True}, "data": {"train": {"path": "a"}, "packing": True}},
            "finetune.packing keeps apart rows that data.packing has joined",
        ),
    ],
)
def test_packing_and_validation_are_told_what_they_do_not_go_with(sections: dict[str, Any], words: str) -> None:
    assert words in error_of(**sections)


def test_a_lone_worker_may_share_a_gpu_and_checkpointing_needs_no_reentrance() -> None:
    found = config(finetune={"gpus_per_worker": 0.5, "gradient_checkpointing_kwargs": {"use_reentrant": False}})
    assert (found.finetune.gpus, found.finetune.bf16) == (0.5, "auto")


@pytest.mark.parametrize(
    ("emulator", "said"),
    [
        (
            {"residual_rank": 8},
            "residual_rank: 8 is of factors beside integers: set quantization to int2, int3, int4 or int8",
        ),
        (
            {"quantization": "nf4", "refinement": {"steps": 5}},
            "refinement fits floats and integers, and quantization: nf4 is neither: take int4, remove one of them",
        ),
        ({"quantization": "int8", "storage": "pivoted"}, "storage: pivoted does not go with quantization: int8"),
        ({"quantization": "int4", "group_size": 60}, "emulator.group_size"),
        ({"quantization": "int5"}, "emulator.quantization is 'int5'"),
    ],
)
def test_integers_are_told_what_they_do_not_go_with(emulator: dict[str, Any], said: str) -> None:
    assert said in error_of(emulator=emulator)
