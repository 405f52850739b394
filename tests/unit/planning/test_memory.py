"""Memory predictions: exact where arithmetic is, and monotone where it is not."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bare_runs import bare_run
from transformers import (
    BltConfig,
    Gemma4TextConfig,
    InternVLConfig,
    InternVLVisionConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
)

from emloc_ray.data import token_shards, tokenizing
from emloc_ray.modeling.architecture import ImageShape
from emloc_ray.planning import calibration_memory as planned
from emloc_ray.planning import machine
from emloc_ray.planning.budget import with_settings
from emloc_ray.planning.costs import with_base
from emloc_ray.planning.lengths import Lengths
from emloc_ray.planning.memory import BASE_BYTES, MemoryModel, total
from emloc_ray.planning.prepared import Prepared
from emloc_ray.planning.sizes import gram_bytes
from emloc_ray.stages.ray.session import LEAN_MEMORY

LENGTHS = Lengths(mean=40.0, longest=64.0)
ROW = Lengths(2048.0, 2048.0)
WEIGHED = {"allocation": "sensitivity", "objective": "predictions"}

pytestmark = pytest.mark.usefixtures("much_memory")


def bare(model_config: Any, **sections: Any) -> Prepared:
    """Without a budget, a row at a time."""
    row = {"per_device_train_batch_size": 1}
    return bare_run(model_config, **{"memory_budget": None, "finetune": row, **sections})


@pytest.fixture(scope="module")
def llama_7b() -> Prepared:
    """Llama 7B: 32 blocks, hidden 4096, MLP 11008, vocabulary 32000, untied."""
    return bare(LlamaConfig())


def test_llama_7b_by_hand(llama_7b: Prepared) -> None:
    model = MemoryModel(llama_7b, ROW)
    block = 4 * 4096**2 + 3 * 4096 * 11008
    assert llama_7b.layout.num_parameters == 6_738_415_616 == 32 * block + 2 * 32000 * 4096 + 65 * 4096
    inference = model.inference(1, 2048)
    assert inference["weights"] == 13_476_831_232
    assert inference["kv cache"] == 2 * 32 * 4096 * 2048 * 2 == 2**30
    assert inference["logits"] == 32000 * 2
    assert [gram_bytes(group) for group in llama_7b.layout.groups[:4]] == [67_108_864] * 3 + [484_704_256]
    assert sum(gram_bytes(group) for wave in model.waves() for group in wave) == 32 * (3 * 67_108_864 + 484_704_256)
    streamed = model.calibration_parts_by_block()
    assert streamed["weights"] == 2 * (block + 32000 * 4096 + 65 * 4096)  # embedding and norms, no head
    assert streamed["grams"] == 3 * 67_108_864 + 484_704_256
    assert streamed["hidden states"] == 2 * (32 * 2048 * 4096 * 2)
    assert model.adapter_parameters == 32 * 8 * (4 * 2 * 4096 + 3 * (4096 + 11008)) == 19_988_480


def test_finetuning_llama_7b_by_hand(llama_7b: Prepared) -> None:
    parts = MemoryModel(llama_7b, ROW).finetuning_parts()
    kept = 4 * 1024 * 2 * 4096 + 3 * 1472 * (4096 + 11008)  # of a block, at ratio 0.5
    assert parts["weights"] == 2 * (32 * kept + 2 * 32000 * 4096 + 65 * 4096)
    assert parts["optimizer"] == 16 * 19_988_480
    read = 4 * (6 * 4096 + 11008)  # float32 copies for q, k, v, o, gate, up and down
    inner = 2 * (3 * 4096 + 4096 + 2 * 11008 + 11008)  # q, k, v, attention's output, gate, up, their product
    saved = read + 7 * 8 * 4 + 2 * 4096 * 4 + inner
    update = 11008 * (2 + 3 * 4)
    assert parts["activations"] == 2048 * (32 * 4096 * 2 + saved + update)
    whole = MemoryModel(with_settings(llama_7b, 0.5, 1, 1, False), ROW).finetuning_parts()
    assert whole["activations"] == 2048 * (32 * saved + update)
    assert whole["weights"] == parts["weights"]


def test_a_chunk_of_logits_counts_where_it_is_more_than_a_block(llama_7b: Prepared) -> None:
    short = MemoryModel(llama_7b, Lengths(8.0, 8.0)).finetuning_parts()
    assert short["logits"] == 0
    wide = bare(LlamaConfig(vocab_size=2_000_000, num_hidden_layers=2))
    parts = MemoryModel(wide, ROW).finetuning_parts()
    assert parts["logits"] == 3 * 4 * 512 * 2_000_000
    assert parts["activations"] == 2048 * 2 * 4096 * 2
    capped = dataclasses.replace(wide, layout=dataclasses.replace(wide.layout, whole_logits=True))
    assert MemoryModel(capped, ROW).finetuning_parts()["logits"] == 3 * 4 * 2048 * 2_000_000


def test_factorizing_and_merging_llama_7b_by_hand(llama_7b: Prepared) -> None:
    model = MemoryModel(llama_7b, ROW)
    parts = (
        model.factorization_parts()
    )  # down_proj: 4096 × 11008, its Gram in float32, damped in float32 and in float64
    assert parts["grams"] == 11008**2 * (2 * 4 + 8)
    assert parts["weights"] == 4096 * 11008 * (2 + 4 + 8)
    kept = 1472 * (4096 + 11008)
    assert parts["products"] == 8 * 4096 * 11008 + 4 * 8 * 4096**2 + kept * (4 + 8)
    assert parts["factors"] == 2 * kept
    merge = model.merge_parts()
    assert merge["chunks"] == 2 * (32000 * 4096 * 2 // 8)
    adapter = 32 * 8 * (4 * (4096 + 4096) + 3 * (4096 + 11008))  # which all workers map, and one module's copy
    assert merge["adapter"] == 4 * (adapter + 8 * (4096 + 11008))


def test_a_gpu_s_worker_holds_the_group_that_it_computes_and_the_next_as_read() -> None:
    def read_ahead(workers: int, **more: Any) -> float | None:
        gpus = {"emulator": {"gpus_per_worker": 1, "num_workers": workers, **more}, "ray": {"num_gpus": 200}}
        return MemoryModel(bare(LlamaConfig(num_hidden_layers=2), **gpus), ROW).factorization_parts().get("read ahead")

    def packed(order: int) -> int:
        return 4 * order * (order + 1) // 2

    down = 2 * 4096 * 11008 + packed(11008)
    assert read_ahead(7) == 2 * down
    assert read_ahead(8) is None  # a group each
    gate_and_up = 2 * (2 * 4096 * 11008) + packed(4096) + 2 * packed(11008)
    assert read_ahead(7, **WEIGHED) == 2 * max(down + packed(4096), gate_and_up)


def test_a_gpu_s_worker_holds_the_group_that_it_corrects_and_the_next_as_read() -> None:
    def read_ahead(workers: int, gpus: int = 1, **emulator: Any) -> float | None:
        sections: dict[str, Any] = {
            "evaluation": {"gpus_per_worker": gpus, "num_workers": workers},
            "correction": {"method": "projection"},
            "ray": {"num_gpus": 200},
            "emulator": emulator,
        }
        return MemoryModel(bare(LlamaConfig(num_hidden_layers=2), **sections), ROW).correction_parts().get("read ahead")

    kept = 1472 * (4096 + 11008)
    down = 2 * (4096 * 11008 + kept) + 4 * 11008 * (11008 + 1) // 2
    assert read_ahead(7) == 2 * down
    assert read_ahead(8) == down  # a group each
    assert read_ahead(7, gpus=0) is None
    assert read_ahead(7, compression_ratio=1.0) is None  # nothing differs


def test_correcting_70_b_takes_less_than_ten_tflop() -> None:
    """By a tenth of its 80 layers, all alike."""
    sizes: dict[str, Any] = {
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 8,
        "num_attention_heads": 64,
    }
    prepared = bare(LlamaConfig(**sizes, num_key_value_heads=8), adapter={"r": 8})
    wide = sum(2 * spec.num_parameters * spec.in_features for spec in prepared.layout.specs)
    assert wide == pytest.approx(1.9e14, rel=0.02)  # the product Δ G of all layers
    assert MemoryModel(prepared, ROW).correction_work() == pytest.approx(4.86e11, rel=0.02)


def held(*arguments: object) -> int:
    """The most that a worker takes for itself: see tests/measured_worker.py."""
    tests = Path(__file__).parents[2]
    places = os.pathsep.join(map(str, (tests.parent, tests.parent / "pipelines", tests)))
    variables = {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1", **LEAN_MEMORY}
    command = [sys.executable, str(tests / "measured_worker.py"), *map(str, arguments)]
    return int(subprocess.run(command, env=variables, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [64, 1024])
def test_a_worker_that_tokenizes_holds_its_tokenizer_and_two_batches_of_rows(tokens: int, tmp_path: Path) -> None:
    small = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=30000
    )
    plan = total(MemoryModel(bare(small), Lengths(tokens, tokens)).tokenization_parts())
    assert plan / 2 < held("data", 30000, tokens, tmp_path) < plan


@pytest.mark.slow
def test_a_worker_that_writes_the_corrected_adapter_holds_that_and_a_module(tmp_path: Path) -> None:
    block = LlamaConfig(num_hidden_layers=1, vocab_size=300)
    parts = MemoryModel(bare(block, adapter={"r": 64}, correction={"method": "adapted"})).adapter_writing_parts()
    assert parts["adapter"] == 4 * 64 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert total(parts) / 2 < held("correct", 4096, 11008, 64, tmp_path) < 1.1 * total(parts)


def test_batches_of_the_data_are_those_that_are_planned() -> None:
    rows = tokenizing.ROWS_PER_BATCH, tokenizing.IMAGE_ROWS_PER_BATCH, token_shards.BATCH_BYTES
    assert rows == (planned.TOKENIZED_ROWS, planned.IMAGE_ROWS, planned.WRITTEN_IMAGE_BYTES)
    photos = Lengths(100.0, 100.0, images=1.0, image_bytes=1e5)
    assert MemoryModel(bare(LlamaConfig()), photos).tokenization_parts()["images"] == 96 * 1e5 + 3 * 256 * 1e5


def test_correction_opens_the_original_only_to_choose(llama_7b: Prepared) -> None:
    chosen = MemoryModel(bare(LlamaConfig(), correction={"method": "projection"}), ROW).correction_parts()
    assert "weights" not in chosen
    assert MemoryModel(llama_7b, ROW).correction_parts()["weights"] == 13_476_831_232
    assert total(chosen) < 4 * 2**30


def test_a_vision_tower_sees_tokens_of_its_own() -> None:
    vision = InternVLVisionConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    language = Qwen2Config(
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=160,
        vocab_size=300,
    )
    ready = bare(InternVLConfig(vision_config=vision, text_config=language))
    tower = {spec.block: 2048 for spec in ready.layout.specs if "vision_tower" in spec.block}
    ready = dataclasses.replace(ready, layout=dataclasses.replace(ready.layout, image=ImageShape(256, tower)))
    one, four = (MemoryModel(ready, dataclasses.replace(ROW, images=factor)) for factor in (1.0, 4.0))
    assert one.inference(1, 2048)["kv cache"] == 2 * 3 * (2 * 16) * 2048 * 2  # the language model's alone
    inputs = 2048 * 2 * (2 * 64)  # of the tower's two blocks
    assert four.finetuning_parts()["activations"] - one.finetuning_parts()["activations"] > 3 * inputs
    assert {block.width for block in four.blocks} == {64, 96}


def test_grams_are_in_squared_float32_once_a_shared_input(prepared: Callable[..., Prepared]) -> None:
    # Two blocks: q, k, v share 64 inputs, o has 64, gate and up share 64, down has 128.
    parts = with_base(MemoryModel(prepared(), LENGTHS).calibration_parts())
    assert parts["grams"] == 2 * 4 * (3 * 64**2 + 128**2)
    assert parts["base"] == BASE_BYTES


def test_streamed_holds_a_block_and_not_the_head(prepared: Callable[..., Prepared]) -> None:
    ready = prepared(model={"hold": "block_by_block"})
    model = MemoryModel(ready, LENGTHS)
    block = sum(spec.num_parameters for spec in ready.layout.specs) // 2
    outside = ready.layout.num_parameters - 2 * block - ready.layout.head_parameters
    parts = with_base(model.calibration_parts())
    assert parts["weights"] == 4 * (block + outside)
    assert parts["grams"] == 4 * (3 * 64**2 + 128**2)
    assert model.hidden_state_disk_bytes() == 2 * 10 * 40 * 64 * 4  # two of twelve rows are held out


def test_what_costs_less_is_predicted_to_cost_less(prepared: Callable[..., Prepared]) -> None:
    def finetune(**section: Any) -> int:
        return total(with_base(MemoryModel(prepared(finetune=section), LENGTHS).finetuning_parts()))

    assert finetune(gradient_checkpointing=True) < finetune(gradient_checkpointing=False)
    assert finetune(per_device_train_batch_size=1) < finetune(per_device_train_batch_size=8)
    model = MemoryModel(prepared(), LENGTHS)
    assert total(model.inference(1, 16)) < total(model.inference()) < total(model.inference(2))


def test_the_cache_of_inference_is_keys_and_values_of_every_block(prepared: Callable[..., Prepared]) -> None:
    # 2 blocks of 2 key-value heads of 16; a row of 64 tokens in float32, however long the data's are.
    assert MemoryModel(prepared(), Lengths(8.0, 16.0)).inference()["kv cache"] == 2 * 2 * (2 * 16) * 64 * 4


def test_layers_may_keep_keys_and_values_of_several_sizes() -> None:
    """Gemma 4's config gives ``head_dim`` of a layer alone."""
    sizes: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}
    sizes |= {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 16, "global_head_dim": 32}
    sizes |= {"num_hidden_layers": 2, "num_global_key_value_heads": 2, "num_kv_shared_layers": 0}
    sizes |= {"intermediate_size": 96, "vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 16}
    config = Gemma4TextConfig(**sizes)
    memory = MemoryModel(bare(config), Lengths(8.0, 16.0))
    assert memory.inference(1, 64)["kv cache"] == 2 * 2 * (16 + 32) * 64 * 2


def test_a_config_that_counts_its_layers_by_parts_has_a_cache_of_every_block() -> None:
    """BLT's own config gives neither a number of layers nor one of heads."""
    part = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 96}
    names = ("patcher_config", "encoder_config", "decoder_config", "global_config")
    sizes: dict[str, Any] = {"vocab_size": 300, "encoder_hash_byte_group_vocab": 32, **dict.fromkeys(names, part)}
    ready = bare(BltConfig(**sizes))
    memory = MemoryModel(ready, Lengths(8.0, 16.0))
    assert memory.inference(1, 64)["kv cache"] == 2 * len(memory.blocks) * ready.layout.hidden_size * 64 * 2


def test_each_method_counts_its_own_parameters(prepared: Callable[..., Prepared]) -> None:
    def memory(**adapter: Any) -> MemoryModel:
        return MemoryModel(prepared(adapter=adapter), LENGTHS)

    lora, dora = memory(r=4), memory(method="dora", r=4)
    assert dora.adapter_parameters - lora.adapter_parameters == sum(spec.out_features for spec in dora.adapted)
    prompt = memory(method="prompt_tuning", num_virtual_tokens=5)
    assert prompt.adapter_parameters == 5 * 64
    assert with_base(prompt.finetuning_parts())["optimizer"] == 16 * 5 * 64
    assert with_base(prompt.merge_parts()) == {"base": BASE_BYTES}
    assert with_base(prompt.correction_parts()) == {"base": BASE_BYTES}
    loha = memory(method="loha", r=2)  # trained small, corrected as LoRA of rank r²
    assert loha.adapter_parameters == 2 * sum(2 * (s.in_features + s.out_features) for s in loha.adapted)
    assert loha.corrected_parameters == sum(4 * (s.in_features + s.out_features) for s in loha.adapted)


def test_what_is_scaled_by_what_is_learned_is_kept(prepared: Callable[..., Prepared]) -> None:
    def finetune(**adapter: Any) -> Any:
        run = prepared(
            adapter=adapter, finetune={"per_device_train_batch_size": 1}, emulator={"compression_ratio": 1.0}
        )
        return MemoryModel(run, LENGTHS).finetuning_parts()

    lora, dora, vera = finetune(r=4), finetune(method="dora", r=4), finetune(method="vera", r=4)
    outputs = 2 * (3 * 64 + 64 + 2 * 128 + 64)  # of two blocks' linears, grouped heads aside
    assert dora["activations"] - lora["activations"] <= 64 * outputs * 8
    assert dora["activations"] - lora["activations"] == 2 * (vera["activations"] - lora["activations"]) > 0
    assert dora["row norms"] == 4 * 128 * (128 + 3 * 64)
    assert lora["row norms"] == 0
    lokr, loha = finetune(method="lokr", r=4), finetune(method="loha", r=2)
    assert (
        lokr["activations"] == vera["activations"] - 64 * 7 * 4 * 4
    )  # without what stands between two factors of rank 4
    # Of one block, as blocks are run again: r² columns and rows, or where these are more ΔW.
    assert loha["updates"] == 4 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert loha["activations"] == lora["activations"]  # of rank r², as much between their factors
    assert finetune(method="loha", r=32)["updates"] == 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)


@pytest.mark.parametrize("quantization", ["int4", "nf4"])
def test_dora_on_linears_in_few_bits_makes_no_dense_product(
    prepared: Callable[..., Prepared], quantization: str
) -> None:
    emulator = {"compression_ratio": 1.0, "quantization": quantization}
    run = prepared(adapter={"method": "dora", "r": 4}, emulator=emulator, finetune={"exact_steps": 2})
    model = MemoryModel(run, LENGTHS)
    assert model.finetuning_parts()["row norms"] == 0
    assert model.finishing_plan().parts["row norms"] == model.evaluation_plan().parts["row norms"] > 0


@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "vera", "r": 64},
        {"method": "lokr", "r": 8},
        {"r": 4, "rank_pattern": {"layers.0.self_attn.q_proj": 32}},
    ],
)
def test_steps_on_the_original_train_the_adapter_as_corrected(
    prepared: Callable[..., Prepared], adapter: dict[str, Any]
) -> None:
    model = MemoryModel(prepared(adapter=adapter, finetune={"exact_steps": 2}), LENGTHS)
    assert model.finishing_plan().parts["optimizer"] == 16 * model.corrected_parameters
    assert model.finetuning_parts()["optimizer"] == 16 * model.adapter_parameters < 16 * model.corrected_parameters


@pytest.mark.slow
def test_scores_while_training_are_within_the_budget_and_have_the_original_beside_the_emulator() -> None:
    asked = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 64, "eval_strategy": "steps"}

    def of(budget: Any, **more: Any) -> MemoryModel:
        return MemoryModel(bare(LlamaConfig(), finetune={**asked, **more}, memory_budget=budget), ROW)

    free, tight = (of(budget, eval_original_every=2) for budget in (None, "inference"))
    assert (free.validation_plan().hold, free.validation_rows()) == ("resident", 64)
    assert free.finetuning_parts()["weights"] == free.weights
    assert free.finetuning_parts()["emulator"] == free.emulator > 0.5 * free.weights
    assert tight.validation_plan().hold == "offloaded"
    assert 1 <= tight.validation_rows() < 64
    assert total(with_base(tight.finetuning_parts())) <= (tight.budget_bytes("finetune") or 0)
    alone = of("inference")
    assert alone.validation_plan().parts["weights"] == alone.emulator
    assert alone.validation_rows() >= tight.validation_rows()
    with_original = MemoryModel(with_settings(tight.prepared, 1.0, 1, 1, True), ROW)
    assert "emulator" not in with_original.validation_plan().parts


def mixture(num_experts: int) -> MemoryModel:
    """A Mixtral of one layer's width and another number of experts, two of them a token."""
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=2,
        num_local_experts=num_experts,
        num_experts_per_tok=2,
    )
    return MemoryModel(bare(config, finetune={"per_device_train_batch_size": 1}), ROW)


def test_experts_count_as_weights_all_and_as_activations_by_their_share_of_tokens() -> None:
    few, many = mixture(4), mixture(8)
    for of in (MemoryModel.finetuning_parts, MemoryModel.correction_parts, MemoryModel.evaluation_parts):
        assert of(many)["weights"] > 1.7 * of(few)["weights"]
    assert with_base(many.finetuning_parts())["activations"] == with_base(few.finetuning_parts())["activations"]
    spec = next(spec for spec in many.layout.specs if spec.name.endswith("0.down"))
    assert (spec.routed_share, spec.token_share) == (0.25, 0.25)
    # A Gram for what each expert's gate and up read, and one for what its down reads.
    grams = with_base(many.calibration_parts())["grams"] - with_base(few.calibration_parts())["grams"]
    assert grams == 2 * 4 * 4 * (1024**2 + 3584**2)


@pytest.mark.slow
def test_llama_7b_in_4_bits_by_hand() -> None:
    packed = MemoryModel(bare(LlamaConfig(), emulator={"quantization": "nf4", "compression_ratio": 1.0}), ROW)
    block = 4 * 4096**2 + 3 * 4096 * 11008
    outside = 2 * 32000 * 4096 + 65 * 4096
    # Half a byte, a byte for 64, four for 64 · 256; of each of the 224 linears two tables and some words.
    bits = 4 + 8 / 64 + 32 / (64 * 256)
    assert packed.emulator == pytest.approx(2 * outside + 32 * block * bits / 8 + 224 * 1258, abs=1)
    quarter = MemoryModel(bare(LlamaConfig(), emulator={"quantization": "nf4", "compression_ratio": 0.25}), ROW)
    assert 0.24 < (quarter.emulator - 2 * outside) / (packed.emulator - 2 * outside) < 0.26
    # Unpacked one at a time, the largest: indices of two elements each, float32, bfloat16.
    assert packed.finetuning_parts()["unpacked"] == 4096 * 11008 * (2 + 4 + 2)
    assert "unpacked" not in with_base(MemoryModel(bare(LlamaConfig()), ROW).finetuning_parts())
    assert packed.calibration_parts()["grams"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "bits_a_weight"), [(2, 2.25), (3, 3.25), (4, 4.25), (8, 8.25)])
def test_llama_7b_in_integers_by_hand(bits: int, bits_a_weight: float) -> None:
    packed = MemoryModel(bare(LlamaConfig(), emulator={"quantization": f"int{bits}", "compression_ratio": 1.0}), ROW)
    block, outside = 4 * 4096**2 + 3 * 4096 * 11008, 2 * 32000 * 4096 + 65 * 4096
    assert packed.emulator == pytest.approx(2 * outside + 32 * block * bits_a_weight / 8, rel=1e-5)
    assert packed.finetuning_parts()["unpacked"] == 4096 * 11008 * (2 + 4 + 2)


@pytest.mark.slow
def test_gradients_of_llama_7b_by_hand() -> None:
    ready = bare(LlamaConfig(), memory_budget="200GiB", emulator=WEIGHED, calibration={"batch_size": 1})
    model = MemoryModel(ready, ROW)
    parts = model.gradient_parts()
    assert parts["weights"] == 13_476_831_232
    assert parts["gradients"] == 32 * 4 * (4 * 4096**2 + 2 * 11008**2 + 4096**2)
    inner = 2 * (3 * 4096 + 4096 + 2 * 11008 + 11008)
    saved = 2 * 4096 * 4 + inner
    passing = (
        2 * 3 * 11008 + 3 * 2 * 4096
    )  # what gates, ups and their product have for gradients, and the residual stream
    assert parts["activations"] == 2048 * (32 * 4096 * 2 + saved + passing)
    square = MemoryModel(bare(LlamaConfig()), ROW).factorization_parts()["grams"]
    assert model.factorization_parts()["grams"] == square + 3 * 4 * 4096**2 + 4 * 4096 * 11008
    assert MemoryModel(bare(LlamaConfig()), ROW).gradient_parts()["gradients"] == 0


def test_a_group_holds_its_buckets_and_scores_an_adapter_s_update(llama_7b: Prepared) -> None:
    alone = MemoryModel(llama_7b, ROW)
    finetune = llama_7b.config.finetune.model_copy(update={"num_workers": 2})
    config = llama_7b.config.model_copy(update={"finetune": finetune})
    group = MemoryModel(dataclasses.replace(llama_7b, config=config), ROW)
    assert group.finetuning_parts()["optimizer"] - alone.finetuning_parts()["optimizer"] == 4 * alone.adapter_parameters
    rows = llama_7b.config.evaluation.batch_size
    without = MemoryModel(llama_7b, ROW).teacher_plan(rows).parts["activations"]
    assert alone.evaluation_parts()["activations"] - without == rows * 2048 * 2 * 4 * 11008


def test_experts_that_a_gpu_runs_together_are_planned_with_all_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def activations(gpus: int, capabilities: tuple[float, ...] = ()) -> float:
        monkeypatch.setattr(machine, "of_each_gpu", lambda what: capabilities)
        config = MixtralConfig(vocab_size=64, hidden_size=1024, intermediate_size=3584, num_hidden_layers=2)
        sections = {name: {"gpus_per_worker": gpus} for name in ("calibration", "finetune", "evaluation")}
        return MemoryModel(bare(config, **sections), ROW).inference()["activations"]

    # Two experts' inputs and four times their width, and what stands around them: what one expert alone takes is no part of it.
    assert activations(1) == pytest.approx(activations(0) * (3 + 2 * (1 + 4 * 3.5)) / (3 + 1 + 4 * 3.5), rel=0.01)
    assert activations(1, (9.0,)) == activations(1)
    assert activations(1, (8.0,)) == activations(0)
