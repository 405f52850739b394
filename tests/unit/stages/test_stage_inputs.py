"""What each stage's work is known by: whatever it is made from changes its fingerprint, and that of nothing before it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plain_stages import tokenized_here
from small_runs import make_values, task_rows, write_jsonl
from stage_artifacts import write_tokens

from emloc_ray.config.reading import parse_config
from emloc_ray.data.token_shards import TokenShards
from emloc_ray.io.runs.fingerprint import fingerprint
from emloc_ray.planning.prepared import Prepared, prepare
from emloc_ray.stages.context import Context
from emloc_ray.stages.order import STEPS
from emloc_ray.stages.tokens.stage import DATA
from emloc_ray.stages.tokens.tokens import tokenize_data

SPLITS = ("train", "calibration", "selection", "validation", "eval")


@pytest.fixture
def values(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> dict[str, Any]:
    """A run of all stages, scored while it trains, with tokens of every split."""
    rows = write_jsonl(tmp_path / "rows.jsonl", task_rows(40))
    training = {"exact_steps": 2, "eval_strategy": "steps"}
    emulator = {"refinement": {"steps": 3}, "healing": {"steps": 3, "r": 2}}
    values = make_values(tmp_path / "run", tiny_model_dir(), rows, emulator=emulator, finetune=training)
    run = changed(values).run
    run.create({})
    for split in SPLITS:
        write_tokens(run.path("data", "tokens", split), 16, 8)
    return values


def changed(values: dict[str, Any], **sections: Any) -> Prepared:
    merged = {name: {**values.get(name, {}), **keys} for name, keys in sections.items() if isinstance(keys, dict)}
    return prepare(parse_config({**values, **sections, **merged}))


def keys(prepared: Prepared) -> dict[str, str]:
    """Each stage's fingerprint, over the tokens that are there."""
    context = Context(prepared, prepared.source.directory)
    for stage in STEPS:
        if stage.wanted(prepared):
            context.made[stage.name] = fingerprint(stage.inputs(context))
    return context.made


def first_other(one: dict[str, str], other: dict[str, str]) -> str | None:
    return next((name for name in one if one[name] != other[name]), None)


@pytest.mark.parametrize(
    ("split", "first"),
    [
        ("calibration", "calibrate"),
        ("train", "heal"),
        ("validation", "finetune"),
        ("selection", "correct"),
        ("eval", "evaluate"),
    ],
)
def test_other_rows_of_a_split_are_other_inputs_of_what_reads_them(
    values: dict[str, Any], split: str, first: str
) -> None:
    before = keys(changed(values))
    write_tokens(changed(values).run.path("data", "tokens", split), 24, 8)
    assert first_other(before, keys(changed(values))) == first


def test_a_prompt_that_exact_steps_finished_otherwise_is_scored_again(values: dict[str, Any]) -> None:
    """A prompt is not merged, by which other adapters come in."""
    prompt = changed({**values, "adapter": {"method": "prompt_tuning", "num_virtual_tokens": 4}})
    before = keys(prompt)
    finished = prompt.run.path("adapter_finished")
    finished.mkdir()
    (finished / "adapter_model.safetensors").write_bytes(b"another")
    assert first_other(before, keys(prompt)) == "evaluate"


def test_other_rows_are_trained_on_anew_without_a_healing(values: dict[str, Any]) -> None:
    before = keys(changed(values, emulator={"healing": None}))
    write_tokens(changed(values).run.path("data", "tokens", "train"), 24, 8)
    assert first_other(before, keys(changed(values, emulator={"healing": None}))) == "finetune"


@pytest.mark.parametrize(
    ("sections", "first"),
    [
        ({"finetune": {"exact_steps": 4}}, "finish"),
        ({"merge": {"max_shard_size": "1MiB"}}, "merge"),
        ({"emulator": {"refinement": {"steps": 9}, "healing": {"steps": 3, "r": 2}}}, "refine"),
        ({"emulator": {"refinement": {"steps": 3}, "healing": {"steps": 9, "r": 2}}}, "heal"),
        ({"adapter": {"r": 2}}, "finetune"),
        ({"correction": {"max_share": 0.5}}, "correct"),
        ({"evaluation": {"variants": ["original", "corrected"]}}, "evaluate"),
        ({"model": {"dtype": "bfloat16"}}, "calibrate"),
    ],
)
def test_a_setting_is_an_input_of_the_first_stage_that_goes_by_it(
    values: dict[str, Any], sections: dict[str, Any], first: str
) -> None:
    assert first_other(keys(changed(values)), keys(changed(values, **sections))) == first


def test_at_ratio_one_the_dtype_is_an_input_of_the_training(values: dict[str, Any]) -> None:
    whole = {**values, "emulator": {"compression_ratio": 1.0}}
    one, other = (keys(changed(whole, model=model)) for model in ({}, {"dtype": "bfloat16"}))
    assert first_other(one, other) == "finetune"


def test_the_length_of_packs_is_an_input_of_the_training(values: dict[str, Any]) -> None:
    """Also where no row is cut by either: the tokens' index says for which length they were made."""
    found = []
    for length in (64, 128):
        training = {"packing": True, "eval_strategy": "no"}
        prepared = changed(values, data={"max_seq_length": length}, emulator={"healing": None}, finetune=training)
        with tokenized_here():
            tokenize_data(prepared, prepared.source.directory, prepared.run.path("data"))
        shards = TokenShards(prepared.run.path("data", "tokens", "train"))
        found.append((keys(prepared)["finetune"], shards.shard(0)))
    assert found[0][1] == found[1][1]
    assert found[0][0] != found[1][0]


@pytest.mark.parametrize(
    "sections",
    [
        {"calibration": {"num_calibration_samples": 3}},
        {"calibration": {"num_calibration_tokens": 50}},
        {"calibration": {"rows_per_shard": 3}},
        {"correction": {"num_selection_samples": 3}},
        {"evaluation": {"num_samples": 3}},
        {"finetune": {"num_validation_samples": 3}},
        {"seed": 1},
    ],
)
def test_what_says_which_rows_a_split_has_is_an_input_of_the_tokens(
    values: dict[str, Any], sections: dict[str, Any]
) -> None:
    one, other = (DATA.inputs(Context(p, p.source.directory)) for p in (changed(values), changed(values, **sections)))
    assert one != other
