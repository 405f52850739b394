"""The plan: what is exact in it is exact, and what is predicted goes the right way."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bare_runs import tiny_run
from rich.console import Console
from tiny import REWRITING, make_tokenizer, save_quantized_emulator

from emloc_ray.config.reading import parse_config
from emloc_ray.config.steps import VERBS
from emloc_ray.data.token_shards import TOKEN_BYTES
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.planning.calibration_memory import BASE_BYTES
from emloc_ray.planning.lengths import Lengths
from emloc_ray.planning.machine import Speeds
from emloc_ray.planning.memory import MemoryModel, total
from emloc_ray.planning.plan import Plan, StagePlan, make_plan, missing_disk
from emloc_ray.planning.prepared import Prepared
from emloc_ray.planning.work import (
    CANDIDATES,
    block_work,
    num_steps,
    rows_selected_on,
    rows_trained,
    steps_trained,
    tokens_calibrated,
    tokens_stored,
)
from emloc_ray.stages.order import STEPS
from emloc_ray.text import size
from emloc_ray.ui.terminal import disk_line, gradients_line, plan_tables, scores_line, step_lines

PLAIN = [stage for stage in VERBS[1:] if stage != "heal"]


@pytest.fixture(autouse=True)
def steady_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of one speed, whatever else runs on it."""
    monkeypatch.setattr("emloc_ray.planning.machine.cpu_flops", lambda: 1e10)


@pytest.fixture
def prepared(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> Callable[..., Prepared]:
    """``prepared(dtype, section={…})``: a tiny Llama on twelve rows of 20 tokens, within inference."""
    return lambda dtype="float32", **sections: tiny_run(tmp_path, tiny_model_dir("llama", dtype=dtype), **sections)


@pytest.fixture
def plan(prepared: Callable[..., Prepared]) -> Callable[..., Plan]:
    """The plan of that."""
    return lambda *args, **sections: make_plan(STEPS, prepared(*args, **sections))


def stage(plan: Plan, name: str) -> Any:
    return next(entry for entry in plan.stages if entry.name == name)


def cost(name: str, prepared: Prepared) -> float:
    """A stage's floating-point operations."""
    of = next(entry for entry in STEPS if entry.name == name).cost
    assert of is not None
    return of(MemoryModel(prepared)).flops


def test_parameters_and_bytes_are_those_of_the_files(
    plan: Callable[..., Plan], tiny_model_dir: Callable[..., Path]
) -> None:
    for dtype in ("float32", "bfloat16"):
        found = plan(dtype)
        checkpoint = Checkpoint(tiny_model_dir("llama", dtype=dtype))
        assert stage(found, "merge").disk_bytes == checkpoint.num_bytes
        assert found.parameters == sum(e.num_bytes // e.dtype.itemsize for e in checkpoint)
        saved = found.prepared.layout.parameters_targeted - found.prepared.layout.parameters_factorized
        assert found.emulator_parameters == found.parameters - saved
        assert (
            stage(found, "factorize").disk_bytes
            == found.emulator_parameters * checkpoint.entry("lm_head.weight").dtype.itemsize
        )


def test_a_run_that_goes_on_needs_the_disk_of_what_is_not_done(prepared: Callable[..., Prepared]) -> None:
    ready = prepared()
    found, run = make_plan(STEPS, ready), ready.run
    names = [stage.name for stage in found.stages]
    assert missing_disk(found, run, names) == found.disk_bytes
    run.create({})
    for name in names[:2]:
        run.path(name).mkdir()
        run.path(name, "file").write_bytes(bytes(100))
        run.commit(name, "key", [run.path(name)], {})
    left = sum(entry.disk_bytes for entry in found.stages[2:])
    assert missing_disk(found, run, names[2:]) == left < found.disk_bytes
    run.path("data", "rows").mkdir()
    run.path("data", "rows", "downloaded").write_bytes(bytes(left))  # of no stage that is left
    assert missing_disk(found, run, names[2:]) == left
    for folder in ("emulator", "training"):
        run.path(folder).mkdir()
        run.path(folder, "half").write_bytes(bytes(1000))  # as a killed try left it
    assert missing_disk(found, run, names[2:]) == left - 2000
    run.path("emulator", "half").write_bytes(bytes(stage(found, "factorize").disk_bytes + 1))  # more than was planned
    assert missing_disk(found, run, names[2:]) == left - 1000 - stage(found, "factorize").disk_bytes
    assert missing_disk(found, run, ()) == 0


def test_token_shards_are_planned_by_their_rows(prepared: Callable[..., Prepared], tmp_path: Path) -> None:
    def planned(**sections: Any) -> StagePlan:
        return stage(make_plan(STEPS, prepared(**sections)), "data")

    few = planned()
    # Twelve rows of 20 tokens, ten of them left to train on, of which calibration reads copies.
    assert few.disk_bytes == (12 + 10) * 20 * TOKEN_BYTES
    assert planned(calibration={"num_calibration_samples": 4}).disk_bytes == (12 + 4) * 20 * TOKEN_BYTES
    assert planned(calibration={"num_calibration_tokens": 60}).disk_bytes == (12 + 3) * 20 * TOKEN_BYTES
    (tmp_path / "many.jsonl").write_text((json.dumps({"text": "x" * 20}) + "\n") * 12_000)
    data = {"train": {"path": str(tmp_path / "many.jsonl")}, "max_seq_length": 64}
    many = planned(data=data)
    assert many.disk_bytes > 900 * few.disk_bytes / 2
    assert many.seconds > few.seconds
    assert planned(data={**data, "packing": True}).disk_bytes == many.disk_bytes  # joined, they have no more tokens


def test_all_rows_of_a_file_are_evaluated_where_none_are_counted(
    prepared: Callable[..., Prepared], tmp_path: Path
) -> None:
    (tmp_path / "eval.jsonl").write_text((json.dumps({"text": "x" * 20}) + "\n") * 3000)

    def flops(number: int | None, **data: Any) -> float:
        asked = {**prepared().config.data.model_dump(exclude_none=True), **data}
        return cost("evaluate", prepared(data=asked, evaluation={"num_samples": number, "num_exact_match": 0}))

    own = {"eval": {"path": str(tmp_path / "eval.jsonl")}}
    assert flops(None, **own) == flops(3000, **own) > flops(2999, **own)
    assert flops(None) == flops(256) == flops(1)  # a tenth of train, which is one row of twelve


def test_variants_that_are_not_there_take_no_time_and_no_memory(prepared: Callable[..., Prepared]) -> None:
    names = ["original", "emulator", "emulator_adapter", "uncorrected", "corrected", "merged"]
    offloaded = {**prepared().config.model.model_dump(exclude_none=True), "hold": "offloaded"}
    every, made = (
        prepared(model=offloaded, evaluation=section)
        for section in ({"variants": [*names, "finished"]}, {"variants": names})
    )
    assert cost("evaluate", every) == cost("evaluate", made)
    assert MemoryModel(every).evaluation_plan() == MemoryModel(made).evaluation_plan()
    finishes = prepared(model=offloaded, evaluation={"variants": [*names, "finished"]}, finetune={"exact_steps": 1})
    assert cost("evaluate", finishes) > cost("evaluate", made)
    prompts = prepared(adapter={"method": "prompt_tuning", "num_virtual_tokens": 2})
    assert "merged" not in prompts.variants_scored


def test_every_wave_of_grams_is_a_pass(prepared: Callable[..., Prepared]) -> None:
    model = {**prepared().config.model.model_dump(exclude_none=True), "hold": "resident"}
    one = prepared(model=model, memory_budget=None)
    tight = prepared(model=model, memory_budget=BASE_BYTES + 2**20)
    waves = len(MemoryModel(tight).waves())
    assert len(MemoryModel(one).waves()) == 1 < waves
    more = 2 * tokens_calibrated(one, one.lengths) * block_work(one.layout) * (waves - 1)
    assert cost("calibrate", tight) - cost("calibrate", one) == pytest.approx(more)
    targeted = prepared(model=model, memory_budget=None, emulator={"target_modules": ["q_proj"]})
    assert cost("calibrate", targeted) < cost("calibrate", one)  # others have no Grams


def test_a_gpu_s_worker_takes_little_of_its_node_s_memory(plan: Callable[..., Plan]) -> None:
    on_cpu = stage(plan(), "finetune")
    on_gpu, in_half = (
        stage(plan(finetune={"gpus_per_worker": 1, "bf16": half}, ray={"num_gpus": 1}), "finetune")
        for half in (False, "auto")
    )
    assert on_cpu.host_bytes == on_cpu.worker_bytes == on_gpu.worker_bytes
    assert in_half.memory["optimizer"] == on_gpu.memory["optimizer"] * 18 / 16  # copies of the adapter in bfloat16
    assert on_gpu.host_bytes == on_gpu.memory["base"] + on_gpu.memory["weights"] < on_gpu.worker_bytes
    projection = {"correction": {"method": "projection"}, "evaluation": {"gpus_per_worker": 1}, "ray": {"num_gpus": 1}}
    correct = stage(plan(**projection), "correct")  # weights and Grams are multiplied where the GPU is
    assert 0 < correct.gpu_bytes == correct.memory["difference"]
    assert correct.host_bytes == correct.memory["base"] + correct.memory["read ahead"]
    factorize = stage(plan(emulator={"gpus_per_worker": 1}, ray={"num_gpus": 1}), "factorize")
    assert factorize.host_bytes == sum(factorize.memory[part] for part in ("base", "weights", "read ahead"))


def test_what_waits_for_its_turn_at_a_block_is_on_the_gpu(plan: Callable[..., Plan]) -> None:
    """Of adapters that share an offloaded original, and of a batch that a block is refined on; the next batch is not there."""
    model = {**plan().prepared.config.model.model_dump(exclude_none=True), "hold": "offloaded"}
    gpus = {"model": model, "evaluation": {"gpus_per_worker": 1}, "ray": {"num_gpus": 1}}
    emulator = {"gpus_per_worker": 1, "refinement": {"steps": 5}}
    both = plan(emulator=emulator, **gpus)
    for planned, own in ((stage(both, "evaluate"), ()), (stage(both, "refine"), ("read ahead",))):
        assert planned.memory["batch states"] > 0
        assert planned.host_bytes == sum(planned.memory[part] for part in ("base", "weights", *own))
        assert planned.gpu_bytes >= planned.memory["weights"] + planned.memory["batch states"]
    on_gpus = {entry.name: entry.gpu_bytes for entry in both.stages if entry.gpus_per_worker}
    assert {"correct", "evaluate", "refine"} < on_gpus.keys() < both.worker_bytes.keys()
    assert both.gpu_bytes == on_gpus


def test_files_take_what_they_hold_whatever_the_model_is_used_in(
    plan: Callable[..., Plan], tiny_model_dir: Callable[..., Path]
) -> None:
    written = {name: stage(plan("float32"), name).disk_bytes for name in ("factorize", "merge")}
    narrow = plan(model={"source": str(tiny_model_dir("llama", dtype="float32")), "dtype": "bfloat16"})
    assert {name: stage(narrow, name).disk_bytes for name in written} == written
    assert stage(narrow, "evaluate").memory["weights"] == stage(plan("float32"), "evaluate").memory["weights"] / 2


def test_rows_that_are_not_here_yet_are_planned_as_long_as_they_may_be(prepared: Callable[..., Prepared]) -> None:
    found = prepared(data={"train": {"path": "hf:some/rows"}, "max_seq_length": 48})
    assert found.lengths == Lengths(48, 48)


def test_every_stage_is_there_with_what_it_asks_for(plan: Callable[..., Plan]) -> None:
    workers = {
        "calibration": {"num_workers": 2, "rows_per_shard": 6},
        "finetune": {"num_workers": 2, "cpus_per_worker": 0.5},
    }
    found = plan(emulator={"healing": {"steps": 3}}, **workers)
    assert tuple(entry.name for entry in found.stages) == ("data", *VERBS)
    assert all(entry.memory["base"] > 0 and min(entry.memory.values()) > 0 for entry in found.stages)
    assert stage(found, "calibrate").num_workers == 2
    assert stage(found, "finetune").cpus_per_worker == 0.5
    assert found.seconds > sum(entry.seconds for entry in found.stages)
    assert found.disk_bytes == sum(entry.disk_bytes for entry in found.stages)
    assert found.prepared.lengths.mean == pytest.approx(20)


def test_less_is_kept_and_less_is_written_at_a_smaller_ratio(plan: Callable[..., Plan]) -> None:
    half, quarter = plan(), plan(emulator={"compression_ratio": 0.25})
    assert quarter.emulator_parameters < half.emulator_parameters
    assert stage(quarter, "factorize").disk_bytes < stage(half, "factorize").disk_bytes
    assert stage(quarter, "finetune").worker_bytes < stage(half, "finetune").worker_bytes


def test_ratio_one_needs_no_grams(plan: Callable[..., Plan]) -> None:
    dense = plan(emulator={"compression_ratio": 1.0})
    assert dense.emulator_parameters == dense.parameters
    assert "calibrate" not in [entry.name for entry in dense.stages]


def test_more_steps_take_longer_and_checkpointing_takes_less_memory(plan: Callable[..., Plan]) -> None:
    few, many = plan(finetune={"max_steps": 10}), plan(finetune={"max_steps": 10_000})
    assert stage(many, "finetune").seconds > stage(few, "finetune").seconds
    whole = plan(finetune={"gradient_checkpointing": False})
    assert stage(whole, "finetune").worker_bytes > stage(few, "finetune").worker_bytes


def test_packs_are_fewer_and_longer_than_rows(prepared: Callable[..., Prepared]) -> None:
    data = {**prepared().config.data.model_dump(exclude_none=True), "max_seq_length": 120}
    one = {"per_device_train_batch_size": 1}
    rows, packs = (MemoryModel(prepared(data=data, finetune={"packing": on, **one})) for on in (False, True))
    assert packs.trained_lengths.longest == 120 > rows.trained_lengths.longest
    assert rows_trained(packs.prepared) < rows_trained(rows.prepared)
    assert total(packs.finetuning_parts()) > total(rows.finetuning_parts())
    assert packs.calibration_parts() == rows.calibration_parts()
    # A share of the tokens that are trained on, whatever they are read as.
    assert rows_selected_on(packs.prepared) == pytest.approx(rows_selected_on(rows.prepared), rel=0.2)
    assert 0 < rows_selected_on(packs.prepared) < CANDIDATES * packs.prepared.num_rows("selection")


@pytest.mark.parametrize(
    ("finetune", "rows", "steps"),
    [
        ({"max_steps": 7}, 100, 7),
        ({"per_device_train_batch_size": 4}, 100, 25),
        ({"per_device_train_batch_size": 4, "num_workers": 2, "num_train_epochs": 2}, 100, 25),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 5}, 100, 5),
        ({"per_device_train_batch_size": 64}, 3, 1),
        ({"per_device_train_batch_size": 64}, 90, 2),
        ({"per_device_train_batch_size": 8}, 20, 3),
        ({"per_device_train_batch_size": 1, "num_train_epochs": 0.1}, 30, 3),
    ],
)
def test_steps_are_the_epochs_of_the_rows(finetune: dict[str, Any], rows: int, steps: int) -> None:
    values = {"run_dir": "x", "model": {"source": "y"}, "data": {"train": {"path": "z"}}, "finetune": finetune}
    assert num_steps(parse_config(values).finetune, rows) == steps


def test_chats_whose_template_rewrites_turns_are_planned_as_the_sequences_they_become(
    prepared: Callable[..., Prepared], tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chats = tmp_path / "chats.jsonl"
    chats.write_text((json.dumps({"messages": turns * 2}) + "\n" + json.dumps({"messages": turns}) + "\n") * 8)
    model = shutil.copytree(tiny_model_dir("llama"), tmp_path / "rewriting")
    make_tokenizer(REWRITING).save_pretrained(model)
    data = {"train": {"path": str(chats)}, "max_seq_length": 64}
    runs = [
        prepared(data=data, finetune={"per_device_train_batch_size": 4}, model={"source": str(place)})
        for place in (tiny_model_dir("llama"), model)
    ]
    # Of 14 rows, as two are held out; every second becomes two sequences.
    assert [steps_trained(run) for run in runs] == [4, 6]
    others = prepared(data={**data, "calibration": {"path": str(chats)}}, model={"source": str(model)})
    assert tokens_stored(others)[0] / others.lengths.mean == pytest.approx(1.5 * 14 + 2 + 1.5 * 16)


def test_rows_that_are_held_out_are_not_trained_on(prepared: Callable[..., Prepared]) -> None:
    validating = {"eval_strategy": "steps", "eval_steps": 1}
    found = prepared(finetune={**validating, "num_train_epochs": 1, "per_device_train_batch_size": 1})
    assert found.num_rows() == steps_trained(found) == 12 - 3


@pytest.mark.parametrize(
    ("calibration", "tokens"),
    [
        ({}, 10 * 20),  # two of twelve rows are held out
        ({"num_calibration_samples": 4}, 4 * 20),
        ({"num_calibration_tokens": 100}, 100),
        ({"num_calibration_tokens": 100, "num_calibration_samples": 3}, 3 * 20),
        ({"num_calibration_tokens": 10_000}, 10 * 20),
        ({"num_calibration_samples": None}, 10 * 20),
    ],
)
def test_calibration_sees_the_least_of_what_bounds_it(
    plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, calibration: dict[str, Any], tokens: int
) -> None:
    seen: list[float] = []
    found = Prepared.calibration_tokens

    def remembered(self: Prepared, tokens_per_row: float) -> float:
        seen.append(found(self, tokens_per_row))
        return seen[-1]

    monkeypatch.setattr(Prepared, "calibration_tokens", remembered)
    plan(calibration=calibration)
    assert seen == [pytest.approx(tokens)] * len(seen)
    assert seen


def test_calibration_sees_the_rows_of_train_s_shares(prepared: Callable[..., Prepared], tmp_path: Path) -> None:
    for name, count in (("few", 30), ("many", 400)):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"text": "x" * 20}) + "\n") * count)
    shares = {"path": {str(tmp_path / "few.jsonl"): 1, str(tmp_path / "many.jsonl"): 1}}

    def rows(**train: Any) -> float:
        data = {"train": {**shares, **train}, "max_seq_length": 64}
        return prepared(data=data, calibration={"num_calibration_samples": 1000}).calibration_tokens(1)

    assert rows() == 60 - 2 * 6
    assert rows(num_samples=20) == 20 - 2 * 2


def test_rows_that_are_not_here_do_not_bound_calibration(prepared: Callable[..., Prepared]) -> None:
    data = {"train": {"path": "hf:some/rows"}, "max_seq_length": 64}
    asked = {"num_calibration_samples": 20_000}
    assert prepared(data=data, calibration=asked).calibration_tokens(2) == 2 * 20_000
    assert (
        prepared(data={**data, "generate": "docstrings", "train": None}, calibration=asked).calibration_tokens(2)
        == 40_000
    )


def test_in_4_bits_parameters_stay_and_bytes_go(plan: Callable[..., Plan]) -> None:
    for dtype in ("float32", "bfloat16"):
        wide, packed = plan(dtype), plan(dtype, emulator={"quantization": "nf4"})
        assert packed.emulator_parameters == wide.emulator_parameters
        assert stage(packed, "factorize").disk_bytes < stage(wide, "factorize").disk_bytes
        assert stage(packed, "merge").disk_bytes == stage(wide, "merge").disk_bytes
    whole = plan(emulator={"quantization": "nf4", "compression_ratio": 1.0})
    assert whole.emulator_parameters == whole.parameters
    assert stage(whole, "calibrate").disk_bytes > 0  # QLoRA's difference to the original is measured too


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_in_4_bits_are_those_of_a_saved_emulator(
    plan: Callable[..., Plan], tiny_model_dir: Callable[..., Path], tmp_path: Path, ratio: float, dtype: str
) -> None:
    found = plan(dtype, emulator={"quantization": "nf4", "compression_ratio": ratio})
    saved = save_quantized_emulator(
        tiny_model_dir("llama", dtype=dtype), tmp_path / "emulator", found.prepared.layout.ranks
    )
    assert stage(found, "factorize").disk_bytes == pytest.approx(Checkpoint(saved).num_bytes, rel=0.01)


def test_choosing_a_correction_takes_as_long_as_the_training_allows(plan: Callable[..., Plan]) -> None:
    def seconds(steps: int, **correction: Any) -> float:
        one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
        found = plan(finetune={"max_steps": steps, **one}, correction=correction)
        return stage(found, "correct").seconds

    given = seconds(10_000, method="projection")
    assert given < seconds(1) < seconds(10) < seconds(10_000)
    assert seconds(10, max_share=None) == seconds(10_000)


def test_a_correction_has_workers_such_as_the_evaluation_has(plan: Callable[..., Plan]) -> None:
    found = stage(
        plan(evaluation={"num_workers": 3, "cpus_per_worker": 2, "gpus_per_worker": 1}, ray={"num_gpus": 1}), "correct"
    )
    assert (found.num_workers, found.cpus_per_worker, found.gpus_per_worker) == (3, 2, 1)


def test_a_gpu_s_time_is_not_a_processor_s(plan: Callable[..., Plan]) -> None:
    on_cpu, on_gpu = (
        stage(plan(finetune={"max_steps": 10**9, "gpus_per_worker": gpus}, ray={"num_gpus": 1}), "finetune").seconds
        for gpus in (0, 1)
    )
    assert on_cpu / on_gpu == pytest.approx(2e13 / 1e10, rel=1e-2)


def test_factors_are_timed_by_a_gpu_s_float32(plan: Callable[..., Plan]) -> None:
    ready = plan(emulator={"gpus_per_worker": 1}, ray={"num_gpus": 1}).prepared
    slow, fast, narrow = (
        stage(make_plan(STEPS, ready, Speeds(1e10, gpu_flops=flops, gpu_float32_flops=wide)), "factorize").seconds
        for flops, wide in ((1e12, 1e6), (1e12, 1e12), (1e6, 1e12))
    )
    assert slow > 10 + fast
    assert narrow == fast


def needed_steps(prepared: Prepared) -> list[str]:
    return [stage.name for stage in STEPS if stage.wanted(prepared) and stage.cost is not None]


def test_steps_without_work_are_not_waited_for(prepared: Callable[..., Prepared]) -> None:
    by_data, all_named = {"allocation": "sensitivity"}, {"ratios": {".*": 0.3}}
    assert needed_steps(prepared(emulator=by_data)) == ["data", "calibrate", "gradients", "allocate", *PLAIN]
    assert needed_steps(prepared(emulator={**by_data, **all_named})) == ["data", "calibrate", *PLAIN]
    assert needed_steps(prepared(emulator={"compression_ratio": 1.0})) == ["data", *PLAIN]
    prompt = {"method": "prompt_tuning"}
    assert "merge" not in needed_steps(prepared(adapter={**prompt, "num_virtual_tokens": 2}))


def test_what_a_finishing_step_moves_is_said_by_where_it_comes_from(prepared: Callable[..., Prepared]) -> None:
    section = {
        "exact_steps": 3,
        "gpus_per_worker": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
    }
    ready = prepared(
        model={"source": prepared().config.model.source, "hold": "offloaded"},
        finetune=section,
        ray={"num_gpus": 1},
        memory_budget=None,
    )
    moved = 2 * MemoryModel(ready).moved("offloaded", 8, 8)  # all rows at once, forward and back
    host = Speeds(1e10, gpu_flops=1e30, link=4e6)
    for speeds, source, rate in (
        (host, "over the GPU's link", 4e6),
        (dataclasses.replace(host, disk=2e6, host_bytes=1), "from disk", 2e6),
    ):
        found = make_plan(STEPS, ready, speeds)
        assert stage(found, "finish").step_seconds == pytest.approx(moved / rate)
        said = next(line for line in step_lines(found) if "finish" in line)
        assert f"{size(moved)} of the original's weights come {source} at {rate / 1e6:.0f} MB/s" in said
    assert not step_lines(make_plan(STEPS, prepared(finetune={"exact_steps": 3}), host))  # mapped here


def test_scoring_the_original_while_training_is_timed_and_told(prepared: Callable[..., Prepared]) -> None:
    asked = {"max_steps": 70, "eval_strategy": "steps", "eval_steps": 10, "num_validation_samples": 1}
    options = prepared().config.model.source
    speeds = Speeds(1e10)

    def of(**more: Any) -> Plan:
        held = {"source": options, "hold": "offloaded"}
        ready = prepared(model=held, finetune={**asked, **more}, memory_budget=None)
        return make_plan(STEPS, ready, speeds)

    alone, beside = of(), of(eval_original_every=3)
    assert stage(beside, "finetune").step_seconds == stage(alone, "finetune").step_seconds
    assert stage(beside, "finetune").scoring_seconds > stage(alone, "finetune").scoring_seconds > 0
    assert stage(beside, "finetune").seconds > stage(alone, "finetune").seconds
    assert scores_line(alone) is None
    said = scores_line(beside) or ""
    assert said.startswith("While training the emulator is scored 7 times, the original 3, held offloaded beside it: ")
    assert scores_line(make_plan(STEPS, prepared(emulator={"compression_ratio": 1.0}), speeds)) is None


def test_what_ranks_by_data_take_is_planned(plan: Callable[..., Plan]) -> None:
    by_data = {"allocation": "sensitivity", "objective": "predictions"}
    plain, found = (plan(emulator=emulator, memory_budget=None) for emulator in ({}, by_data))
    names = [entry.name for entry in found.stages]
    assert names == ["data", "calibrate", "gradients", "allocate", "factorize", *VERBS[3:]]
    assert found.emulator_parameters == plain.emulator_parameters
    assert stage(found, "gradients").worker_bytes > stage(found, "calibrate").worker_bytes
    assert stage(found, "gradients").seconds > stage(found, "calibrate").seconds > 0
    assert stage(found, "finetune") == stage(plain, "finetune")
    text = "".join(segment.text for table in plan_tables(found) for segment in Console(width=200).render(table))
    assert "by data" in text
    assert gradients_line(found) == "Gradient sums: 1 pass over the rows, the model held resident, 8 rows a batch."
    assert gradients_line(plain) is None
    assert f"together they keep {found.prepared.layout.parameters_factorized:,} parameters at most" in " ".join(
        text.split()
    )


def test_the_speed_of_a_disk_that_weights_come_from_is_shown(plan: Callable[..., Plan]) -> None:
    found = plan()
    assert disk_line(found) is None
    slow = Speeds(1e10, disk=2e8, host_bytes=2**10, disk_measured=True)
    said = str(disk_line(dataclasses.replace(found, speeds=slow)))
    assert "of memory that are free here: they come from disk at 200 MB/s (measured)" in said
    assert "(assumed)" in str(
        disk_line(dataclasses.replace(found, speeds=dataclasses.replace(slow, disk_measured=False)))
    )


def test_steps_are_told_by_what_they_are_of(plan: Callable[..., Plan]) -> None:
    emulator = {"healing": {"steps": 3, "r": 2}, "refinement": {"steps": 5}}
    assert plan(emulator=emulator, finetune={"max_steps": 1, "exact_steps": 2}).steps == (
        "5 steps of refinement a block, 3 of healing, 1 on the emulator, then 2 on the original"
    )
    assert plan(emulator={"compression_ratio": 1.0}, finetune={"max_steps": 1}).steps == "1 step on the original"


def test_a_plan_in_few_bits_says_so(plan: Callable[..., Plan]) -> None:
    planned = plan(emulator={"compression_ratio": 1.0, "quantization": "int4"}, finetune={"max_steps": 1})
    assert planned.steps == "1 step on the original in 4 bits"
    ranks = list(plan_tables(planned)[0].columns[3].cells)
    assert set(ranks[:-2]) == {"int4"}


def test_rows_of_generated_tasks_are_as_long_as_theirs_were(prepared: Callable[..., Prepared]) -> None:
    known = [
        prepared(data={"generate": name, "max_seq_length": 100}).lengths for name in ("return_types", "docstrings")
    ]
    assert known == [Lengths(48, 100), Lengths(80, 100)]
