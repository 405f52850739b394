"""The matcher chooses what PEFT itself would choose on the same model, and says so where it would choose nothing."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.utils.other import get_pattern_key
from tiny import make_config

from emloc_ray.errors import ConfigError
from emloc_ray.modeling.architecture import block_linears, empty_model
from emloc_ray.modeling.matching import check_table, lookup, matches, order_free, portable_targets, select, suffixes

NAMES = [spec.name for spec in block_linears(empty_model(make_config("llama")))]


def chosen_by_peft(targets: Any, exclude: Any) -> list[str]:
    """The modules that PEFT attaches to."""
    config = LoraConfig(target_modules=targets, exclude_modules=exclude, r=2)
    base: Any = get_peft_model(empty_model(make_config("llama")), config).base_model
    return list(base.targeted_module_names)


@pytest.mark.parametrize(
    ("targets", "exclude"),
    [
        (["q_proj"], None),
        (["q_proj", "down_proj"], None),
        (["self_attn.v_proj"], None),
        (["model.layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"], None),
        (["q_proj", "v_proj"], ["model.layers.0.self_attn.v_proj"]),
        (["q_proj", "v_proj"], ["layers.1.self_attn.q_proj", "v_proj"]),
        (["q_proj", "k_proj"], r".*\.0\..*"),
        (r".*\.(q|v)_proj", None),
        (r"model\.layers\.1\.mlp\.(gate|up|down)_proj", None),
        (r".*_proj", r".*layers\.0.*"),
        (r".*\.(q|k|v|o)_proj", ["o_proj"]),
        ("all-linear", None),
        ("all-linear", ["down_proj"]),
    ],
)
def test_same_choice_as_peft(targets: Any, exclude: Any) -> None:
    ours = select(NAMES, targets, exclude, "adapter.target_modules")
    assert ours == [name for name in NAMES if name in ours]  # in the model's order
    assert sorted(ours) == sorted(chosen_by_peft(targets, exclude))


def test_nothing_said_is_everything() -> None:
    assert select(NAMES, None, None, "k") == NAMES


def test_a_string_is_a_regex_for_the_full_name_and_a_list_is_not() -> None:
    assert not matches("model.layers.0.self_attn.q_proj", "q_proj")
    assert matches("model.layers.0.self_attn.q_proj", ["q_proj"])
    assert not matches("model.layers.0.self_attn.q_proj", ["proj"])
    assert not matches("model.layers.0.self_attn.q_proj", [".*q_proj"])


@pytest.mark.parametrize("targets", [["q_proj", "k_prj"], "k_prj", r".*\.k_prj"])
def test_no_match_names_key_pattern_and_what_there_is(targets: Any) -> None:
    pattern = targets if isinstance(targets, str) else "k_prj"
    with pytest.raises(ConfigError) as caught:
        select(NAMES, targets, None, "adapter.target_modules")
    text = str(caught.value)
    assert text.startswith(f"adapter.target_modules: {pattern!r} matches none of the {len(NAMES)} linears")
    for suffix in ("q_proj", "down_proj"):
        assert suffix in text
    if pattern == "k_prj":
        assert "the nearest is k_proj" in text


def test_a_name_that_would_match_in_a_list_is_told_so() -> None:
    with pytest.raises(
        ConfigError, match=r"'q_proj' matches none .*a text is a pattern of whole names: write \[q_proj\]"
    ):
        select(NAMES, "q_proj", None, "adapter.target_modules")


def test_everything_excluded_again() -> None:
    told = r"^adapter.exclude_modules: \['q_proj'\] leaves none of the linears that adapter.target_modules names"
    with pytest.raises(ConfigError, match=told):
        select(NAMES, ["q_proj"], ["q_proj"], "adapter.target_modules")


@pytest.mark.parametrize(("targets", "exclude"), [("(q_proj", None), (None, "*q")])
def test_a_broken_regex(targets: Any, exclude: Any) -> None:
    with pytest.raises(ConfigError, match="is not a regular expression"):
        select(NAMES, targets, exclude, "adapter.target_modules")


keys = st.lists(
    st.sampled_from(
        [
            "q_proj",
            "self_attn.q_proj",
            "layers.0.self_attn.q_proj",
            r"layers\.\d.mlp.*",
            ".*",
            "model.layers.1.self_attn.o_proj",
            "proj",
            "q|down_proj",
            "(k|v)_proj",
            r"^model\.layers\.0.*",
        ]
    ),
    unique=True,
    max_size=5,
)


@given(st.sampled_from(NAMES), keys)
def test_lookup_is_peft_s(name: str, patterns: list[str]) -> None:
    table = {pattern: number for number, pattern in enumerate(patterns)}
    theirs = table.get(get_pattern_key(patterns, name), -1)
    assert lookup(name, table, -1) == theirs


@given(keys)
def test_an_order_free_table_says_the_same_in_any_order(patterns: list[str]) -> None:
    table = {pattern: number for number, pattern in enumerate(patterns)}
    free = order_free(table, NAMES, lambda name: f"^{re.escape(name)}")
    turned = dict(reversed(free.items()))
    for name in NAMES:
        assert lookup(name, free, -1) == lookup(name, turned, -1) == lookup(name, table, -1)


def test_a_table_without_overlaps_stays_as_it_was_written() -> None:
    assert order_free({"q_proj": 2, "down_proj": 3}, NAMES, str) == {"q_proj": 2, "down_proj": 3}


def test_a_table_s_key_that_names_nothing() -> None:
    check_table(NAMES, {"q_proj": 3, r"layers\.1\..*": 4}, "adapter.rank_pattern")
    with pytest.raises(ConfigError, match=r"adapter\.rank_pattern: 'qproj' matches none .*the nearest is q_proj"):
        check_table(NAMES, {"q_proj": 3, "qproj": 4}, "adapter.rank_pattern")
    with pytest.raises(ConfigError, match="not a regular expression"):
        check_table(NAMES, {"(": 3}, "adapter.rank_pattern")


def test_flags_of_a_table_s_key_stand_in_their_group() -> None:
    with pytest.raises(
        ConfigError, match=r"emulator\.ratios: '\(\?i\)Q_PROJ' begins with flags: write \(\?i:…\) around"
    ):
        check_table(NAMES, {"(?i)Q_PROJ": 0.5}, "emulator.ratios")
    check_table(NAMES, {"(?i:Q_PROJ)": 0.5}, "emulator.ratios")


def test_suffixes_in_order_without_repeats() -> None:
    assert suffixes(NAMES) == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_suffixes_where_they_suffice_else_full_names() -> None:
    every = [f"layers.{layer}.{name}" for layer in range(2) for name in ("attn.q", "attn.v", "mlp.up")]
    assert portable_targets(["layers.0.attn.q", "layers.1.attn.q"], every) == ["q"]
    assert portable_targets(every, every) == ["q", "v", "up"]
    assert portable_targets(["layers.1.attn.q"], every) == ["layers.1.attn.q"]
    assert portable_targets(["layers.0.attn.q", "layers.1.attn.q"], [*every, "vision.0.q"]) == [
        "layers.0.attn.q",
        "layers.1.attn.q",
    ]
