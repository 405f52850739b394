"""What can be trained on within a budget, and which of it is recommended."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from benchmarks.on_paper import bare_prepared
from transformers import LlamaConfig

from emloc_ray.config.reading import load_config, parse_config
from emloc_ray.errors import ConfigError
from emloc_ray.io.formats.yaml_text import write_yaml
from emloc_ray.planning.alternatives import Alternative, Choice, choose_training
from emloc_ray.planning.costs import StageCost, busy_seconds, with_base
from emloc_ray.planning.emulator_budget import spend_evenly
from emloc_ray.planning.lengths import Lengths
from emloc_ray.planning.machine import Speeds
from emloc_ray.planning.memory import BASE_BYTES, MemoryModel, total
from emloc_ray.planning.model_checks import check_healing
from emloc_ray.planning.prepared import Prepared
from emloc_ray.planning.work import training_cost

MODEL = LlamaConfig(
    vocab_size=2000,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=12,
    num_attention_heads=8,
    tie_word_embeddings=False,
)
ROW = Lengths(64.0, 64.0)
# Of a memory so fast that unpacking few bits hardly counts: the rules of choice are tested by what products take.
FAST = Speeds(1e11, gpu_flops=1e14, link=25e9, gpu_memory=1e13)
BEST = {"allocation": "sensitivity", "objective": "predictions"}
MIB = 2**20


def values_of(budget: int | None, **sections: Any) -> dict[str, Any]:
    return {
        "run_dir": "unused",
        "memory_budget": budget,
        "model": {"source": "unused", "dtype": "bfloat16"},
        "data": {"train": {"path": "unused"}, "max_seq_length": 64},
        "emulator": BEST,
        "finetune": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "gpus_per_worker": 1},
        "ray": {"num_gpus": 1},
        **sections,
    }


def prepared(budget: int | None = None, model_config: Any = MODEL, **sections: Any) -> Prepared:
    ready = bare_prepared(values_of(budget, **sections), model_config)
    if ready.config.emulator.budget is None:
        return ready
    return dataclasses.replace(ready, layout=spend_evenly(ready.layout, ready.config.emulator, 2))


def chosen(megabytes: int, speeds: Speeds = FAST, model_config: Any = MODEL, **sections: Any) -> Choice:
    return choose_training(prepared(BASE_BYTES + megabytes * MIB, model_config, **sections), ROW, speeds)


def by_name(choice: Choice) -> dict[str, Alternative]:
    return {one.name.removeprefix("the original"): one for one in choice.alternatives}


def test_what_fits_whole_needs_no_emulator() -> None:
    choice = chosen(1000)
    assert choice.recommended.name == "the original"
    assert "no emulator is needed" in choice.sentence
    assert [one.name for one in choice.alternatives if one.unneeded] == ["an emulator", "an emulator of 3.2 bits"]
    finetune = choice.recommended.memory.prepared.config.finetune
    assert (finetune.per_device_train_batch_size, finetune.gradient_accumulation_steps) == (4, 2)
    assert choice.recommended.memory.prepared.config.model.hold == "auto"
    assert MemoryModel(choice.recommended.memory.prepared, ROW).finetuning_hold() == "resident"


def test_what_does_not_fit_goes_by_its_blocks_where_the_link_allows() -> None:
    choice = chosen(190, dataclasses.replace(FAST, link=1e15))
    alternatives = by_name(choice)
    assert not alternatives[""].fits
    offloaded = alternatives[", its blocks offloaded"]
    assert choice.recommended is offloaded
    assert "wait in the host's memory" in choice.sentence
    assert offloaded.config.finetune.per_device_train_batch_size == 8  # the fewest transfers of a step
    assert offloaded.needed < alternatives[" in 4 bits (NF4)"].needed < alternatives[""].needed
    # With room to keep what blocks computed, 4 bits run each block once less than blocks that go do.
    roomy = chosen(330, dataclasses.replace(FAST, link=1e15)).recommended
    assert (roomy.name, roomy.config.finetune.gradient_checkpointing) == ("the original in 4 bits", False)
    from_disk = chosen(330, dataclasses.replace(FAST, host_bytes=1e6, disk=1e6))
    assert by_name(from_disk)[", its blocks offloaded"].step_seconds > 100
    nf4, int4 = (by_name(from_disk)[f" in 4 bits{kind}"] for kind in (" (NF4)", ""))
    assert from_disk.recommended is int4  # which closed more of the gap, and is as fast
    assert int4.step_seconds <= 1.1 * nf4.step_seconds


def test_what_another_stage_refuses_is_not_recommended_where_there_is_another() -> None:
    ready = prepared(BASE_BYTES + 330 * MIB)
    best = choose_training(ready, ROW, FAST).recommended
    denied = [best.config.emulator.quantization]
    other = choose_training(ready, ROW, FAST, lambda run: run.config.emulator.quantization not in denied).recommended
    assert other.fits
    assert other.config.emulator.quantization not in denied
    assert choose_training(ready, ROW, FAST, lambda run: False).recommended.name == best.name  # the run says why


@pytest.mark.parametrize("more", [{}, {"refinement": {"steps": 5}}])
@pytest.mark.parametrize("megabytes", [1000, 330, 200, 140])
def test_the_overrides_make_the_recommended_run(tmp_path: Path, megabytes: int, more: dict[str, Any]) -> None:
    choice = chosen(megabytes, dataclasses.replace(FAST, link=1e6), emulator={**BEST, **more})
    file = tmp_path / "config.yaml"
    file.write_text(write_yaml(values_of(None, emulator={**BEST, **more})))
    config = load_config(file, choice.overrides)
    assert config == choice.recommended.memory.prepared.config
    recommended = MemoryModel(dataclasses.replace(choice.recommended.memory.prepared, config=config), ROW)
    assert recommended.finetuning_hold() == choice.recommended.memory.finetuning_hold()


def test_an_emulator_is_as_large_as_fits_and_says_what_was_measured() -> None:
    choice = chosen(200, dataclasses.replace(FAST, link=1e6))
    emulator = by_name(choice)["an emulator"]
    ratio = emulator.config.emulator.compression_ratio
    assert 0.1 < ratio < 1
    assert emulator.fits
    assert emulator.measured is not None
    assert emulator.measured.ratio <= ratio


def test_where_2_bits_do_not_fit_a_budget_of_fewer_is_spent() -> None:
    choice = chosen(137, dataclasses.replace(FAST, link=1e6))
    assert not by_name(choice)[" in 2 bits"].fits
    best = choice.recommended
    assert re.fullmatch(r"an emulator of [12](\.\d)? bits", best.name)
    assert (best.fits, best.config.emulator.objective) == (True, "predictions")
    assert best.measured is not None
    assert best.measured.bits is not None
    assert best.measured.bits <= float(best.name.split()[-2])
    assert {"emulator.budget=2 bits", "emulator.allocation=null"} <= set(choice.overrides)
    assert not [override for override in choice.overrides if "refinement" in override]  # a block would not fit
    # Its own stays, and no other budget beside it.
    own = {"budget": "1.4 bits", "objective": "predictions"}
    asked = chosen(137, dataclasses.replace(FAST, link=1e6), emulator=own)
    assert [one.name for one in asked.alternatives if "bits" in one.name and "emulator" in one.name] == [
        "an emulator of 1.4 bits"
    ]


@pytest.mark.parametrize(
    ("emulator", "steps"), [({}, 75), ({"refinement": {"steps": 5}}, 5), ({"healing": {"steps": 5}}, None)]
)
def test_a_budget_that_is_proposed_is_refined_unless_it_heals(emulator: dict[str, Any], steps: int | None) -> None:
    deep = LlamaConfig(**{**MODEL.to_dict(), "num_hidden_layers": 48})
    choice = chosen(460, dataclasses.replace(FAST, link=1e6), deep, emulator={**BEST, **emulator})
    proposed = choice.alternatives[-1]
    refinement = proposed.config.emulator.refinement
    assert proposed.name.endswith("bits")
    assert (None if refinement is None else refinement.steps) == steps
    if "healing" not in emulator:
        assert choice.recommended is proposed
        assert ("emulator.refinement.steps=75" in choice.overrides) is (steps == 75)  # its own stays
        assert total(with_base(proposed.memory.refinement_parts())) <= choice.budget


def test_fewer_bits_that_leave_memory_to_refine_are_taken_where_they_closed_more() -> None:
    def proposed(depth: int, size: int) -> Any:
        deep = LlamaConfig(**{**MODEL.to_dict(), "num_hidden_layers": depth})
        return chosen(size, dataclasses.replace(FAST, link=1e6), deep).alternatives[-1]

    found = [proposed(32, 300), proposed(32, 310), proposed(48, 480)]
    settings = [(one.config.emulator.budget, one.config.emulator.refinement is not None) for one in found]
    assert settings == [
        ("1.2 bits", True),
        ("2.4 bits", False),
        ("2.8 bits", True),
    ]  # 2 bits would fit first, unrefined
    assert [one.measured and one.measured.gap_closed for one in found] == [0.857, 0.947, 0.962]


@pytest.mark.parametrize(
    ("times", "recommended"), [(1.3, "the original, its blocks offloaded"), (1.5, "an emulator of 2.6 bits")]
)
def test_what_closes_less_in_a_faster_ones_time_is_left_out(times: float, recommended: str) -> None:
    """The emulator closed 96.2 %, as many as 73 % of the exact steps."""
    deep = LlamaConfig(**{**MODEL.to_dict(), "num_hidden_layers": 48})
    offloaded, *_, emulator = (
        one for one in chosen(460, dataclasses.replace(FAST, link=1e6), deep).alternatives if one.fits
    )
    link = 1e6 * offloaded.step_seconds / (times * emulator.step_seconds)
    choice = chosen(460, dataclasses.replace(FAST, link=link), deep)
    assert choice.alternatives[1].step_seconds == pytest.approx(times * emulator.step_seconds)
    assert choice.recommended.name == recommended


def test_a_faster_one_that_closed_too_little_leaves_nothing_out() -> None:
    deep = LlamaConfig(**{**MODEL.to_dict(), "num_hidden_layers": 32})
    choice = chosen(400, dataclasses.replace(FAST, link=1e6), deep)
    fastest = by_name(choice)["an emulator"]
    assert fastest.measured is not None
    assert fastest.measured.gap_closed == 0.736
    assert choice.recommended.name == "the original in 3 bits"
    assert 4 < choice.recommended.step_seconds / fastest.step_seconds < 5  # a quarter of the steps close 83 %


def test_where_3_bits_do_not_fit_a_budget_between_is_spent_before_2_bits() -> None:
    """From 2.4 bits on it closed more of the gap than 2 bits, by more than three points."""
    slow = dataclasses.replace(FAST, link=1e6)
    most = next(size for size in range(200, 140, -2) if not by_name(chosen(size, slow))[" in 3 bits"].fits)
    choice = chosen(most, slow)
    assert by_name(choice)[" in 2 bits"].fits
    assert choice.recommended.name == "an emulator of 3 bits"
    assert choice.recommended.measured is not None
    assert choice.recommended.measured.bits == 2.4


def test_a_budget_that_does_not_fit_has_the_largest_beside_it_that_does() -> None:
    own = {"budget": "9 bits", "objective": "predictions"}
    choice = chosen(137, dataclasses.replace(FAST, link=1e6), emulator=own)
    asked = by_name(choice)["an emulator of 9 bits"]
    assert not asked.fits
    assert choice.recommended.config.emulator.budget in choice.recommended.name
    assert asked.config.emulator.budget != choice.recommended.config.emulator.budget


def test_no_budget_is_offered_that_leaves_the_healing_nothing_to_grow() -> None:
    # In groups of 128 columns 2 bits take 2.13 a weight, and 3 bits 3.13: at 2.2 bits and more planned whole, and not healed.
    settings = {**BEST, "group_size": 128, "healing": {"steps": 4}}
    choice = chosen(1000, emulator=settings)
    assert [one.name for one in choice.alternatives if one.config.emulator.budget] == ["an emulator of 2 bits"]
    assert chosen(1000, emulator={**BEST, "group_size": 128}).alternatives[-1].name == "an emulator of 3.2 bits"


def test_no_ratio_is_offered_that_leaves_the_healing_nothing_to_grow() -> None:
    # The highest rank is 80 at a ratio of 0.1, 120 at 0.15.
    choice = chosen(140, dataclasses.replace(FAST, link=1e6), emulator={**BEST, "healing": {"steps": 3, "r": 96}})
    emulator = by_name(choice)["an emulator"]
    check_healing(emulator.config, emulator.memory.layout)
    assert (emulator.config.emulator.compression_ratio, emulator.fits) == (0.15, False)


@pytest.mark.slow
def test_a_budget_for_nothing_is_told_with_one_that_would_do() -> None:
    with pytest.raises(ConfigError, match=r"Nothing can be trained within 460 MiB: .*: give that much\.") as refused:
        chosen(10)
    needed = re.search(r"the least, of .*, is (\d+) MiB", str(refused.value))
    assert needed is not None
    with pytest.raises(ConfigError, match=r": give that much, or lower data\.max_seq_length"):
        chosen(int(needed[1]) - BASE_BYTES // MIB - 1)
    assert chosen(int(needed[1]) - BASE_BYTES // MIB).recommended.fits


def test_a_model_that_is_to_be_held_whole_is_not_offloaded() -> None:
    names = [one.name for one in chosen(1000, model={"source": "unused", "hold": "resident"}).alternatives]
    assert "the original, its blocks offloaded" not in names
    with_magnitudes = chosen(1000, adapter={"method": "dora"})
    assert "the original, its blocks offloaded" not in [one.name for one in with_magnitudes.alternatives]


def test_an_offloaded_step_moves_the_blocks_twice_a_micro_batch() -> None:
    ready = prepared(BASE_BYTES + 330 * MIB, emulator={"compression_ratio": 1.0})
    memory = MemoryModel(ready, ROW)
    assert memory.finetuning_hold() == "offloaded"
    blocks = 2 * sum(spec.num_parameters for spec in ready.layout.specs)
    cost = training_cost(memory, 10)
    assert cost.moved_bytes == 2 * 10 * 2 * blocks
    whole = training_cost(MemoryModel(prepared(emulator={"compression_ratio": 1.0}), ROW), 10)
    assert whole.moved_bytes == 0
    assert whole.flops == cost.flops


@pytest.mark.parametrize("quantization", ["nf4", "int2"])
def test_a_step_on_few_bits_unpacks_them_again_and_again(quantization: str) -> None:
    ready = prepared(emulator={"compression_ratio": 1.0, "quantization": quantization})
    memory, section = MemoryModel(ready, ROW), ready.config.finetune
    micro_batches = 10 * section.gradient_accumulation_steps
    weights = sum(spec.num_parameters for spec in ready.layout.specs)
    assert training_cost(memory, 10).unpacked == micro_batches * (2 + section.gradient_checkpointing) * weights
    assert training_cost(MemoryModel(prepared(emulator={"compression_ratio": 1.0}), ROW), 10).unpacked == 0


def test_unpacking_takes_a_core_s_products_or_a_gpu_s_memory() -> None:
    section = parse_config(values_of(None)).finetune.model_copy(update={"num_workers": 2})
    cost = StageCost({}, unpacked=1e12)
    assert busy_seconds(cost, section, dataclasses.replace(FAST, gpu_memory=1e12), 1e9) == pytest.approx(1.5)
    on_cpu = section.model_copy(update={"gpus_per_worker": 0.0})
    assert busy_seconds(cost, on_cpu, FAST, 1e9) == pytest.approx(250 / 0.2)


def test_the_slower_of_computing_and_moving_counts() -> None:
    section = parse_config(values_of(None)).finetune
    cost = StageCost({}, flops=1e14, moved_bytes=25e9, efficiency=0.5)
    assert busy_seconds(cost, section, FAST, 1e9) == pytest.approx(2)
    assert busy_seconds(dataclasses.replace(cost, sums_read=4 * 10**9), section, FAST, 1e9) == pytest.approx(10)
    assert busy_seconds(dataclasses.replace(cost, moved_bytes=100e9), section, FAST, 1e9) == pytest.approx(4)
    exact = dataclasses.replace(cost, float32_flops=1e13)
    assert busy_seconds(exact, section, dataclasses.replace(FAST, gpu_float32_flops=2e13), 1e9) == pytest.approx(3)
    slow = dataclasses.replace(FAST, host_bytes=1e8, disk=1e9)
    assert busy_seconds(cost, section, slow, 1e9) == pytest.approx(25)
    on_cpu = section.model_copy(update={"gpus_per_worker": 0.0})  # computes with what is in memory
    assert busy_seconds(cost, on_cpu, FAST, 1e9) == pytest.approx(2000)
    assert busy_seconds(exact, on_cpu, FAST, 1e9) == pytest.approx(2200)
