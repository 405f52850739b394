"""What is found out before anything starts, and what is refused there."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
import transformers
from bare_runs import alike_rows, tiny_run

from emloc_ray.config.reading import parse_config
from emloc_ray.errors import ConfigError
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.planning import skeleton
from emloc_ray.planning.prepared import Prepared, prepare


def write_rows(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"text": f"row {number}"}) + "\n" for number in range(count)))
    return path


def test_prepare_reads_no_more_than_it_must(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    # Weights are never opened but for their headers: cut each shard's tensors to zeros and all is still found.
    model_dir = tmp_path / "model"
    shutil.copytree(tiny_model_dir("llama"), model_dir)
    for file in model_dir.glob("*.safetensors"):
        content = file.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        file.write_bytes(content[:header] + bytes(len(content) - header))
    data: dict[str, Any] = {"train": {"path": str(write_rows(tmp_path / "a.jsonl", 5))}}
    data["eval"] = {"path": [str(write_rows(tmp_path / "b.jsonl", 3)), str(write_rows(tmp_path / "c.jsonl", 2))]}
    values = {"run_dir": str(tmp_path / "run"), "model": {"source": str(model_dir)}, "data": data}
    prepared = prepare(parse_config(values))
    assert {name: [source.num_rows for source in files] for name, files in prepared.files.items()} == {
        "train": [5],
        "eval": [3, 2],
    }
    assert prepared.source.directory == model_dir
    assert len(prepared.layout.specs) == 14
    assert not (tmp_path / "run").exists()


def test_gpus_are_decided_by_what_this_machine_has_and_anew_by_what_ray_has(
    tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    values: dict[str, Any] = {"run_dir": str(tmp_path / "run"), "model": {"source": str(tiny_model_dir("llama"))}}
    values["data"] = {"train": {"path": str(write_rows(tmp_path / "a.jsonl", 5))}}
    on_cpus, on_gpus = (prepare(parse_config({**values, "ray": {"num_gpus": gpus}})) for gpus in (0, 1))
    assert [found.config.finetune.gpus_per_worker for found in (on_cpus, on_gpus)] == [0, 1]
    assert on_cpus.written_config is not None
    assert on_cpus.written_config.finetune.gpus_per_worker == "auto"
    assert on_cpus.with_gpus(0) is on_cpus
    assert on_cpus.with_gpus(4).config.finetune.gpus_per_worker == 1


@pytest.mark.parametrize("link", [False, True])
def test_what_lies_in_the_run_s_directory_is_refused(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], link: bool
) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create({})
    shutil.copytree(tiny_model_dir("llama"), run.path("model"))
    rows = write_rows(run.path("log.jsonl"), 5)
    beside = write_rows(tmp_path / "run.jsonl", 5)
    place = tmp_path / "link" if link else run.root
    if link:
        place.symlink_to(run.root)
    values: dict[str, Any] = {"run_dir": str(run.root), "model": {"source": str(place / "model")}}
    values["data"] = {"train": {"path": str(beside)}}
    inside = "lies in run_dir .*run, where stages write and remove: move it out"
    with pytest.raises(ConfigError, match=f"^model.source: {run.path('model')} {inside}"):
        prepare(parse_config(values))
    values["model"] = {"source": str(tiny_model_dir("llama"))}
    values["data"]["train"] = {"path": [str(beside), str(place / "*.jsonl")]}
    with pytest.raises(ConfigError, match=f"^data.train.path: {rows} {inside}"):
        prepare(parse_config(values))
    values["data"]["train"] = {"path": str(beside)}
    prepare(parse_config(values))


def test_preparing_a_run_leaves_the_caller_s_random_numbers(
    tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    alike_rows(tmp_path)
    model, state = tiny_model_dir("llama"), torch.get_rng_state()
    tiny_run(tmp_path, model, finetune={"optim": "sgd", "lr_scheduler_type": "cosine"})
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def refused(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> Callable[..., str]:
    """``refused(section={…})``: what is said of a config with these keys; nothing may be written."""
    alike_rows(tmp_path)

    def sentences(model_dir: Path | None = None, **sections: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            tiny_run(tmp_path, model_dir or tiny_model_dir("llama"), **sections)
        assert not (tmp_path / "run").exists()
        return str(caught.value)

    return sentences


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"finetune": {"lr_scheduler_type": "foo"}},
            "finetune.lr_scheduler_type is 'foo': give one of linear, cosine, ",
        ),
        ({"finetune": {"accelerator_config": {"nope": 1}}}, "transformers refuses its settings"),
        (
            {"finetune": {"lr_scheduler_kwargs": {"num_cycles": 2}}},
            "finetune.lr_scheduler_kwargs: {'num_cycles': 2} cannot",
        ),
        (
            {"finetune": {"lr_scheduler_type": "cosine_with_min_lr"}},
            "finetune.lr_scheduler_type: cosine_with_min_lr cannot",
        ),
        ({"finetune": {"adam_beta1": 1.0}}, "finetune.adam_beta1: 1.0 cannot be used (Invalid beta parameter"),
        (
            {"finetune": {"optim": "sgd", "optim_args": "x"}},
            "finetune.optim: sgd, finetune.optim_args: x cannot be used",
        ),
        (
            {
                "finetune": {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
                "emulator": {"healing": {"steps": 2}},
            },
            "emulator.healing trains by finetune's settings, but without scores",
        ),
        (
            {"ray": {"num_gpus": 1}, "finetune": {"gpus_per_worker": 1, "optim": "schedule_free_adamw"}},
            "finetune.optim: schedule_free_adamw cannot be used (You need to install",
        ),
        ({"finetune": {"bf16": True, "fp16": True}}, "finetune.fp16 and finetune.bf16 are both true: set one"),
        ({"finetune": {"report_to": "tensorbord"}}, "finetune.report_to: tensorbord is not supported"),
        ({"finetune": {"report_to": ["tensorboard", "neptune"]}}, "finetune.report_to: neptune is not installed"),
        (
            {"finetune": {"accelerator_config": {"gradient_accumulation_kwargs": {"nope": 1}}}},
            "finetune.accelerator_config: {'gradient_accumulation_kwargs': {'nope': 1}} cannot be used",
        ),
        ({"finetune": {"accelerator_config": {"gradient_accumulation_kwargs": 3}}}, "finetune.accelerator_config: "),
        ({"finetune": {"warmup_steps": float("inf")}}, "finetune.warmup_steps"),
        ({"finetune": {"warmup_steps": float("nan")}}, "finetune.warmup_steps"),
        (
            {"finetune": {"torch_compile_mode": "max_autotune"}},
            "finetune.torch_compile_mode: max_autotune cannot be used (Unrecognized mode=max_autotune, should be one of",
        ),
        (
            {"finetune": {"torch_compile": True, "torch_compile_backend": "inductr"}},
            "finetune.torch_compile: True, finetune.torch_compile_backend: inductr cannot be used (Invalid backend",
        ),
        ({"finetune": {"warmup_steps": "abc"}}, "finetune.warmup_steps is 'abc'"),
        ({"finetune": {"gradient_checkpointing_kwargs": 3}}, "finetune.gradient_checkpointing_kwargs is 3"),
        ({"finetune": {"max_steps": 0}}, "finetune.max_steps: 0 is no number of steps"),
        ({"ray": {"num_cpus": 0}}, "ray.num_cpus is 0"),
        ({"ray": {"num_gpus": 0}, "finetune": {"gpus_per_worker": 1}}, "finetune asks Ray for 1 GPU at once"),
        ({"model": {"attn_implementation": "foo"}}, "transformers cannot build it"),
        ({"model": {"attn_implementation": "flash_attention_9"}}, "transformers cannot build it"),
        ({"adapter": {"target_modules": []}}, "adapter.target_modules"),
        ({"adapter": {"exclude_modules": ["q_prj"]}}, "adapter.exclude_modules: 'q_prj' matches none"),
        ({"adapter": {"rank_pattern": {"q_proj": 0}}}, "adapter.rank_pattern.q_proj is 0"),
        ({"adapter": {"rank_pattern": {"q_proj": 100}}}, "adapter.rank_pattern is 100"),
        ({"seed": -1}, "seed is -1"),
        ({"run_dir": "/dev/null/run"}, "/dev/null is a file"),
        ({"run_dir": "/proc/run"}, "cannot be written"),
        ({"evaluation": {"upper_bound": "s3://key:hush@runs/x"}}, "evaluation.upper_bound holds credentials"),
        ({"evaluation": {"upper_bound": "what://runs/x"}}, "evaluation.upper_bound what://runs/x is no place"),
        (
            {"evaluation": {"upper_bound": "/tmp"}},
            "evaluation.upper_bound /tmp is no run yet: run this config with emulator.compression_ratio=1.0",
        ),
        ({"evaluation": {"upper_bound": "/tmp"}}, "evaluation.upper_bound=null and another run_dir"),
    ],
)
def test_what_would_only_fail_on_a_worker_is_told_before(
    refused: Callable[..., str], sections: dict[str, Any], words: str
) -> None:
    assert words in refused(**sections)


def test_credentials_of_image_roots_are_refused(tmp_path: Path, prepared: Callable[..., Prepared]) -> None:
    data = {"train": {"path": str(tmp_path / "rows.jsonl")}, "max_seq_length": 64}
    prepared(data={**data, "image_roots": ["/photos", "s3://photos/cats?region=eu-west-1"]})
    with pytest.raises(ConfigError, match=r"^data\.image_roots holds credentials"):
        prepared(data={**data, "image_roots": ["/photos", "s3://key:hush@photos/cats"]})


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_hidden_layers": "x"},
        {"hidden_size": -4},
        {"vocab_size": 0},
        {"num_attention_heads": 0},
        {"rope_parameters": {"rope_type": "zzz"}},
        {"head_dim": 0},
        {"pad_token_id": 10**9},
        {"layer_types": ["x"]},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_model_s_config_may_hold_anything(
    refused: Callable[..., str], tmp_path: Path, tiny_model_dir: Callable[..., Path], wrong: dict[str, Any]
) -> None:
    shutil.copytree(tiny_model_dir("llama"), tmp_path / "odd")
    config = tmp_path / "odd" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **wrong}))
    said = refused(tmp_path / "odd")
    assert re.match("model: transformers cannot build it|model.source .*: its config cannot be read", said), said
    assert "\n" not in said


def test_a_model_whose_own_code_fails_is_one_sentence(
    refused: Callable[..., str], tmp_path: Path, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: Any, **inputs: Any) -> Any:  # as Llama 4's on text, in transformers 5.24
        raise AttributeError("no attribute 'image_outputs'")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", forward)
    said = refused(Path(shutil.copytree(tiny_model_dir("llama"), tmp_path / "fails")))
    assert re.fullmatch(
        r"model: LlamaForCausalLM of transformers \S+ cannot be run \(.*image_outputs.*\): fix .*\.", said
    )


@pytest.mark.parametrize(
    ("zero", "keys", "words"),
    [
        ({"zero_optimization": {"stage": 5}}, {}, "zero_optimization.stage is 5"),
        ({"zero_optimization": {"stage": 3}, "train_batch_size": 4}, {"num_workers": 2}, "train_batch_size=4"),
        ({"zero_optimization": {"stage": 2}}, {"use_cpu": True}, "finetune.use_cpu does not go with"),
    ],
)
def test_a_deepspeed_json_is_checked_with_the_rest(
    refused: Callable[..., str], tmp_path: Path, zero: dict[str, Any], keys: dict[str, Any], words: str
) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(zero))
    said = refused(finetune={"deepspeed": str(path), **keys}, adapter={"target_modules": "nope"}).splitlines()
    assert len(said) == 2
    assert any(words in line for line in said)


def test_every_pattern_that_fits_nothing_is_told_at_once(refused: Callable[..., str]) -> None:
    said = refused(
        emulator={"target_modules": ["nope"], "ratios": {"(": 0.5}}, adapter={"target_modules": ["nada", "q_proj"]}
    )
    assert [line.split(":")[0] for line in said.splitlines()] == [
        "emulator.target_modules",
        "adapter.target_modules",
        "emulator.ratios",
    ]


def test_a_model_without_a_tokenizer_or_of_other_shapes_is_told(
    refused: Callable[..., str], tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    model_dir = tmp_path / "model"
    shutil.copytree(tiny_model_dir("llama"), model_dir)
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    assert "the two are not of one model" in refused(model_dir)
    (model_dir / "config.json").write_text(json.dumps(config))
    # A merge of tokens that the vocabulary lacks, for which tokenizers raises a bare Exception.
    broken = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}}
    (model_dir / "tokenizer.json").write_text(json.dumps(broken))
    assert "has no tokenizer that opens" in refused(model_dir)
    for file in model_dir.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer that opens" in refused(model_dir)


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_an_empty_tokenizer_is_none(
    family: str, refused: Callable[..., str], tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """transformers makes one of these kinds where its files are not there."""
    model_dir = tmp_path / "model"
    shutil.copytree(tiny_model_dir(family), model_dir, ignore=shutil.ignore_patterns("token*", "vocab*", "special*"))
    assert "has no tokenizer that opens (none of its files is there): save one beside the weights" in refused(model_dir)


def test_more_tokens_than_learned_positions_are_told(
    refused: Callable[..., str], tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    data = {"train": {"path": str(tmp_path / "rows.jsonl")}, "max_seq_length": 129}
    assert "the model has 128 positions: lower it to 128" in refused(tiny_model_dir("gpt2"), data=data)
    adapter = {"method": "prompt_tuning", "num_virtual_tokens": 20}
    said = refused(tiny_model_dir("gpt2"), data={**data, "max_seq_length": 108}, adapter=adapter)
    assert "20 virtual tokens come before, and the model has 128 positions: lower it to 104" in said  # padded to 112


def test_rows_that_are_held_out_are_not_trained_on(refused: Callable[..., str], tmp_path: Path) -> None:
    rows, folder = tmp_path / "rows.jsonl", tmp_path / "more"
    folder.mkdir()
    shutil.copy(rows, folder / "test.jsonl")
    data = {"train": {"path": str(folder)}, "max_seq_length": 64, "eval": {"path": str(folder / "test.jsonl")}}
    said = refused(data=data)
    assert f"data.eval and data.train both read {folder / 'test.jsonl'}: held-out rows must not be trained on" in said
    assert "data.selection and data.train both" in refused(data={**data, "eval": None, "selection": data["eval"]})
    hub = {"train": {"path": "hf:some/rows"}, "selection": {"path": "hf:some/rows"}, "max_seq_length": 64}
    assert "data.selection and data.train both read hf:some/rows:train" in refused(data=hub)
    other = {"lr_scheduler_type": "foo"}  # which is refused beside it
    assert "both read" not in refused(data={**hub, "selection": None, "eval": hub["train"]}, finetune=other)
    sliced = {**hub, "selection": {"path": "hf:some/rows:train[:10%]"}}
    assert "both read hf:some/rows:train[:10%] (rows of hf:some/rows:train): held-out" in refused(data=sliced)
    healed = {"train": {"path": str(rows)}, "healing": {"path": [str(rows), str(folder / "test.jsonl")]}}
    sizes: dict[str, Any] = {"max_seq_length": 64}
    healing: dict[str, Any] = {"emulator": {"healing": {"steps": 2}}}
    both = f"data.healing and data.train both read {rows}, some of whose rows are kept for "
    assert f"{both}eval, selection: healing must" in refused(data=healed | sizes, **healing)
    for name in ("test", "choose", "watch"):
        shutil.copy(rows, tmp_path / f"{name}.jsonl")
    own = {key: {"path": str(tmp_path / f"{key}.jsonl")} for key in ("test", "choose", "watch")}
    named = healed | sizes | {"eval": own["test"], "healing": healed["train"]}
    assert f"{both}selection: healing must" in refused(data=named, **healing)
    named["selection"] = own["choose"]
    assert "some of whose rows" not in refused(data=named, finetune=other, **healing)
    scored = {"eval_strategy": "steps", "eval_steps": 1}
    assert f"{both}validation: healing must" in refused(data=named, finetune=scored, **healing)
    named["validation"] = own["watch"]
    assert "some of whose rows" not in refused(data=named, finetune=scored | other, **healing)
    said = refused(data=named | {"healing": own["choose"]}, finetune=scored, **healing)
    assert f"data.selection and data.healing both read {tmp_path / 'choose.jsonl'}: held-out rows" in said


def test_flash_attention_is_refused_where_something_computes_in_float32(
    refused: Callable[..., str], tiny_model_dir: Callable[..., Path]
) -> None:
    def said(model: dict[str, Any], stored: str = "float32", **finetune: Any) -> str:
        source = str(tiny_model_dir("llama", dtype=stored))
        asked = {"attn_implementation": "flash_attention_2", "source": source, **model}
        return refused(model=asked, finetune=finetune, data={"train": {"path": "missing.jsonl"}})

    alone = "flash_attention_2 computes in 16 bits alone, and"
    assert f"{alone} model.dtype is float32: leave one of them out." in said({"dtype": "float32"}, "bfloat16")
    assert f"{alone} finetune.bf16: false trains this float32 checkpoint in float32: leave" in said({}, bf16=False)
    for free in (
        said({}),
        said({}, bf16=False, fp16=True),
        said({}, "bfloat16", bf16=False),
        said({"dtype": "bfloat16"}, bf16=False),
        said({"attn_implementation": "sdpa", "dtype": "float32"}, bf16=False),
    ):
        assert "missing.jsonl" in free
        assert alone not in free


def test_liger_is_refused_where_it_computes_nothing_or_something_else(
    refused: Callable[..., str],
    tiny_model_dir: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, Any] = {"use_liger_kernel": True, "gpus_per_worker": 1}

    def said(family: str, **more: Any) -> str:
        return refused(tiny_model_dir(family), finetune={**asked, **more}, ray={"num_gpus": 1})

    assert "would compute experts from fused weights, and emulators" in said("mixtral")
    assert "set finetune.liger_kernel_config to {swiglu: false}" in said("mixtral", liger_kernel_config={"rope": True})
    assert "experts" not in said("mixtral", liger_kernel_config={"swiglu": False})
    assert "finetune.use_liger_kernel needs the liger_kernel package" in said("llama")
    known = SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": None})
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", known)
    assert "Liger has no kernels for the model's type, gpt2: remove it" in said("gpt2")
    assert "Liger has no kernels" not in said("llama")


def test_what_an_encoder_cannot_read_is_told(refused: Callable[..., str], tmp_path: Path) -> None:
    model_dir = families.save("T5", tmp_path / "t5")
    assert "reads a prompt with its encoder" in refused(model_dir)
    data = {"train": {"path": str(tmp_path / "rows.jsonl")}, "format": "prompt_completion", "packing": True}
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 9)
    assert "data.packing joins rows" in refused(model_dir, data=data)
    assert "finetune.loss_on is all" in refused(model_dir, data={**data, "packing": False}, finetune={"loss_on": "all"})
    counted = {"tokens": "completion"}
    assert "calibration.tokens is completion" in refused(
        model_dir, data={**data, "packing": False}, calibration=counted
    )
    data = {**data, "packing": False}
    said = refused(model_dir, data=data, finetune={"packing": True})
    assert "finetune.packing needs a model that keeps packed rows apart, and this one reads a row's prompt" in said


def test_what_transformers_takes_is_passed_whatever_we_set_ourselves(
    tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    data: dict[str, Any] = {"train": {"path": str(write_rows(tmp_path / "a.jsonl", 5))}}
    values = {"run_dir": str(tmp_path / "run"), "model": {"source": str(tiny_model_dir("llama"))}, "data": data}
    settings = {"report_to": "none", "use_cpu": True, "lr_scheduler_type": "cosine", "warmup_steps": 3}
    assert prepare(parse_config({**values, "finetune": settings})).config.finetune.model_extra == settings


def test_a_file_that_leaves_nothing_to_train_on_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    rows = {"path": str(write_rows(tmp_path / "two.jsonl", 2))}
    told = "data.train has 2 rows, of which data.selection, data.eval take 2: give more"
    assert told in refused(data={"train": rows})
    sample = {"path": str(write_rows(tmp_path / "many.jsonl", 30)), "num_samples": 2}
    assert told in refused(data={"train": sample})
    one = {"path": str(write_rows(tmp_path / "one.jsonl", 1))}
    said = refused(data=dict.fromkeys(("train", "selection", "eval"), one), finetune={"eval_strategy": "steps"})
    assert "of which data.validation takes 1: give more, or a path of its own to data.validation." in said
    assert "of which" not in refused(
        data={"train": {"path": str(write_rows(tmp_path / "three.jsonl", 3))}}, adapter={"r": 9999}
    )


def test_linears_that_peft_would_not_load_are_named(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model_dir = Path(shutil.copytree(tiny_model_dir("llama"), tmp_path / "model"))
    monkeypatch.setattr(skeleton, "renamed_by_peft", lambda _, names: [name for name in names if "mlp.down" in name])
    said = (
        r"for 2 linears of this model \(model\.layers\.0\.mlp\.down_proj\), .*exclude_modules to \[mlp\.down_proj\]\.$"
    )
    for method in ("lora", "loha"):
        with pytest.raises(ConfigError, match=said):
            tiny_run(tmp_path, model_dir, adapter={"method": method})
    tiny_run(tmp_path, model_dir, adapter={"exclude_modules": ["mlp.down_proj"]})
    tiny_run(tmp_path, model_dir, adapter={"method": "ia3"})


@pytest.mark.parametrize(
    ("family", "adapter", "said"),
    [
        ("gpt2", {"method": "lokr"}, "lokr with these settings does not fit the model"),
        ("llama", {"method": "loha", "target_modules": ["q_prj"]}, "adapter.target_modules: 'q_prj' matches none"),
        ("llama", {"method": "ia3", "feedforward_modules": ["up_proj"]}, "'up_proj' matches none of the 6 linears"),
        ("llama", {"method": "ia3", "feedforward_modules": "("}, "adapter.feedforward_modules: '(' is not a regular"),
        ("llama", {"method": "loha", "r": 40}, "adapter.r is 40, above the smaller side 32 of"),
        (
            "llama",
            {"method": "prefix_tuning", "num_virtual_tokens": 65},
            "the model has 128 positions: lower it to 56, or",
        ),
        ("llama", {"method": "prefix_tuning", "num_virtual_tokens": 64}, None),
        ("gpt2", {"method": "prefix_tuning", "num_virtual_tokens": 100}, "100 virtual tokens come before"),
        ("opt", {"method": "ia3"}, None),
        ("llama", {"method": "vera"}, None),
        ("mixtral", {"method": "dora"}, "dora adapts no experts, and PEFT takes 16 of these linears for experts'"),
        ("mixtral", {"method": "ia3", "target_modules": "all-linear"}, "ia3 adapts no experts"),
        (
            "qwen3_moe",
            {"method": "dora", "target_modules": ["q_proj", "layers.0.mlp.up_proj"]},
            "layers.0.mlp.up_proj)",
        ),
        ("mixtral", {"method": "loha", "target_modules": ["q_proj", "v_proj"]}, None),
        ("mixtral", {"method": "ia3"}, None),
        (
            "T5",
            {"method": "prefix_tuning", "num_virtual_tokens": 4},
            "virtual tokens go with decoder-only models",
        ),
        ("T5", {"method": "ia3"}, None),
    ],
)
def test_an_adapter_that_does_not_fit_the_model_is_one_sentence(
    family: str,
    adapter: dict[str, Any],
    said: str | None,
    tmp_path: Path,
    tiny_model_dir: Callable[..., Path],
    task_file: Path,
) -> None:
    values = {
        "run_dir": str(tmp_path / "run"),
        "model": {"source": str(families.save("T5", tmp_path / "t5") if family == "T5" else tiny_model_dir(family))},
        "data": {"train": {"path": str(task_file)}, "format": "prompt_completion", "max_seq_length": 64},
        "adapter": adapter,
    }
    if said is None:
        found = prepare(parse_config(values)).layout
        assert found.adapted or "virtual" in str(adapter)
        assert found.adapter_parameters
        return
    with pytest.raises(ConfigError) as caught:
        prepare(parse_config(values))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_4_bits_without_bitsandbytes_are_refused(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest)
    )
    said = refused(emulator={"quantization": "nf4"})
    assert (
        "nf4 needs the bitsandbytes package: pip install 'emloc-ray[quantization]', or take int4, which needs none."
        in said
    )


def test_zero_3_in_4_bits_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    said = refused(finetune={"deepspeed": str(path), "num_workers": 2}, emulator={"quantization": "nf4"})
    assert f"finetune.deepspeed {path} is ZeRO stage 3, which cannot scatter weights in few bits" in said


@pytest.mark.parametrize(
    ("held_out", "other"),
    [("eval", "selection"), ("eval", "validation"), ("eval", "healing"), ("validation", "train")],
)
def test_rows_to_report_or_choose_on_are_read_for_nothing_else(
    held_out: str, other: str, refused: Callable[..., str], tmp_path: Path
) -> None:
    own, both = tmp_path / "own.jsonl", tmp_path / "rows.jsonl"
    shutil.copy(both, own)
    data: dict[str, Any] = {"train": {"path": str(own)}, "max_seq_length": 64}
    data |= {held_out: {"path": str(both)}, other: {"path": str(both)}}
    sections = {"finetune": {"eval_strategy": "steps"}, "emulator": {"healing": {"steps": 2}}}
    assert f"data.{held_out} and data.{other} both read {both}: held-out rows" in refused(data=data, **sections)
