"""Memory predictions: exact where arithmetic is, and monotone where it is not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    Gemma4TextConfig,
    InternVLConfig,
    InternVLVisionConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
)

from emloc_ray.config.reading import parse_config
from emloc_ray.errors import ConfigError
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.modeling.architecture import ImageShape, empty_model
from emloc_ray.modeling.loading import ModelSource
from emloc_ray.planning import calibration_memory
from emloc_ray.planning.budget import check_holding, solve, with_settings
from emloc_ray.planning.costs import with_base
from emloc_ray.planning.layout import make_layout
from emloc_ray.planning.lengths import Lengths
from emloc_ray.planning.memory import BASE_BYTES, MemoryModel, total
from emloc_ray.planning.plan import make_plan, within_budget
from emloc_ray.planning.prepared import Prepared, prepare
from emloc_ray.planning.sizes import gram_bytes
from emloc_ray.planning.skeleton import skeleton_of
from emloc_ray.stages.order import STEPS

LENGTHS = Lengths(mean=40.0, longest=64.0)
ROW = Lengths(2048.0, 2048.0)


@pytest.fixture(autouse=True)
def much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a budget models are held whole, whatever the machine has free."""
    monkeypatch.setattr("emloc_ray.planning.calibration_memory.available_bytes", lambda: 2**42)


@pytest.fixture
def prepared(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> Callable[..., Prepared]:
    """``prepared(key=value, section={…})``: a tiny Llama's run on rows of 70 characters."""
    data = tmp_path / "rows.jsonl"
    data.write_text((json.dumps({"text": "x" * 70}) + "\n") * 12)

    def make(**sections: Any) -> Prepared:
        values = {
            "run_dir": str(tmp_path / "run"),
            "memory_budget": None,
            "data": {"train": {"path": str(data)}, "max_seq_length": 64},
            **sections,
            "model": {"source": str(tiny_model_dir("llama")), **sections.get("model", {})},
        }
        return prepare(parse_config(values))

    return make


def bare(model_config: Any, **sections: Any) -> Prepared:
    """A run of a model that has no files, in bfloat16, a row at a time."""
    values = {
        "run_dir": "unused",
        "memory_budget": None,
        "model": {"source": "unused", "dtype": "bfloat16"},
        "data": {"train": {"path": "unused"}},
        "finetune": {"per_device_train_batch_size": 1},
        **sections,
    }
    config = parse_config(values)
    layout = make_layout(config, skeleton_of(model_config, empty_model(model_config)))
    return Prepared(config, RunDirectory("unused"), ModelSource(Path()), model_config, layout, {})


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
    streamed = model.calibrate_blocks()
    assert streamed["weights"] == 2 * (block + 32000 * 4096 + 65 * 4096)  # embedding and norms, no head
    assert streamed["grams"] == 3 * 67_108_864 + 484_704_256
    assert streamed["hidden states"] == 2 * (32 * 2048 * 4096 * 2)
    assert model.adapter_parameters == 32 * 8 * (4 * 2 * 4096 + 3 * (4096 + 11008)) == 19_988_480


def test_finetuning_llama_7b_by_hand(llama_7b: Prepared) -> None:
    parts = MemoryModel(llama_7b, ROW).finetune()
    kept = 4 * 1024 * 2 * 4096 + 3 * 1472 * (4096 + 11008)  # of a block, at ratio 0.5
    assert parts["weights"] == 2 * (32 * kept + 2 * 32000 * 4096 + 65 * 4096)
    assert parts["optimizer"] == 16 * 19_988_480
    read = 4 * (6 * 4096 + 11008)  # float32 copies for q, k, v, o, gate, up and down
    inner = 2 * (3 * 4096 + 4096 + 2 * 11008 + 11008)  # q, k, v, attention's output, gate, up, their product
    saved = read + 2 * 4096 * 4 + inner
    update = 11008 * (2 + 3 * 4)
    assert parts["activations"] == 2048 * (32 * 4096 * 2 + saved + update)
    whole = MemoryModel(with_settings(llama_7b, 0.5, 1, 1, False), ROW).finetune()
    assert whole["activations"] == 2048 * (32 * saved + update)
    assert whole["weights"] == parts["weights"]


def test_a_chunk_of_logits_counts_where_it_is_more_than_a_block(llama_7b: Prepared) -> None:
    short = MemoryModel(llama_7b, Lengths(8.0, 8.0)).finetune()
    assert short["logits"] == 0
    wide = bare(LlamaConfig(vocab_size=2_000_000, num_hidden_layers=2))
    parts = MemoryModel(wide, ROW).finetune()
    assert parts["logits"] == 3 * 4 * 512 * 2_000_000
    assert parts["activations"] == 2048 * 2 * 4096 * 2
    capped = dataclasses.replace(wide, layout=dataclasses.replace(wide.layout, whole_logits=True))
    assert MemoryModel(capped, ROW).finetune()["logits"] == 3 * 4 * 2048 * 2_000_000


def test_factorizing_and_merging_llama_7b_by_hand(llama_7b: Prepared) -> None:
    model = MemoryModel(llama_7b, ROW)
    parts = model.factorize()  # down_proj: 4096 × 11008, its Gram in float32, damped in float32 and in float64
    assert parts["grams"] == 11008**2 * (2 * 4 + 8)
    assert parts["weights"] == 4096 * 11008 * (2 + 4 + 8)
    kept = 1472 * (4096 + 11008)
    assert parts["products"] == 8 * 4096 * 11008 + 4 * 8 * 4096**2 + kept * (4 + 8)
    assert parts["factors"] == 2 * kept
    merge = model.merge()
    assert merge["chunks"] == 2 * (32000 * 4096 * 2 // 8)
    adapter = 32 * 8 * (4 * (4096 + 4096) + 3 * (4096 + 11008))  # which all workers map, and one module's copy
    assert merge["adapter"] == 4 * (adapter + 8 * (4096 + 11008))


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


def test_correction_opens_the_original_only_to_choose(llama_7b: Prepared) -> None:
    chosen = MemoryModel(bare(LlamaConfig(), correction={"method": "projection"}), ROW).correct()
    assert "weights" not in chosen
    assert MemoryModel(llama_7b, ROW).correct()["weights"] == 13_476_831_232
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
    assert four.finetune()["activations"] - one.finetune()["activations"] > 3 * inputs
    assert {block.width for block in four.blocks} == {64, 96}


def test_grams_are_in_squared_float32_once_a_shared_input(prepared: Callable[..., Prepared]) -> None:
    # Two blocks: q, k, v share 64 inputs, o has 64, gate and up share 64, down has 128.
    parts = with_base(MemoryModel(prepared(), LENGTHS).calibrate())
    assert parts["grams"] == 2 * 4 * (3 * 64**2 + 128**2)
    assert parts["base"] == BASE_BYTES


def test_streamed_holds_a_block_and_not_the_head(prepared: Callable[..., Prepared]) -> None:
    ready = prepared(model={"hold": "block_by_block"})
    model = MemoryModel(ready, LENGTHS)
    block = sum(spec.num_parameters for spec in ready.layout.specs) // 2
    outside = ready.layout.num_parameters - 2 * block - ready.layout.head_parameters
    parts = with_base(model.calibrate())
    assert parts["weights"] == 4 * (block + outside)
    assert parts["grams"] == 4 * (3 * 64**2 + 128**2)
    assert model.hidden_state_disk_bytes() == 2 * 128 * 40 * 64 * 4


def test_waves_fill_the_room_that_the_model_leaves(prepared: Callable[..., Prepared]) -> None:
    free = MemoryModel(prepared(), LENGTHS)
    assert len(free.waves()) == 1
    beside = total(with_base(free.calibrate())) - int(with_base(free.calibrate())["grams"])
    room = 4 * 128**2 + 4 * 64**2
    bounded = MemoryModel(prepared(memory_budget=beside + room, model={"hold": "resident"}), LENGTHS)
    waves = bounded.waves()
    assert [group for wave in waves for group in wave] == [group for wave in free.waves() for group in wave]
    assert len(waves) > 1
    assert all(sum(map(gram_bytes, wave)) <= room for wave in waves)


def test_workers_with_a_gpu_go_by_its_memory(
    prepared: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_memory, "gpu_bytes", lambda: BASE_BYTES + 1000)
    on_gpu = {"calibration": {"gpus_per_worker": 1}, "ray": {"num_gpus": 1}}
    assert MemoryModel(prepared(), LENGTHS).calibration_hold() == "resident"
    assert MemoryModel(prepared(**on_gpu), LENGTHS).calibration_hold() == "block_by_block"
    above = {**on_gpu, "memory_budget": "1GiB"}  # more than the card can hold
    assert MemoryModel(prepared(**above), LENGTHS).calibration_hold() == "block_by_block"
    elsewhere = {**above, "ray": {"address": "a-cluster:6379"}}
    assert MemoryModel(prepared(**elsewhere), LENGTHS).calibration_hold() == "resident"
    on_half = {**on_gpu, "calibration": {"gpus_per_worker": 0.5}}
    assert MemoryModel(prepared(**on_half), LENGTHS).worker_bytes("calibration") == 0.92 * (BASE_BYTES + 1000) / 2


def test_what_costs_less_is_predicted_to_cost_less(prepared: Callable[..., Prepared]) -> None:
    def finetune(**section: Any) -> int:
        return total(with_base(MemoryModel(prepared(finetune=section), LENGTHS).finetune()))

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


def test_a_budget_is_solved_for_the_largest_ratio_that_fits(prepared: Callable[..., Prepared]) -> None:
    ready = prepared(finetune={"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2})
    least = total(with_base(MemoryModel(with_settings(ready, 0.1, 1, 16, True), LENGTHS).finetune()))
    found = [solve(STEPS, ready, least + more, LENGTHS) for more in range(0, 40_000_000, 400_000)]
    for solution in found:
        assert solution.finetune_bytes <= solution.budget
        section = solution.prepared.config.finetune
        assert section.per_device_train_batch_size * section.gradient_accumulation_steps == 16
    ratios = [solution.prepared.config.emulator.compression_ratio for solution in found]
    assert ratios == sorted(ratios)
    assert ratios[0] < ratios[-1] == 0.95
    first, last = (found[at].prepared.config.finetune for at in (0, -1))
    assert (last.per_device_train_batch_size, last.gradient_checkpointing) == (8, False)
    assert first.per_device_train_batch_size < 8
    assert first.gradient_checkpointing


def test_a_budget_that_nothing_meets_says_what_would(prepared: Callable[..., Prepared]) -> None:
    with pytest.raises(ConfigError, match=r"No compression ratio fits 103 MiB: at 0\.1, .* needs 451 MiB"):
        solve(STEPS, prepared(), 2**30 // 10, LENGTHS)
    for adapter, knob in (
        ({"method": "lokr"}, "r"),
        ({"method": "ia3"}, "target_modules"),
        ({"method": "prompt_tuning", "num_virtual_tokens": 4}, "num_virtual_tokens"),
    ):
        with pytest.raises(ConfigError, match=rf"lower data\.max_seq_length or adapter\.{knob}\.$"):
            solve(STEPS, prepared(adapter=adapter), 2**30 // 10, LENGTHS)


def test_what_no_ratio_helps_is_told_with_what_would(llama_7b: Prepared) -> None:
    solution = solve(STEPS, llama_7b, 10 * 2**30, ROW)
    assert set(solution.too_large) == {"evaluate"}
    assert solution.sentence.endswith("lower evaluation.batch_size or data.max_seq_length.")
    with pytest.raises(ConfigError, match=r"No compression ratio fits 1\.00 GiB: at 0\.1, .* needs \d+\.\d\d GiB"):
        solve(STEPS, llama_7b, 2**30, ROW)


def test_the_solution_is_what_is_planned(prepared: Callable[..., Prepared]) -> None:
    ready = prepared(memory_budget=BASE_BYTES + 3_000_000)
    solution = within_budget(STEPS, ready).solution
    changed = solution.prepared
    plan = make_plan(STEPS, changed)
    stage = next(stage for stage in plan.stages if stage.name == "finetune")
    assert stage.worker_bytes == solution.finetune_bytes
    again = parse_config(ready.config.model_dump(mode="json"))
    assert again.memory_budget == ready.config.memory_budget
    assert ready.lengths.longest == pytest.approx(25)


def test_each_method_counts_its_own_parameters(prepared: Callable[..., Prepared]) -> None:
    def memory(**adapter: Any) -> MemoryModel:
        return MemoryModel(prepared(adapter=adapter), LENGTHS)

    lora, dora = memory(r=4), memory(method="dora", r=4)
    assert dora.adapter_parameters - lora.adapter_parameters == sum(spec.out_features for spec in dora.adapted)
    prompt = memory(method="prompt_tuning", num_virtual_tokens=5)
    assert prompt.adapter_parameters == 5 * 64
    assert with_base(prompt.finetune())["optimizer"] == 16 * 5 * 64
    assert with_base(prompt.merge()) == {"base": BASE_BYTES}
    assert with_base(prompt.correct()) == {"base": BASE_BYTES}
    loha = memory(method="loha", r=2)  # trained small, corrected as LoRA of rank r²
    assert loha.adapter_parameters == 2 * sum(2 * (s.in_features + s.out_features) for s in loha.adapted)
    assert loha.corrected_parameters == sum(4 * (s.in_features + s.out_features) for s in loha.adapted)


def test_what_is_scaled_by_what_is_learned_is_kept(prepared: Callable[..., Prepared]) -> None:
    def finetune(**adapter: Any) -> Any:
        run = prepared(
            adapter=adapter, finetune={"per_device_train_batch_size": 1}, emulator={"compression_ratio": 1.0}
        )
        return MemoryModel(run, LENGTHS).finetune()

    lora, dora, vera = finetune(r=4), finetune(method="dora", r=4), finetune(method="vera", r=4)
    outputs = 2 * (3 * 64 + 64 + 2 * 128 + 64)  # of two blocks' linears, grouped heads aside
    assert dora["activations"] - lora["activations"] <= 64 * outputs * 8
    assert dora["activations"] - lora["activations"] == 2 * (vera["activations"] - lora["activations"]) > 0
    assert dora["row norms"] == 4 * 128 * (128 + 3 * 64)
    assert lora["row norms"] == 0


def test_a_budget_never_takes_a_prefix_its_cache(prepared: Callable[..., Prepared]) -> None:
    run = prepared(adapter={"method": "prefix_tuning", "num_virtual_tokens": 3}, memory_budget="500MiB")
    assert solve(STEPS, run, 500 * 2**20, LENGTHS).prepared.config.finetune.gradient_checkpointing is False


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
    for of in (MemoryModel.finetune, MemoryModel.correct, MemoryModel.evaluate):
        assert of(many)["weights"] > 1.7 * of(few)["weights"]
    assert with_base(many.finetune())["activations"] == with_base(few.finetune())["activations"]
    spec = next(spec for spec in many.layout.specs if spec.name.endswith("0.down"))
    assert (spec.routed_share, spec.token_share) == (0.25, 0.25)
    # A Gram for what each expert's gate and up read, and one for what its down reads.
    grams = with_base(many.calibrate())["grams"] - with_base(few.calibrate())["grams"]
    assert grams == 2 * 4 * 4 * (1024**2 + 3584**2)


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
    assert packed.finetune()["unpacked"] == 4096 * 11008 * (2 + 4 + 2)
    assert "unpacked" not in with_base(MemoryModel(bare(LlamaConfig()), ROW).finetune())
    assert packed.calibrate()["grams"] > 0


@pytest.mark.parametrize(("bits", "bits_a_weight"), [(2, 2.25), (3, 3.25), (4, 4.25), (8, 8.25)])
def test_llama_7b_in_integers_by_hand(bits: int, bits_a_weight: float) -> None:
    packed = MemoryModel(bare(LlamaConfig(), emulator={"quantization": f"int{bits}", "compression_ratio": 1.0}), ROW)
    block, outside = 4 * 4096**2 + 3 * 4096 * 11008, 2 * 32000 * 4096 + 65 * 4096
    assert packed.emulator == pytest.approx(2 * outside + 32 * block * bits_a_weight / 8, rel=1e-5)
    assert packed.finetune()["unpacked"] == 4096 * 11008 * (2 + 4 + 2)


WEIGHED = {"allocation": "sensitivity", "objective": "predictions"}


def test_gradients_of_llama_7b_by_hand() -> None:
    ready = bare(LlamaConfig(), memory_budget="200GiB", emulator=WEIGHED, calibration={"batch_size": 1})
    model = MemoryModel(ready, ROW)
    parts = model.gradients()
    assert parts["weights"] == 13_476_831_232
    assert parts["gradients"] == 32 * 4 * (4 * 4096**2 + 2 * 11008**2 + 4096**2)
    inner = 2 * (3 * 4096 + 4096 + 2 * 11008 + 11008)
    saved = 2 * 4096 * 4 + inner
    assert parts["activations"] == 2048 * (32 * 4096 * 2 + saved + 11008 * (2 + 4))
    square = MemoryModel(bare(LlamaConfig()), ROW).factorize()["grams"]
    assert model.factorize()["grams"] == square + 3 * 4 * 4096**2 + 4 * 4096 * 11008
    assert MemoryModel(bare(LlamaConfig()), ROW).gradients()["gradients"] == 0


def test_sums_of_gradients_go_in_waves_too(prepared: Callable[..., Prepared]) -> None:
    free = MemoryModel(prepared(emulator=WEIGHED, calibration={"batch_size": 1}))
    [whole] = free.gradient_plan().waves
    assert [spec.name for spec in whole] == list(free.layout.weighed)
    beside = total(with_base(free.gradients())) - int(with_base(free.gradients())["gradients"])
    room = 4 * 128**2 + 4 * 64**2
    changes = {"emulator": WEIGHED, "model": {"hold": "resident"}, "calibration": {"batch_size": 1}}
    bounded = MemoryModel(prepared(memory_budget=beside + room, **changes))
    waves = bounded.gradient_plan().waves
    assert [spec for wave in waves for spec in wave] == list(whole)
    assert len(waves) > 1
    assert all(sum(4 * spec.out_features**2 for spec in wave) <= room for wave in waves)
    check_holding(prepared(memory_budget=beside + room, emulator=WEIGHED))


@pytest.mark.parametrize(("key", "value"), [("allocation", "sensitivity"), ("objective", "predictions")])
def test_a_worker_that_cannot_hold_the_whole_model_is_refused(
    prepared: Callable[..., Prepared], key: str, value: str
) -> None:
    least = BASE_BYTES + MemoryModel(prepared()).held["all_offloaded"]
    with pytest.raises(
        ConfigError, match=rf"emulator\.{key}: {value} needs gradients through the whole model, 4\d\d MiB in a worker"
    ):
        check_holding(prepared(memory_budget=least, emulator={key: value}))
    check_holding(prepared(memory_budget=least, emulator={"objective": "weights"}))
    told = r"memory_budget is 450 MiB, and a worker that holds its largest blocks takes 45\d MiB"
    with pytest.raises(ConfigError, match=told):
        check_holding(prepared(memory_budget=BASE_BYTES))


def test_a_share_of_a_gpu_that_is_too_small_is_refused(
    prepared: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_memory, "gpu_bytes", lambda: 2**30)
    gpus = {"ray": {"num_gpus": 1}}
    check_holding(prepared(**gpus, evaluation={"gpus_per_worker": 0.75}))
    told = (
        r"evaluation\.gpus_per_worker is 0\.25, of which 23\d MiB of memory can be filled, .* takes 45\d MiB before it"
    )
    with pytest.raises(ConfigError, match=told):
        check_holding(prepared(**gpus, evaluation={"gpus_per_worker": 0.25}))


def test_prompts_are_completed_together_where_weights_come_for_every_token(prepared: Callable[..., Prepared]) -> None:
    changes: dict[str, Any] = {"evaluation": {"num_exact_match": 64, "batch_size": 4}, "memory_budget": "10GiB"}
    assert MemoryModel(prepared(**changes, model={"hold": "resident"}), LENGTHS).prompts_at_once() == 4
    changes["model"] = {"hold": "offloaded"}
    free = MemoryModel(prepared(**changes), LENGTHS)
    assert free.prompts_at_once() == 64
    needed = BASE_BYTES + total(free.evaluating().parts)
    numbers = [
        MemoryModel(prepared(**{**changes, "memory_budget": needed + more}), LENGTHS).prompts_at_once()
        for more in (0, 500_000, 2_000_000)
    ]
    assert numbers == sorted({*numbers})
    assert (numbers[0], numbers[-1]) == (4, max(numbers))


def test_completions_move_weights_once_a_token_for_all_prompts_of_a_turn(prepared: Callable[..., Prepared]) -> None:
    section = {"num_samples": 12, "batch_size": 4, "num_exact_match": 64, "num_generations": 2, "max_new_tokens": 5}
    found = prepared(evaluation=section, model={"hold": "offloaded"}, memory_budget="10GiB")
    memory = MemoryModel(found, LENGTHS)
    evaluate = next(stage for stage in STEPS if stage.name == "evaluate")
    assert evaluate.cost is not None
    assert memory.prompts_at_once() == 64
    assert evaluate.cost(memory).moved_bytes == (12 / 4 + 5) * memory.moved(memory.evaluating().hold, 1, 1)
