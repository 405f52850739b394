"""What a worker holds at its peak in passes through an emulator, and while it is made: parts that are easily left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bare_runs import bare_run
from transformers import LlamaConfig, MixtralConfig

from emloc_ray.core.trained_integers import ELEMENTS
from emloc_ray.planning.lengths import Lengths
from emloc_ray.planning.memory import MemoryModel, total
from emloc_ray.planning.plan import StagePlan

pytestmark = pytest.mark.usefixtures("much_memory")


def memory(model_config: Any = None, **sections: Any) -> MemoryModel:
    """Of two blocks of Llama 7B by default, without a budget, on rows of 64 tokens."""
    prepared = bare_run(model_config or LlamaConfig(num_hidden_layers=2), memory_budget=None, **sections)
    return MemoryModel(prepared, Lengths(64.0, 64.0))


@pytest.mark.parametrize("quantization", ["int4", "nf4"])
def test_linears_that_are_packed_without_a_gram_count_where_they_are_largest(quantization: str) -> None:
    def factorize(**emulator: Any) -> dict[str, float]:
        wide = LlamaConfig(num_hidden_layers=2, intermediate_size=44032)
        return memory(wide, emulator={"target_modules": ["q_proj"], **emulator}).factorization_parts()

    floats, packed = factorize(), factorize(quantization=quantization)
    assert floats["weights"] == 4096 * 4096 * (2 + 4 + 8)
    assert packed["weights"] == 4096 * 44032 * (2 + 4 + 8)
    assert packed.get("grams", 0) == 0


@pytest.mark.parametrize(
    ("capability", "sections", "itemsize"),
    [
        ("8.9", {}, 2),
        ("7.5", {}, 4),
        (None, {}, 4),
        ("8.9", {"model": {"source": "unused", "dtype": "float32"}}, 4),
        ("8.9", {"evaluation": {"gpus_per_worker": 0}}, 4),
        ("8.9", {"finetune": {"gpus_per_worker": 1, "bf16": False}}, 4),
        ("8.9", {"finetune": {"gpus_per_worker": 1, "fp16": True}}, 4),
        ("8.9", {"ray": {"address": "local-cluster:6379"}}, 4),
    ],
)
def test_a_float32_model_counts_as_the_gpus_of_all_passes_hold_it(
    monkeypatch: pytest.MonkeyPatch, capability: str | None, sections: dict[str, Any], itemsize: int
) -> None:
    figures = {} if capability is None else {"compute_cap": (capability, "9.0"), "memory.total": ("24000", "80000")}
    monkeypatch.setattr("emloc_ray.planning.machine.ask_gpus", lambda what: figures.get(what, ()))
    asked = {name: {"gpus_per_worker": 1} for name in ("calibration", "finetune", "evaluation")}
    wide = LlamaConfig(num_hidden_layers=2, dtype=torch.float32)
    found = memory(wide, **{"model": {"source": "unused"}, **asked, **sections})
    assert found.itemsize == itemsize
    assert found.file_itemsize == 4
    assert found.weights == itemsize * found.layout.num_parameters


@pytest.mark.parametrize(("capability", "is_slow"), [("8.9", True), ("12.0", True), ("8.0", False), ("9.0", False)])
def test_what_is_computed_again_in_float64_is_on_the_host_of_a_gpu_that_is_slow_at_it(
    monkeypatch: pytest.MonkeyPatch, capability: str, is_slow: bool
) -> None:
    """Which has computed it in float32 before, with Cholesky's factor, as every layer is on a GPU."""
    on_cpu = total(memory().factorization_parts())
    figures = {"compute_cap": (capability,), "memory.total": ("24000",)}
    monkeypatch.setattr("emloc_ray.planning.machine.ask_gpus", lambda what: figures.get(what, ()))
    parts = memory(emulator={"gpus_per_worker": 1}).factorization_parts()
    planned = StagePlan("factorize", parts, 0, 0.0, 1, 1, 1)
    assert is_slow is (planned.host_bytes - parts["read ahead"] >= 20 * 11008**2)
    if is_slow:
        assert parts["in float64"] == on_cpu
        assert parts["grams"] == 3 * 4 * 11008**2  # as summed, damped and its root
        assert planned.gpu_bytes >= 3 * 4 * 11008**2 + 4 * 4096 * 11008  # and the weight
    else:
        assert parts["grams"] == (3 * 4 + 2 * 8) * 11008**2
        assert total(parts) - parts["read ahead"] == on_cpu + (4 + 8) * 11008**2


def refined(model_config: Any = None, **sections: Any) -> MemoryModel:
    return memory(model_config, emulator={"refinement": {"steps": 5}}, **sections)


def test_refining_holds_no_head_unless_it_is_the_embedding_too() -> None:
    untied, tied = refined(), refined(LlamaConfig(num_hidden_layers=2, tie_word_embeddings=True))
    assert untied.refinement_parts() == tied.refinement_parts()
    kept = 4 * 1024 * 2 * 4096 + 3 * 1472 * (4096 + 11008)
    outside = 32000 * 4096 + 5 * 4096
    assert untied.refinement_parts()["weights"] == 2 * (2 * outside + kept)
    assert untied.refinement_parts()["optimizer"] == (4 * 4 + 2) * kept  # as the products cast them to bfloat16
    in_float32 = refined(model={"source": "unused", "dtype": "float32"})
    assert in_float32.refinement_parts()["optimizer"] == 4 * 4 * kept


def test_refining_holds_the_original_s_block_only_while_rows_pass_it() -> None:
    small = memory(emulator={"refinement": {"steps": 5}, "compression_ratio": 0.05}).refinement_parts()
    block, outside = 4 * 4096**2 + 3 * 4096 * 11008, 32000 * 4096 + 5 * 4096
    assert small["weights"] == 2 * (2 * outside + block)  # more than a twentieth of it and its optimizer
    assert small.get("optimizer", 0) == 0


def test_refining_integers_holds_floats_in_their_place_and_one_matrix_of_gradients_beside() -> None:
    parts = memory(
        emulator={"compression_ratio": 1.0, "quantization": "int2", "refinement": {"steps": 5}}
    ).refinement_parts()
    block, largest = 4 * 4096**2 + 3 * 4096 * 11008, 4096 * 11008
    # Trained in float32 with gradient and two moments; beside it the weight in bfloat16 that is made of it.
    assert parts["optimizer"] == (4 * 4 + 2) * block
    assert parts["integers"] == (2 + 4) * largest + 6 * 4 * ELEMENTS
    floats = refined().refinement_parts()
    assert floats["integers"] == 0
    assert parts["weights"] < floats["weights"]


def test_refining_keeps_of_experts_what_their_share_of_tokens_takes() -> None:
    def activations(num_experts: int) -> float:
        sizes: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 2}
        config = MixtralConfig(vocab_size=64, num_local_experts=num_experts, num_experts_per_tok=2, **sizes)
        return refined(config).refinement_parts()["activations"]

    assert activations(8) == activations(4)


def test_whatever_an_emulator_in_few_bits_computes_unpacks_a_weight() -> None:
    in_4_bits: dict[str, Any] = {"quantization": "int4", "compression_ratio": 1.0}
    offloaded = {"source": "unused", "dtype": "bfloat16", "hold": "offloaded"}
    packed = memory(LlamaConfig(num_hidden_layers=16), emulator=in_4_bits, model=offloaded)
    unpacked = packed.finetuning_parts()["unpacked"]
    assert unpacked == 4096 * 11008 * (2 + 4 + 2)
    assert packed.validation_plan().parts["unpacked"] == unpacked
    assert packed.emulator > packed.held["offloaded"]
    for parts in (packed.correction_parts(), packed.evaluation_parts()):
        assert (parts["weights"], parts["unpacked"]) == (packed.emulator, unpacked)


def test_an_adapter_is_corrected_at_the_highest_of_its_ranks() -> None:
    adapter = {"r": 8, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 64}}
    narrow, wide = memory(adapter={**adapter, "rank_pattern": {}}), memory(adapter=adapter)
    assert wide.corrected_parameters == 8 * narrow.corrected_parameters
    assert wide.adapter_parameters < wide.corrected_parameters
