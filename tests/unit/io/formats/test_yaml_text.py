"""YAML 1.2 both ways: what is written is read again, and its truths are ``true`` and ``false`` alone."""

from __future__ import annotations

from typing import Any

import pytest

from emloc_ray.io.formats.yaml_text import read_yaml, write_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", "yes"),
        ("Off", "Off"),
        ("True", True),
        ("1e-4", 1e-4),
        ("-2E3", -2000.0),
        ("1:30", "1:30"),
        ("~", None),
        ("", None),
        ("{a: &x {p: 1, q: 2}, b: {<<: *x, q: 3}}", {"a": {"p": 1, "q": 2}, "b": {"p": 1, "q": 3}}),
        (
            "{a: &x {p: {z: 1}}, b: &y {<<: *x, q: {r: 3}}, c: {<<: [*y, *x]}}",
            {"a": {"p": {"z": 1}}, "b": {"p": {"z": 1}, "q": {"r": 3}}, "c": {"p": {"z": 1}, "q": {"r": 3}}},
        ),
    ],
)
def test_values(text: str, value: Any) -> None:
    found = read_yaml(text)
    assert found == value
    assert type(found) is type(value)


def test_what_is_written_is_read_again_in_its_order() -> None:
    value = {
        "z": "no",
        "a": 1e-6,
        "text": "true",
        "é": ["1e-4", None, {"deep": [1, 2.5]}],
        "empty": {},
        "long": "w " * 99,
        "sentences": "Two spaces end each of them.  " * 9 + "Or not.",
    }
    assert read_yaml(write_yaml(value)) == value
    assert list(read_yaml(write_yaml(value))) == list(value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)),
        "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40)),
        "a: &a [*a]",
    ],
    ids=["lists", "merged", "itself"],
)
def test_aliases_of_aliases_are_not_written_out_without_end(text: str) -> None:
    with pytest.raises(ValueError, match="with its aliases written out it holds over 1,000,000 values"):
        read_yaml(text)


@pytest.mark.parametrize(
    "text", ["a: [", "!!python/object:os.path 1", "--- 1\n--- 2", "a: \x07", "*.jsonl", "[" * 1000]
)
def test_what_is_no_yaml_is_a_value_error_of_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w") as caught:
        read_yaml(text)
    assert "\n" not in str(caught.value)
