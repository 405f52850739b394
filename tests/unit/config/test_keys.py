"""What ``emloc-ray keys`` shows is what a config is checked by."""

from __future__ import annotations

from typing import Any

import pytest

from emloc_ray.config.keys import BASE, KeySection, config_keys
from emloc_ray.config.reading import parse_config
from emloc_ray.config.schema import RunConfig
from emloc_ray.errors import ConfigError
from emloc_ray.io.formats.yaml_text import read_yaml

NEEDED: dict[str, Any] = {"run_dir": "r", "model": {"source": "m"}, "data": {"train": {"path": "rows.jsonl"}}}


def of(name: str) -> KeySection:
    [found] = (section for section in config_keys() if section.name == name)
    return found


@pytest.mark.parametrize("section", config_keys(), ids=lambda section: section.name or "outside")
def test_every_key_is_explained_and_can_be_set_to_what_holds_without_it(section: KeySection) -> None:
    assert section.text
    assert all(key.text for key in section.keys)
    if "." in section.name:  # optional ones, whose keys need others beside them
        return
    before = parse_config(NEEDED).model_dump()
    for key in section.keys:
        if key.values == "section" or key.default is None or key == BASE:  # which is of a file
            continue
        own = {key.name: read_yaml(key.default)}
        values = {section.name: {**NEEDED.get(section.name, {}), **own}} if section.name else own
        found = parse_config(NEEDED | values).model_dump()
        if key.name == "memory_budget":  # which is not written down where it was left out
            assert found.pop("memory_budget") == parse_config(NEEDED).memory_budget
        assert found == before, key


def test_keys_have_their_kinds() -> None:
    kinds = {key.name: (key.values, key.default) for key in of("correction").keys}
    assert kinds["method"] == ("auto | none | projection | covariance | adapted", "auto")
    assert kinds["clamp"] == ("number", "3")
    assert kinds["max_share"] == ("number", "0.1")
    assert {key.name: key.default for key in of("emulator.healing").keys}["steps"] is None
    assert {key.values for key in of("").keys} >= {"section", "inference | size", "text", "whole number"}


def test_a_config_s_base_is_among_its_keys() -> None:
    assert config_keys("base") == [KeySection("", of("").text, (BASE,))]


def test_every_section_is_there_once() -> None:
    names = [name for section in config_keys() for name in section.name.split(", ")]
    assert len(names) == len(set(names))
    held = {"data.train", "data.eval", "emulator.healing"} | {
        name for name in RunConfig.model_fields if name not in ("run_dir", "seed", "memory_budget")
    }
    assert held <= set(names)


def test_one_section_with_what_is_in_it() -> None:
    sections = [section.name for section in config_keys("emulator")]
    assert sections == ["emulator", "emulator.refinement", "emulator.healing"]
    assert [section.name.split(", ")[0] for section in config_keys("data.eval")] == ["data.train"]
    with pytest.raises(ConfigError, match=r"There is no section or key tuning: take one of the sections model, data"):
        config_keys("tuning")


@pytest.mark.parametrize(
    ("name", "values", "whose"),
    [
        ("finetune.weight_decay", "float", "a field of transformers' TrainingArguments"),
        ("weight_decay", "float", "a field of transformers' TrainingArguments"),
        (
            "adapter.num_virtual_tokens",
            "int",
            "a field of PEFT's config for adapter.method prefix_tuning, prompt_tuning",
        ),
        ("decompose_factor", "int", "a field of PEFT's config for adapter.method lokr"),
        ("ray.logging_level", "int", "an argument of ray.init"),
    ],
)
def test_a_key_that_is_passed_on_says_to_whom(name: str, values: str, whose: str) -> None:
    [section] = config_keys(name)
    [key] = section.keys
    assert f"{section.name}.{key.name}".endswith(name)
    assert (key.values, key.text) == (values, f"{whose}, which is passed on")


@pytest.mark.parametrize("name", ["ray.decompose_factor", "adapter.namespace", "finetune.push_to_hub"])
def test_a_key_that_no_one_takes_there_is_none(name: str) -> None:
    with pytest.raises(ConfigError, match=f"There is no section or key {name}"):
        config_keys(name)
