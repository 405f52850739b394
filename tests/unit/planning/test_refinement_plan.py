"""What a config's refinement makes of a run before it starts: a step, its memory and time, and what is refused."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from bare_runs import bare_run, tiny_run
from stage_artifacts import write_tokens
from tiny import make_tokenizer
from transformers import LlamaConfig

from emloc_ray.errors import ConfigError
from emloc_ray.modeling.architecture import auto_class
from emloc_ray.planning.costs import with_base
from emloc_ray.planning.lengths import Lengths
from emloc_ray.planning.memory import MemoryModel, total
from emloc_ray.planning.plan import StagePlan, check_stages, make_plan
from emloc_ray.planning.prepared import Prepared
from emloc_ray.planning.training import changed_after_factorizing
from emloc_ray.stages.context import Context, Inputs
from emloc_ray.stages.order import STEPS
from emloc_ray.stages.refine.stage import REFINE, no_refinement, refinement_job

ROW = Lengths(2048.0, 2048.0)


@pytest.fixture
def prepared(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> Callable[..., Prepared]:
    """``prepared(refinement={…}, emulator's key=…)``: a tiny Llama's run on 300 rows."""

    def make(refinement: Any, model_dir: Path | None = None, rows: int = 8, **emulator: Any) -> Prepared:
        sections = {"emulator": {**emulator, "refinement": refinement}, "calibration": {"batch_size": rows}}
        free = {"memory_budget": None}  # inference of a tiny model takes less than a batch's activations
        return tiny_run(tmp_path, model_dir or tiny_model_dir("llama"), 300, **free, **sections)

    return make


def large(**sections: Any) -> Prepared:
    """A 7B model to be refined."""
    return bare_run(LlamaConfig(), emulator={"refinement": {"steps": 50}}, **sections)


def stages(prepared: Prepared) -> dict[str, StagePlan]:
    return {entry.name: entry for entry in make_plan(STEPS, prepared).stages}


def test_it_is_a_step_between_factorizing_and_healing(prepared: Callable[..., Prepared]) -> None:
    found = stages(prepared({"steps": 20}, healing={"steps": 5}))
    names = list(found)
    assert names.index("factorize") < names.index("refine") < names.index("heal")
    longer = stages(prepared({"steps": 4000}, healing={"steps": 5}))
    assert longer["refine"].seconds > found["refine"].seconds
    assert "refine" not in stages(prepared(None))


@pytest.mark.parametrize("emulator", [{"compression_ratio": 1.0, "quantization": "int2"}, {"budget": "2.4 bits"}])
def test_integers_are_refined_without_factors_too(prepared: Callable[..., Prepared], emulator: dict[str, Any]) -> None:
    found = prepared({"steps": 20}, **emulator)
    assert "refine" in stages(found)
    assert no_refinement(found.config) is None
    layout = found.layout
    assert changed_after_factorizing(found.config.emulator, layout) == {*layout.ranks, *layout.bits} != set()


def test_at_ratio_one_it_is_left_out_and_told(prepared: Callable[..., Prepared]) -> None:
    found = prepared({"steps": 20}, compression_ratio=1.0)
    assert "refine" not in stages(found)
    assert "compression_ratio 1.0" in (no_refinement(found.config) or "")
    assert no_refinement(prepared({"steps": 20}).config) is None


@pytest.mark.slow
def test_a_budget_has_it_read_fewer_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emloc_ray.planning.calibration_memory.available_bytes", lambda: 2**42)
    free, bounded = MemoryModel(large(memory_budget=None), ROW), MemoryModel(large(memory_budget="5GiB"), ROW)
    assert free.refinement_rows() == 8
    assert bounded.refinement_rows() < 8
    assert total(with_base(bounded.refinement_parts())) <= 5 * 2**30 < total(with_base(free.refinement_parts()))
    within = MemoryModel(large(), ROW)
    assert total(with_base(within.refinement_parts())) <= total(within.inference(1, 2048))


def test_what_is_refined_is_what_healing_begins_with(prepared: Callable[..., Prepared]) -> None:
    ready = prepared({"steps": 20, "learning_rate": 0.01})
    context = Context(ready, ready.source.directory, made={"factorize": "one", "refine": "other"})
    job = refinement_job(context, "key")
    assert (job.steps, job.learning_rate, job.batch_size) == (20, 0.01, 8)
    assert job.out_dir == context.unhealed_dir == context.emulator_dir
    assert context.emulator_key == "other"


def test_another_number_of_rows_a_step_is_another_refinement(prepared: Callable[..., Prepared]) -> None:
    def inputs(rows: int, shrunk: int | None = None) -> Inputs:
        ready = prepared({"steps": 20}, rows=rows)
        if shrunk is not None:
            section = ready.config.calibration.model_copy(update={"batch_size": shrunk})
            ready = dataclasses.replace(ready, config=ready.config.model_copy(update={"calibration": section}))
        context = Context(ready, ready.source.directory, made={"factorize": "one"})
        write_tokens(context.tokens("calibration"), 8, 8)
        job = refinement_job(context)
        assert (job.batch_size, job.rows_at_once) == (rows, shrunk or rows)
        found = REFINE.inputs(context)
        shutil.rmtree(context.path())
        return found

    assert inputs(8) != inputs(4)
    assert inputs(8) == inputs(8, shrunk=4)  # what a budget shrank redoes nothing
    assert "rows" not in inputs(8)  # as in runs before it was an input


def test_blocks_that_read_inside_others_are_refused(prepared: Callable[..., Prepared], tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16}
    sharing: dict[str, Any] = {
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 300,
    }
    layers: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"] * 2}
    config = transformers.Gemma4TextConfig(**sizes, **heads, **sharing, **layers)
    auto_class(config).from_config(config).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"emulator\.refinement takes one block after another"):
        prepared({"steps": 20}, tmp_path / "model")


def test_its_memory_is_of_one_worker_without_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emloc_ray.planning.calibration_memory.available_bytes", lambda: 64 * 2**30)

    def memory(workers: int = 1, **adapter: Any) -> MemoryModel:
        sections = {"emulator": {"refinement": {"steps": 50}, "num_workers": workers}, "adapter": adapter}
        return MemoryModel(bare_run(LlamaConfig(), memory_budget=None, **sections), ROW)

    assert memory().refinement_rows() == memory(16).refinement_rows() > 1
    plain = memory().refinement_parts()
    assert memory(lora_dropout=0.05).refinement_parts() == plain
    assert memory(method="dora").refinement_parts() == plain


def test_a_gpu_that_holds_no_refinement_is_told_what_to_remove() -> None:
    emulator = {"refinement": {"steps": 50}, "gpus_per_worker": 1}
    ready = bare_run(LlamaConfig(), emulator=emulator, ray={"num_gpus": 1})
    plan = make_plan(STEPS, dataclasses.replace(ready, gpu_bytes=2.0**30))
    told = r"refine is planned to hold .* lower its batch, .* fits\), remove emulator\.refinement, or set"
    with pytest.raises(ConfigError, match=told):
        check_stages(plan, {"refine"})
