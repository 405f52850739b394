"""The times on paper are those that the page shows, and follow from what is counted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from benchmarks.card_on_paper import (
    CARD,
    SIZES,
    choice_for,
    choice_under,
    choices_table,
    inference_table,
    stages_table,
)
from benchmarks.gpu.shapes import SHAPES, llama_config
from benchmarks.on_paper import bare_prepared, blocks_table, correction_table, deepened, paper_run, table

from emloc_ray.config.reading import parse_config
from emloc_ray.io.formats.yaml_text import read_yaml
from emloc_ray.planning.layout import Layout
from emloc_ray.planning.memory import MemoryModel
from emloc_ray.planning.plan import make_plan
from emloc_ray.stages.order import STEPS

ROOT = Path(__file__).parents[3]
QWEN = {  # Qwen2.5 7B
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}


@pytest.mark.slow
def test_the_page_has_the_table() -> None:
    page = (ROOT / "cluster" / "README.md").read_text()
    assert table() in page
    assert blocks_table() in page
    assert correction_table() in page
    assert inference_table() in page
    choices = {name: choice_for(name) for name in SIZES}
    assert choices_table(choices) in page
    assert stages_table(choices) in page
    for choice in choices.values():
        best = choice.recommended.memory.prepared
        stages = make_plan(STEPS, best, CARD).stages
        assert (
            max(stage.worker_bytes for stage in stages) <= choice.budget
        )  # what is recommended fits, each stage of it
    emulated = next(one.memory for one in choices["8 B"].alternatives if one.name == "an emulator")
    assert len(emulated.gradient_plan().waves) <= 4


def test_the_readmes_config_trains_on_what_the_plan_recommends() -> None:
    block = re.search(r"```yaml\n(# my.yaml\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    values = read_yaml(block[1])
    assert (values["model"]["source"], values["memory_budget"]) == ("Qwen/Qwen2.5-7B-Instruct", "24GiB")
    on_card = {
        **values,
        "model": {**values["model"], "dtype": "bfloat16"},
        "finetune": {**values["finetune"], "gpus_per_worker": 1},
        "ray": {"num_gpus": 1},
    }
    choice = choice_under(on_card, QWEN)
    recommended, own = choice.recommended.memory.config.emulator, parse_config(values).emulator
    assert (own.compression_ratio, own.quantization, own.budget) == (1.0, "int4", None)
    assert recommended == own


def test_a_deeper_model_is_that_of_its_config() -> None:
    def layout(blocks: int) -> Layout:
        values = {"run_dir": "-", "model": {"source": "-"}, "data": {"train": {"path": "-"}}}
        return bare_prepared(values, llama_config({**SHAPES["tiny"].model, "num_hidden_layers": blocks})).layout

    deep, whole = deepened(layout(1), 3), layout(3)
    assert (deep.specs, deep.groups) == (whole.specs, whole.groups)
    assert deep.num_parameters == pytest.approx(whole.num_parameters, rel=0.01)  # norms left out


def test_an_emulator_saves_nearly_half_of_a_step() -> None:
    flops = []
    for ratio in (1.0, 0.5):
        prepared = paper_run("8 B", "one H100", {"compression_ratio": ratio})
        assert prepared.layout.num_parameters == pytest.approx(8.03e9, rel=0.01)  # norms left out
        cost = next(stage.cost for stage in STEPS if stage.name == "finetune")
        assert cost is not None
        flops.append(cost(MemoryModel(prepared)).flops)
    assert 1.75 < flops[0] / flops[1] < 2.1  # of half of the parameters, heads aside
