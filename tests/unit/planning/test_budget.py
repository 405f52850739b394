"""What fits a budget or a card: the ratio that is solved for, waves and turns within it, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from test_memory import LENGTHS, ROW, WEIGHED, bare
from transformers import (
    LlamaConfig,
)

from emloc_ray.config.reading import parse_config
from emloc_ray.errors import ConfigError
from emloc_ray.planning import calibration_memory
from emloc_ray.planning.budget import check_holding, solve, with_settings
from emloc_ray.planning.costs import with_base
from emloc_ray.planning.memory import BASE_BYTES, MemoryModel, total
from emloc_ray.planning.plan import make_plan, within_budget
from emloc_ray.planning.prepared import Prepared
from emloc_ray.planning.sizes import gram_bytes
from emloc_ray.stages.order import STEPS

pytestmark = pytest.mark.usefixtures("much_memory")


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


def test_what_no_ratio_helps_is_told_with_what_would() -> None:
    llama_7b = bare(LlamaConfig())
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


def test_a_budget_never_takes_a_prefix_its_cache(prepared: Callable[..., Prepared]) -> None:
    run = prepared(adapter={"method": "prefix_tuning", "num_virtual_tokens": 3}, memory_budget="500MiB")
    assert solve(STEPS, run, 500 * 2**20, LENGTHS).prepared.config.finetune.gradient_checkpointing is False


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
