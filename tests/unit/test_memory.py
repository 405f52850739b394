"""Memory predictions: exact where arithmetic is, and monotone where it is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emloc_ray.budget import solve, with_settings
from emloc_ray.config import parse_config
from emloc_ray.errors import ConfigError
from emloc_ray.memory import BASE_BYTES, Lengths, MemoryModel, gram_bytes, total
from emloc_ray.planner import make_plan, row_lengths, within_budget
from emloc_ray.preparation import Prepared, prepare

LENGTHS = Lengths(mean=40.0, longest=64.0)


@pytest.fixture
def prepared(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> Callable[..., Prepared]:
    """``prepared(key=value, section={…})``: a tiny Llama's run on rows of 70 characters."""
    data = tmp_path / "rows.jsonl"
    data.write_text((json.dumps({"text": "x" * 70}) + "\n") * 12)

    def make(**sections: Any) -> Prepared:
        values = {
            "run_dir": str(tmp_path / "run"),
            "model": {"source": str(tiny_model_dir("llama"))},
            "data": {"train": {"path": str(data)}, "max_seq_length": 64},
            **sections,
        }
        return prepare(parse_config(values))

    return make


def test_grams_are_in_squared_float32_once_a_shared_input(prepared: Callable[..., Prepared]) -> None:
    # Two blocks: q, k, v share 64 inputs, o has 64, gate and up share 64, down has 128.
    parts = MemoryModel(prepared(), LENGTHS).stage("calibrate")
    assert parts["grams"] == 2 * 4 * (3 * 64**2 + 128**2)
    assert parts["base"] == BASE_BYTES


def test_streamed_holds_a_block_and_not_the_head(prepared: Callable[..., Prepared]) -> None:
    ready = prepared(calibration={"mode": "streamed"})
    model = MemoryModel(ready, LENGTHS)
    block = sum(spec.num_parameters for spec in ready.layout.specs) // 2
    outside = ready.layout.num_parameters - 2 * block - ready.layout.head_parameters
    parts = model.stage("calibrate")
    assert parts["weights"] == 4 * (block + outside)
    assert parts["grams"] == 4 * (3 * 64**2 + 128**2)
    assert model.hidden_state_disk_bytes() == 2 * 128 * 40 * 64 * 4


def test_waves_fill_the_room_that_the_model_leaves(prepared: Callable[..., Prepared]) -> None:
    free = MemoryModel(prepared(), LENGTHS)
    assert len(free.waves()) == 1
    beside = total(free.stage("calibrate")) - int(free.stage("calibrate")["grams"])
    room = 4 * 128**2 + 4 * 64**2
    bounded = MemoryModel(prepared(memory_budget=beside + room, calibration={"mode": "resident"}), LENGTHS)
    waves = bounded.waves()
    assert [group for wave in waves for group in wave] == [group for wave in free.waves() for group in wave]
    assert len(waves) > 1
    assert all(sum(map(gram_bytes, wave)) <= room for wave in waves)


def test_what_costs_less_is_predicted_to_cost_less(prepared: Callable[..., Prepared]) -> None:
    def finetune(**section: Any) -> int:
        return total(MemoryModel(prepared(finetune=section), LENGTHS).stage("finetune"))

    assert finetune(gradient_checkpointing=True) < finetune(gradient_checkpointing=False)
    assert finetune(per_device_train_batch_size=1) < finetune(per_device_train_batch_size=8)
    short = MemoryModel(prepared(), Lengths(8.0, 16.0))
    assert total(short.inference()) < total(MemoryModel(prepared(), LENGTHS).inference())


def test_the_cache_of_inference_is_keys_and_values_of_every_block(prepared: Callable[..., Prepared]) -> None:
    # 2 blocks of 2 key-value heads of 16; 8 rows of 64 tokens in float32.
    assert MemoryModel(prepared(), LENGTHS).inference()["kv cache"] == 2 * 2 * (2 * 16) * (8 * 64) * 4


def test_a_budget_is_solved_for_the_largest_ratio_that_fits(prepared: Callable[..., Prepared]) -> None:
    ready = prepared(finetune={"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2})
    least = total(MemoryModel(with_settings(ready, 0.1, 1, 16, True), LENGTHS).stage("finetune"))
    found = [solve(ready, least + more, LENGTHS) for more in range(0, 40_000_000, 400_000)]
    for solution in found:
        assert solution.finetune_bytes <= solution.budget
        assert solution.micro_batch * solution.gradient_accumulation_steps == 16
    ratios = [solution.compression_ratio for solution in found]
    assert ratios == sorted(ratios)
    assert ratios[0] < ratios[-1] == 0.95
    assert (found[-1].micro_batch, found[-1].gradient_checkpointing) == (8, False)
    assert found[0].micro_batch < 8
    assert found[0].gradient_checkpointing


def test_a_budget_that_nothing_meets_says_what_would(prepared: Callable[..., Prepared]) -> None:
    with pytest.raises(ConfigError, match=r"No compression ratio fits 0\.10 GiB: at 0\.1, .* needs 0\.44 GiB"):
        solve(prepared(), 2**30 // 10, LENGTHS)


def test_the_solution_is_what_is_planned(prepared: Callable[..., Prepared]) -> None:
    ready = prepared(memory_budget=BASE_BYTES + 3_000_000)
    solution, changed = within_budget(ready)
    plan = make_plan(changed)
    stage = next(stage for stage in plan.stages if stage.name == "finetune")
    assert stage.worker_bytes == solution.finetune_bytes
    again = parse_config(ready.config.model_dump(mode="json"))
    assert again.memory_budget == ready.config.memory_budget
    assert row_lengths(ready).longest == pytest.approx(25)
