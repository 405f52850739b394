"""What a config's healing makes of a run before it starts: ranks, settings, memory, disk, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bare_runs import bare_run, tiny_run
from transformers import LlamaConfig

from emloc_ray.config.reading import check_config
from emloc_ray.data.formats import Tokens
from emloc_ray.data.token_shards import shard_name, write_index, write_shard
from emloc_ray.errors import ConfigError
from emloc_ray.planning.alternatives import choose_training
from emloc_ray.planning.budget import solve_for_budget, training_bytes, with_settings
from emloc_ray.planning.costs import with_base
from emloc_ray.planning.lengths import Lengths
from emloc_ray.planning.machine import Speeds
from emloc_ray.planning.memory import BASE_BYTES, MemoryModel, total
from emloc_ray.planning.plan import StagePlan, make_plan
from emloc_ray.planning.prepared import Prepared, Training
from emloc_ray.planning.training import factor_ranks, healing_split, healing_training, quantized_late, rounded_late
from emloc_ray.planning.work import difference_work, rows_a_step
from emloc_ray.stages.context import Context, Inputs
from emloc_ray.stages.factorize.job import FactorizationJob
from emloc_ray.stages.factorize.stage import FACTORIZE, factorization_job
from emloc_ray.stages.finetune.stage import finetune_job
from emloc_ray.stages.heal.stage import HEAL, healing_job, no_healing
from emloc_ray.stages.order import STEPS
from emloc_ray.stages.tokens.stage import split_inputs

pytestmark = pytest.mark.usefixtures("much_memory")
ROW = Lengths(2048.0, 2048.0)


@pytest.fixture
def prepared(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> Callable[..., Prepared]:
    """``prepared(healing={…}, section={…})``: a tiny Llama's run on 300 rows of 20 tokens."""

    def make(healing: dict[str, Any] | None, **sections: Any) -> Prepared:
        emulator = {**sections.pop("emulator", {}), "healing": healing}
        return tiny_run(tmp_path, tiny_model_dir("llama"), 300, emulator=emulator, **sections)

    return make


def large(healing: dict[str, Any] | None, **sections: Any) -> Prepared:
    """A 7B model, a row at a time."""
    sections = {"finetune": {"per_device_train_batch_size": 1}, **sections}
    return bare_run(LlamaConfig(), **{**sections, "emulator": {**sections.get("emulator", {}), "healing": healing}})


def stage(found: Prepared, name: str) -> StagePlan:
    return next(entry for entry in make_plan(STEPS, found).stages if entry.name == name)


@pytest.mark.parametrize(
    ("healing", "said"),
    [
        ({}, "emulator.healing.steps is missing: set it."),
        ({"steps": 0}, "emulator.healing.steps is 0"),
        ({"steps": 3, "rank": 4}, "emulator.healing.rank is not a key"),
        ({"steps": 3, "learning_rate": 0}, "emulator.healing.learning_rate is 0"),
        ({"steps": 3, "loss_on": "prompt"}, "emulator.healing.loss_on is 'prompt'"),
    ],
)
def test_bad_settings_are_named(healing: dict[str, Any], said: str) -> None:
    values = {"run_dir": "x", "model": {"source": "y"}, "data": {"train": {"path": "z"}}}
    _, lines = check_config({**values, "emulator": {"healing": healing}})
    assert any(line.startswith(said) for line in lines), lines


def test_a_rank_that_no_layer_has_is_refused(prepared: Callable[..., Prepared]) -> None:
    assert prepared({"steps": 3, "r": 20})  # the MLP's ranks are 21
    with pytest.raises(ConfigError, match=r"emulator.healing.r is 21, and no linear's rank is above it .*21\)"):
        prepared({"steps": 3, "r": 21})


def test_at_ratio_one_it_is_left_out_and_told(prepared: Callable[..., Prepared]) -> None:
    found = prepared({"steps": 3, "r": 100}, emulator={"compression_ratio": 1.0})
    assert factor_ranks(found) == {}
    assert "heal" not in [entry.name for entry in make_plan(STEPS, found).stages]
    assert "compression_ratio 1.0" in (no_healing(found.config) or "")
    assert no_healing(prepared(None).config) is None
    assert no_healing(prepared({"steps": 3, "r": 8}).config) is None


def healed(prepared: Prepared) -> Training:
    healing = prepared.config.emulator.heals
    assert healing is not None
    return healing_training(prepared.config, healing, prepared.layout)


@pytest.mark.parametrize(
    ("max_steps", "warmup", "expected"),
    [(1000, 100, 2), (1000, 30, 1), (40, 5, 5), (1000, 0.1, 0.1), (50, 60, 24), (-1, 100, 100)],
)
def test_its_warm_up_does_not_outlast_it_where_that_is_known_to_be_in_proportion(
    max_steps: int, warmup: float, expected: float, prepared: Callable[..., Prepared]
) -> None:
    found = prepared({"steps": 20}, finetune={"max_steps": max_steps, "warmup_steps": warmup})
    assert (healed(found).section.model_extra or {})["warmup_steps"] == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_decay_steps": 50}, {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": None}),
        ({"num_cycles": 1}, {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 1}}),
    ],
)
def test_its_schedule_is_the_fine_tuning_s_unless_that_counts_steps(
    settings: dict[str, Any], expected: dict[str, Any], prepared: Callable[..., Prepared]
) -> None:
    kind = "warmup_stable_decay" if expected["lr_scheduler_kwargs"] is None else "cosine"
    finetune = {"max_steps": 1000, "lr_scheduler_type": kind, "lr_scheduler_kwargs": settings}
    assert healed(prepared({"steps": 20}, finetune=finetune)).section.model_extra == expected


def test_parameters_are_those_without_healing(prepared: Callable[..., Prepared]) -> None:
    plain, found = prepared(None), prepared({"steps": 3, "r": 17})
    assert found.layout.ranks == plain.layout.ranks
    assert found.layout.parameters_factorized == plain.layout.parameters_factorized
    assert make_plan(STEPS, found).emulator_parameters == make_plan(STEPS, plain).emulator_parameters
    training = healed(found)
    # q and k of rank 16 and less have nothing to give; what the MLP gives the LoRA has.
    assert {name.rsplit(".", 1)[-1] for name in training.layout.adapted} == {"gate_proj", "up_proj", "down_proj"}
    lora = MemoryModel(found, ROW, training).adapter_parameters
    assert training.layout.parameters_factorized + lora == plain.layout.parameters_factorized


def test_what_it_does_not_say_is_as_in_finetune(prepared: Callable[..., Prepared]) -> None:
    finetune = {"learning_rate": 3e-4, "per_device_train_batch_size": 2, "max_steps": 50, "lr_scheduler_type": "cosine"}
    for own, expected in (({}, (3e-4, 2)), ({"learning_rate": 1e-3, "per_device_train_batch_size": 4}, (1e-3, 4))):
        found = prepared({"steps": 7, **own}, finetune=finetune, adapter={"method": "dora", "r": 2})
        training = healed(found)
        section = training.section
        assert (section.learning_rate, section.per_device_train_batch_size) == expected
        assert (section.max_steps, section.loss_on) == (7, "all")
        assert section.model_extra == {"lr_scheduler_type": "cosine"}
        assert (training.adapter.method, training.adapter.r) == ("lora", 8)


def test_the_plan_counts_the_teachers_logits_and_a_second_emulator(
    prepared: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emloc_ray.planning.machine.cpu_flops", lambda: 1e10)
    few, many, all_of_them = ({"steps": steps, "num_teacher_logits": 64} for steps in (5, 25, 1000))
    sizes = [stage(prepared(healing), "heal").disk_bytes for healing in (few, many, all_of_them)]
    assert sizes[1] - sizes[0] == pytest.approx(20 * 8 * 20 * 64 * 6, abs=8)  # steps · rows · tokens · k · bytes
    assert sizes[2] - sizes[0] == pytest.approx((240 - 40) * 20 * 64 * 6, abs=8)  # each row is cached once
    assert stage(prepared(many), "heal").seconds > stage(prepared(few), "heal").seconds
    plain, found = prepared(None), prepared(few)
    assert stage(found, "factorize").disk_bytes < stage(plain, "factorize").disk_bytes < sizes[0]
    assert stage(found, "finetune").memory == stage(plain, "finetune").memory


@pytest.fixture
def others(tmp_path: Path) -> Path:
    """Sixty rows of twice as many characters as the task's."""
    path = tmp_path / "others.jsonl"
    path.write_text((json.dumps({"text": "x" * 40}) + "\n") * 60)
    return path


def test_it_may_have_rows_of_its_own(
    prepared: Callable[..., Prepared], others: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emloc_ray.planning.machine.cpu_flops", lambda: 1e10)
    data = {"train": {"path": str(tmp_path / "rows.jsonl")}, "max_seq_length": 64}
    with_own = {**data, "healing": {"path": str(others)}}
    plain, found = prepared({"steps": 1000}), prepared({"steps": 1000}, data=with_own)
    assert (healing_split(plain.config), healing_split(found.config)) == ("train", "healing")
    assert [source.path for source in found.files[healed(found).split]] == [str(others)]
    # Rows · tokens · k · bytes of the teacher's logits.
    sizes = [stage(entry, "heal").disk_bytes for entry in (plain, found)]
    assert sizes[0] - sizes[1] == pytest.approx((240 * 20 - 60 * 40) * 64 * 6, abs=8)
    longer, shorter = (total(stage(entry, "heal").memory) for entry in (found, plain))
    assert longer > shorter
    assert stage(found, "finetune").memory == stage(plain, "finetune").memory


def test_teacher_and_training_read_those_rows(prepared: Callable[..., Prepared], others: Path, tmp_path: Path) -> None:
    data = {"train": {"path": str(tmp_path / "rows.jsonl")}, "max_seq_length": 64, "healing": {"path": str(others)}}
    found = prepared({"steps": 1000}, data=data)
    context = Context(found, found.source.directory)
    for split, count in (("train", 5), ("healing", 3)):
        write_shard(context.tokens(split) / shard_name(0), [Tokens([2, 3], [True, True])] * count)
        write_index(context.tokens(split), [count], {"tokens": 2 * count})
    section = found.config.emulator.healing
    assert section is not None
    job = healing_job(context, section, "heal")
    assert job.teacher.tokens_dir == job.training.tokens_dir == context.tokens("healing")
    assert sorted({row for rows in job.teacher.shards() for row in rows}) == [0, 1, 2]
    assert finetune_job(context, "finetune").tokens_dir == context.tokens("train")


def test_rows_of_its_own_are_read_only_where_it_heals(
    prepared: Callable[..., Prepared], others: Path, tmp_path: Path
) -> None:
    data = {"train": {"path": str(tmp_path / "rows.jsonl")}, "max_seq_length": 64}
    with_own = {**data, "healing": {"path": str(others)}}
    whole = {"compression_ratio": 1.0}
    assert "healing" in prepared({"steps": 3}, data=with_own).files
    dense = prepared({"steps": 3}, data=with_own, emulator=whole)
    assert "healing" not in dense.files
    assert split_inputs(dense) == split_inputs(prepared(None, data=data, emulator=whole))
    assert split_inputs(prepared({"steps": 3}, data=with_own)) != split_inputs(prepared({"steps": 3}, data=data))
    assert "healing" not in split_inputs(prepared({"steps": 3}, data=data))["data"]
    made = {"generate": "docstrings", "format": "prompt_completion", "max_seq_length": 64}
    others.write_text(json.dumps({"prompt": "x", "completion": "y"}) + "\n")
    assert list(prepared({"steps": 3}, data={**made, "healing": {"path": str(others)}}).files) == ["healing"]
    others.write_text(json.dumps({"title": "y"}) + "\n")
    with pytest.raises(ConfigError, match=r"others\.jsonl"):
        prepared({"steps": 3}, data=with_own)


@pytest.mark.slow
def test_healing_needs_no_more_memory_than_inference_does() -> None:
    for ratio in (0.25, 0.5):
        found = large({"steps": 100, "r": 16}, emulator={"compression_ratio": ratio})
        memory = MemoryModel(found, ROW)
        assert total(with_base(memory.healing_stage_parts())) <= total(memory.inference(1, 2048)), ratio


@pytest.mark.slow
def test_4_bits_come_after_healing(prepared: Callable[..., Prepared]) -> None:
    found = large({"steps": 100}, emulator={"quantization": "nf4"})
    memory = MemoryModel(found, ROW)
    assert quantized_late(found.layout, found.config.emulator.heals) == found.layout.in_4bit
    assert not quantized_late(found.layout, None)
    assert total(with_base(memory.healing_stage_parts())) == total(
        with_base(MemoryModel(large({"steps": 100}), ROW).healing_stage_parts())
    )
    assert total(with_base(memory.finetuning_parts())) < total(with_base(memory.healing_stage_parts()))


@pytest.mark.parametrize(
    ("emulator", "changed"),
    [
        ({}, False),
        ({"storage": "pivoted"}, True),
        ({"quantization": "nf4"}, True),
        ({"refinement": {"steps": 3}}, True),
        ({"refinement": {"steps": 3}, "quantization": "int4"}, True),
    ],
)
def test_a_correction_plans_the_errors_that_are_measured_anew(emulator: dict[str, Any], changed: bool) -> None:
    found = large({"steps": 3}, emulator=emulator)
    wide = sum(2 * s.num_parameters * s.in_features for s in found.layout.specs if s.name in found.layout.ranks)
    assert difference_work(MemoryModel(found, ROW)) == (wide if changed else 0)


@pytest.mark.slow
def test_integers_come_after_healing_where_it_grows_them() -> None:
    whole = {"ratios": {r"down_proj": 1.0}}
    found = large({"steps": 100}, emulator={"quantization": "int4", **whole})
    late = rounded_late(found.layout, found.config.emulator.heals)
    early = {*found.layout.quantized_linears}.difference(late)
    assert {name.rsplit(".", 1)[-1] for name in early} == {"down_proj"}
    memory, floats = MemoryModel(found, ROW), MemoryModel(large({"steps": 100}, emulator=whole), ROW)
    # While it is healed its factors are floats, and what nothing grows is integers already.
    assert (
        total(memory.finetuning_parts())
        < total(memory.healing_training_parts())
        < total(floats.healing_training_parts())
    )
    assert total(memory.healing_stage_parts()) >= total(memory.factorization_parts()) > 0


def test_an_emulator_that_is_healed_is_not_taken_for_one_in_integers(prepared: Callable[..., Prepared]) -> None:
    # Of equal ranks: what healing grows stays floats, and without it they are integers.
    alike = {"quantization": "int4", "target_modules": ["q_proj"]}
    found = prepared({"steps": 3, "r": 4}, emulator={**alike, "compression_ratio": 0.5})
    plain = prepared(None, emulator={**alike, "compression_ratio": 0.375})
    assert factor_ranks(found) == factor_ranks(plain)
    contexts = [Context(one, one.source.directory) for one in (found, plain)]
    assert factorization_job(contexts[0]).integers != factorization_job(contexts[1]).integers
    assert FACTORIZE.inputs(contexts[0]) != FACTORIZE.inputs(contexts[1])
    # In NF4 all is floats until then, as without few bits.
    nf4, wide = (prepared({"steps": 3, "r": 4}, emulator={"quantization": name}) for name in ("nf4", "none"))
    assert FACTORIZE.inputs(Context(nf4, nf4.source.directory)) == FACTORIZE.inputs(
        Context(wide, wide.source.directory)
    )


def heal_inputs(prepared: Callable[..., Prepared], **emulator: Any) -> Inputs:
    """Of equal factors."""
    found = prepared({"steps": 3, "r": 4}, emulator=emulator)
    return HEAL.inputs(Context(found, found.source.directory, made={"factorize": "the same"}))


def test_where_healing_grows_all_integers_one_factorization_serves_all_bits(prepared: Callable[..., Prepared]) -> None:
    def factorized(**emulator: Any) -> tuple[FactorizationJob, Inputs]:
        found = prepared({"steps": 3, "r": 4}, emulator=emulator)
        context = Context(found, found.source.directory)
        return factorization_job(context), FACTORIZE.inputs(context)

    wide = factorized()
    for bits in ("int4", "int2"):
        assert factorized(quantization=bits) == wide
    some = [factorized(quantization=bits, ratios={"down_proj": 1.0}) for bits in ("int4", "int2")]
    assert some[0][0] != some[1][0]
    assert some[0][1] != some[1][1]
    healed = [heal_inputs(prepared, quantization="int4", group_size=size) for size in (32, 64)]
    assert healed[0] != healed[1]  # which the factorization does not tell apart
    # Ranks that follow from data may leave linears dense, which nothing grows.
    allocated = [factorized(quantization=bits, allocation="sensitivity") for bits in ("int4", "int2")]
    assert allocated[0][1] != allocated[1][1]


@pytest.mark.parametrize(("objective", "grams"), [("activations", True), ("weights", False)])
def test_it_rounds_by_what_the_factorization_rounds_by(
    prepared: Callable[..., Prepared], objective: str, grams: bool
) -> None:
    found = prepared({"steps": 3, "r": 4}, emulator={"quantization": "int4", "objective": objective})
    context, section = Context(found, found.source.directory), found.config.emulator.healing
    assert section is not None
    write_shard(context.tokens("train") / shard_name(0), [Tokens([2, 3], [True, True])])
    write_index(context.tokens("train"), [1], {"tokens": 2})
    assert (healing_job(context, section, "heal").fold.calibration_dir is not None) == grams
    assert bool(HEAL.reads(context)) == grams
    assert factorization_job(context).by_weights == (not grams)


@pytest.mark.slow
def test_a_budget_is_for_the_healing_too() -> None:
    budget = 12 * 2**30
    found = large({"steps": 100, "per_device_train_batch_size": 4})
    solution = solve_for_budget(found, budget, ROW)
    assert training_bytes(solution) <= budget
    assert (
        total(with_base(solution.healing_stage_parts())) <= budget
    )  # its teacher is the original, which is larger, offloaded
    section = healed(solution.prepared).section
    assert (section.per_device_train_batch_size, section.gradient_accumulation_steps) == (1, 4)
    plain = solve_for_budget(large(None), budget, ROW).config.emulator.compression_ratio
    assert solution.config.emulator.compression_ratio <= plain


@pytest.mark.slow
def test_a_budget_leaves_the_healing_its_rows_a_step() -> None:
    found = large({"steps": 100, "per_device_train_batch_size": 4}, finetune={"per_device_train_batch_size": 8})
    section = healed(solve_for_budget(found, 10 * 2**30, ROW).prepared).section
    assert 1 <= section.per_device_train_batch_size < 4
    assert rows_a_step(section) == 4
    own = f"emulator.healing.per_device_train_batch_size={section.per_device_train_batch_size}"
    passes = f"emulator.healing.gradient_accumulation_steps={section.gradient_accumulation_steps}"
    assert {own, passes} <= set(emulators_overrides(found))
    assert "healing" not in " ".join(emulators_overrides(large({"steps": 100})))


@pytest.mark.parametrize("own", [{}, {"per_device_train_batch_size": 1}, {"gradient_accumulation_steps": 3}])
@pytest.mark.parametrize("micro_batch", [1, 4, 8, 64])
def test_whatever_a_micro_batch_is_healing_reads_the_rows_that_are_written(
    prepared: Callable[..., Prepared], own: dict[str, int], micro_batch: int
) -> None:
    batches = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 8}
    found = prepared({"steps": 3, **own}, finetune=batches)
    found = dataclasses.replace(found, written_config=found.config)
    changed = with_settings(found, 0.5, micro_batch, 64 // micro_batch, True)
    written, read = healed(found).section, healed(changed).section
    assert rows_a_step(read) == rows_a_step(written)
    assert read.per_device_train_batch_size <= micro_batch
    assert changed.for_fingerprints.config.emulator.healing == found.config.emulator.healing
    assert changed.for_fingerprints.config.finetune.gradient_accumulation_steps == 8


def test_a_healing_may_have_its_own_accumulation(prepared: Callable[..., Prepared], tmp_path: Path) -> None:
    """The teacher's rows are those of all passes."""
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    found = prepared({"steps": 3, "gradient_accumulation_steps": 2}, finetune=batches)
    context, section = Context(found, found.source.directory), found.config.emulator.healing
    assert section is not None
    write_shard(context.tokens("train") / shard_name(0), [Tokens([2, 3], [True, True])] * 40)
    write_index(context.tokens("train"), [40], {"tokens": 80})
    job = healing_job(context, section, "heal")
    assert sum(map(len, job.teacher.shards())) == 3 * 2 * 2
    assert job.training.training_arguments["gradient_accumulation_steps"] == 2


BY_TWO = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


def test_the_teacher_takes_as_many_rows_as_fit_where_weights_come_anew_for_a_batch(
    prepared: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emloc_ray.planning.machine.cpu_flops", lambda: 1e10)

    def planned(budget: int, steps: int = 100, hold: str = "offloaded") -> MemoryModel:
        section = {"model": {"hold": hold}, "finetune": BY_TWO, "memory_budget": budget}
        return MemoryModel(prepared({"steps": steps}, **section))

    free = planned(2**34)
    numbers = [free, planned(2**34, steps=3), planned(2**34, hold="resident"), planned(2**34, steps=1000)]
    assert [memory.teacher_rows() for memory in numbers] == [64, 24, 2, 64]  # a shard, all that are read, a micro-batch
    needed = [BASE_BYTES + total(free.teacher_plan(rows).parts) for rows in (8, 4)]
    tight = [planned(budget) for budget in (*needed, BASE_BYTES)]
    assert [memory.teacher_rows() for memory in tight] == [8, 4, 2]
    assert HEAL.cost is not None
    for memory, passes in zip((free, *tight), (4, 30, 60, 120), strict=True):  # of 240 rows
        plan, cost = memory.teacher_plan(memory.teacher_rows()), HEAL.cost(memory)
        assert cost.moved_bytes == passes * memory.moved(plan.hold, 1, 1)
        assert total(cost.memory) == max(total(plan.parts), total(memory.healing_training_parts()))
    assert heal_inputs(lambda _, **more: free.prepared) == heal_inputs(lambda _, **more: tight[0].prepared)


def emulators_overrides(found: Prepared) -> list[str]:
    config = found.config.model_copy(update={"memory_budget": 10 * 2**30})
    choice = choose_training(dataclasses.replace(found, config=config), ROW, Speeds(1e11))
    emulator = next(one for one in choice.alternatives if one.name == "an emulator")
    return dataclasses.replace(choice, recommended=emulator).overrides
