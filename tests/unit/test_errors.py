"""Errors are one sentence, and cross process borders (Ray pickles them) unchanged."""

from __future__ import annotations

import pickle

import pytest

from emloc_ray import errors
from emloc_ray.errors import EmlocError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, EmlocError)]


@pytest.mark.parametrize("kind", KINDS)
def test_pickling_keeps_kind_and_message(kind: type[EmlocError]) -> None:
    error = kind("data.jsonl, row 3: no field 'text'.")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    assert str(back) == "data.jsonl, row 3: no field 'text'."
    assert back.args == error.args
    assert back.exit_code == error.exit_code


def test_only_a_bad_config_exits_with_2() -> None:
    assert {kind for kind in KINDS if kind.exit_code == 2} == {errors.ConfigError}
    assert {kind.exit_code for kind in KINDS} == {1, 2}
    assert len(KINDS) >= 6
