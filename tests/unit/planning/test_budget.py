"""What fits a budget or a card: the ratio that is solved for, waves and turns within it, and what is refused."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bare_runs import tiny_run
from test_memory import LENGTHS, WEIGHED

from emloc_ray.config.reading import parse_config
from emloc_ray.errors import ConfigError
from emloc_ray.io.formats.yaml_text import read_yaml
from emloc_ray.modeling.compiling import check_compiling
from emloc_ray.planning import calibration_memory
from emloc_ray.planning.budget import check_gpus, check_holding, solve_for_budget, training_bytes, with_settings
from emloc_ray.planning.costs import with_base
from emloc_ray.planning.memory import BASE_BYTES, MemoryModel, total
from emloc_ray.planning.plan import make_plan, within_budget
from emloc_ray.planning.prepared import Prepared
from emloc_ray.planning.sizes import gram_bytes
from emloc_ray.planning.work import num_sequences
from emloc_ray.stages.correct.stage import CORRECT
from emloc_ray.stages.evaluate.stage import EVALUATE
from emloc_ray.stages.order import STEPS
from emloc_ray.stages.stage import Stage

pytestmark = pytest.mark.usefixtures("much_memory")


def test_waves_fill_the_room_that_the_model_leaves(prepared: Callable[..., Prepared]) -> None:
    free = MemoryModel(prepared(), LENGTHS)
    assert len(free.waves()) == 1
    beside = total(with_base(free.calibration_parts())) - int(with_base(free.calibration_parts())["grams"])
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
    joined = prepared(**elsewhere).with_gpus(2, BASE_BYTES + 1000)  # as its nodes say
    assert MemoryModel(joined, LENGTHS).calibration_hold() == "block_by_block"
    assert joined.with_gpus(4, BASE_BYTES + 1000) is joined
    with pytest.raises(ConfigError, match=r"calibration.gpus_per_worker is 1, of which .* its largest blocks takes"):
        check_gpus(joined.with_gpus(2, BASE_BYTES))
    on_half = {**on_gpu, "calibration": {"gpus_per_worker": 0.5}}
    assert MemoryModel(prepared(**on_half), LENGTHS).worker_bytes("calibration") == 0.92 * (BASE_BYTES + 1000) / 2


def test_a_budget_is_solved_for_the_largest_ratio_that_fits(prepared: Callable[..., Prepared]) -> None:
    ready = prepared(finetune={"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2})
    least = total(with_base(MemoryModel(with_settings(ready, 0.1, 1, 16, True), LENGTHS).finetuning_parts()))
    budgets = range(least, least + 40_000_000, 400_000)
    found = [solve_for_budget(ready, budget, LENGTHS) for budget in budgets]
    for solution, budget in zip(found, budgets, strict=True):
        assert training_bytes(solution) <= budget
        section = solution.config.finetune
        assert section.per_device_train_batch_size * section.gradient_accumulation_steps == 16
        ratio, number = solution.config.emulator.compression_ratio, section.per_device_train_batch_size

        def with_batch(size: int, checkpointing: bool, ratio: float = ratio) -> int:
            return training_bytes(MemoryModel(with_settings(ready, ratio, size, 16 // size, checkpointing), LENGTHS))

        if section.gradient_checkpointing:  # fewer rows at once, down to a quarter, do not fit without it
            assert all(with_batch(size, False) > budget for size in (1, 2, 4, 8) if number / 4 <= size <= number)
    ratios = [solution.config.emulator.compression_ratio for solution in found]
    assert ratios == sorted(ratios)
    assert ratios[0] < ratios[-1] == 0.95
    first, last = (found[at].config.finetune for at in (0, -1))
    assert (last.per_device_train_batch_size, last.gradient_checkpointing) == (8, False)
    assert first.per_device_train_batch_size < 8
    assert first.gradient_checkpointing
    without = [solution for solution in found if not solution.config.finetune.gradient_checkpointing]
    assert any(solution.config.finetune.per_device_train_batch_size < 8 for solution in without)


def test_the_solution_is_what_is_planned(prepared: Callable[..., Prepared]) -> None:
    ready = prepared(memory_budget=BASE_BYTES + 3_000_000)
    choice = within_budget(ready)
    plan = make_plan(STEPS, choice.recommended.memory.prepared)
    stage = next(stage for stage in plan.stages if stage.name == "finetune")
    assert stage.worker_bytes == choice.recommended.needed
    again = parse_config(ready.config.model_dump(mode="json"))
    assert again.memory_budget == ready.config.memory_budget
    assert ready.lengths.longest == pytest.approx(25)


def test_a_budget_never_takes_a_prefix_its_cache(prepared: Callable[..., Prepared]) -> None:
    run = prepared(adapter={"method": "prefix_tuning", "num_virtual_tokens": 3}, memory_budget="500MiB")
    assert solve_for_budget(run, 500 * 2**20, LENGTHS).config.finetune.gradient_checkpointing is False


def test_sums_of_gradients_go_in_waves_too(prepared: Callable[..., Prepared]) -> None:
    free = MemoryModel(prepared(emulator=WEIGHED, calibration={"batch_size": 1}))
    [whole] = free.gradient_plan().waves
    assert [spec.name for spec in whole] == list(free.layout.gradient_linears)
    beside = total(with_base(free.gradient_parts())) - int(with_base(free.gradient_parts())["gradients"])
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


@pytest.mark.parametrize("emulator", [{"budget": "2.4 bits"}, {"allocation": "sensitivity"}])
def test_the_settings_that_a_refusal_names_need_no_gradients(
    prepared: Callable[..., Prepared], emulator: dict[str, Any]
) -> None:
    least = BASE_BYTES + MemoryModel(prepared()).held["all_offloaded"]
    with pytest.raises(ConfigError, match="needs gradients through the whole model") as refused:
        check_holding(prepared(memory_budget=least, emulator=emulator))
    named = re.search(r"or set (.*), which need none\.$", str(refused.value))
    assert named is not None
    settings = re.findall(r"(\w+) (null|uniform|activations|1\.0|int4)", named[1])
    assert len(settings) == named[1].count(",") + 2
    ready = prepared(memory_budget=least, emulator={**emulator, **{key: read_yaml(value) for key, value in settings}})
    check_holding(ready)
    assert ready.config.emulator.asks_for_gradients is None


@pytest.mark.parametrize(
    ("experts", "scattered", "offloaded", "told"),
    [(True, False, False, "experts"), (False, True, False, "deepspeed"), (False, False, True, "memory_budget")],
)
def test_blocks_that_are_no_graph_are_not_compiled(experts: bool, scattered: bool, offloaded: bool, told: str) -> None:
    check_compiling(False, False, False)
    with pytest.raises(ConfigError, match=rf"torch_compile does not go with .*{told}.*: remove it"):
        check_compiling(experts, scattered, offloaded)


def test_compiling_is_checked_before_a_run(prepared: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = prepared(finetune={"torch_compile_mode": "default"})
    check_holding(asked)
    monkeypatch.setattr(MemoryModel, "finetuning_hold", lambda self: "offloaded")
    check_holding(prepared())
    with pytest.raises(ConfigError, match="torch_compile does not go with weights that come and go"):
        check_holding(asked)


def test_compiling_is_checked_for_the_last_steps_on_an_original_that_does_not_fit(
    prepared: Callable[..., Prepared],
) -> None:
    offloaded = {"model": {"hold": "offloaded"}}
    check_holding(prepared(finetune={"torch_compile": True}, **offloaded))
    check_holding(prepared(finetune={"torch_compile": True, "exact_steps": 2}))
    check_holding(prepared(finetune={"exact_steps": 2}, **offloaded))
    with pytest.raises(ConfigError, match="torch_compile does not go with weights that come and go"):
        check_holding(prepared(finetune={"torch_compile": True, "exact_steps": 2}, **offloaded))


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
    needed = BASE_BYTES + total(free.evaluation_plan().parts)
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
    # A pass over the rows that are held out, which are fewer than asked for, and one a token.
    assert evaluate.cost(memory).moved_bytes == (1 + 5) * memory.moved(memory.evaluation_plan().hold, 1, 1)


def test_the_offloaded_original_keeps_the_batch_that_the_emulator_is_too_large_for(
    tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    section = {"batch_size": 8, "num_generations": 0, "num_exact_match": 0}
    sections = {"evaluation": section, "correction": {"max_share": None}, "model": {"hold": "offloaded"}}
    whole = tiny_run(tmp_path, tiny_model_dir(), 300, **sections)
    smaller = whole.config.evaluation.model_copy(update={"batch_size": 2})
    scored, selected = num_sequences(whole, "eval"), num_sequences(whole, "selection")

    def planned(budget: float | None) -> MemoryModel:
        config = whole.config.model_copy(update={"evaluation": smaller, "memory_budget": budget})
        return MemoryModel(dataclasses.replace(whole, config=config), LENGTHS)

    def moved(stage: Stage, memory: MemoryModel) -> float:
        assert stage.cost is not None
        return stage.cost(memory).moved_bytes

    free = planned(None)
    most = BASE_BYTES + max(total(plan.parts) for plan in (free.evaluation_plan(), free.selection_plan()))
    for memory, rows in ((free, 8), (planned(most), 8), (planned(BASE_BYTES), 2)):
        assert (memory.evaluation_rows(), memory.selection_rows()) == (rows, rows)
        evaluated, chosen = memory.evaluation_plan(), memory.selection_plan()
        assert moved(EVALUATE, memory) == memory.moved(evaluated.hold, scored, rows) > 0
        assert moved(CORRECT, memory) == memory.moved(chosen.hold, selected, rows) > 0
        assert total(memory.evaluation_parts()) >= total(evaluated.parts)
    assert total(with_base(planned(most).evaluation_parts())) <= most


def test_a_step_on_the_original_reads_as_many_rows_at_once_as_fit(prepared: Callable[..., Prepared]) -> None:
    section = {"exact_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 6}

    def planned(budget: float | None, hold: str = "offloaded") -> MemoryModel:
        return MemoryModel(prepared(finetune=section, model={"hold": hold}, memory_budget=budget), LENGTHS)

    free = planned(None)
    held = total(free.finishing_plan().parts)
    most = BASE_BYTES + held
    assert free.finishing_rows() == planned(most).finishing_rows() == 12
    assert planned(BASE_BYTES).finishing_rows() == planned(None, "resident").finishing_rows() == 2
    between = [planned(BASE_BYTES + held * share // 20) for share in range(6, 20)]
    # A step has 12: of 8 it would be one and a half micro-batches.
    assert {memory.finishing_rows() for memory in between} >= {4, 6}
    for memory in between:
        needed = total(with_base(memory.finishing_plan().parts))
        assert memory.finishing_rows() == 2 or needed <= memory.worker_bytes("finetune")
    finish = next(stage for stage in STEPS if stage.name == "finish")
    assert finish.cost is not None
    hold = free.finishing_plan().hold
    assert finish.cost(free).moved_bytes == 2 * 2 * free.moved(hold, 12, 12)  # two steps, forward and back
