"""What stages need of Ray, as far as it can be told without one: errors in their own words."""

from __future__ import annotations

import pytest
from ray.exceptions import OutOfMemoryError, RayTaskError

from emloc_ray.errors import DataError, NumericsError, StageError
from emloc_ray.stages.cluster import Resources, explain, own_error


def as_ray_raises(error: Exception) -> BaseException:
    return RayTaskError("task", "Traceback …", error, pid=1, ip="127.0.0.1").as_instanceof_cause()


def test_a_workers_own_sentence_comes_through() -> None:
    raised = as_ray_raises(NumericsError("Layer q holds NaN."))
    told = explain(raised, "factorize")
    assert type(told) is NumericsError
    assert str(told) == "Layer q holds NaN."


def test_it_is_found_behind_other_errors() -> None:
    outer = RuntimeError("wrapped")
    outer.__cause__ = DataError("a.jsonl, row 3: no field 'text'.")
    assert str(own_error(outer)) == "a.jsonl, row 3: no field 'text'."
    assert str(own_error(as_ray_raises(outer))) == "a.jsonl, row 3: no field 'text'."


def test_anything_else_names_the_stage_and_the_last_line() -> None:
    told = explain(ValueError("a long story\n\nits end\n"), "merge")
    assert isinstance(told, StageError)
    assert str(told) == "merge: ValueError: its end"
    assert "ran out of memory" in str(explain(OutOfMemoryError("node"), "finetune"))
    assert own_error(ValueError("x")) is None


def test_an_error_that_causes_itself_ends() -> None:
    error = ValueError("round")
    error.__cause__ = other = ValueError("and round")
    other.__cause__ = error
    assert own_error(error) is None


@pytest.mark.parametrize(("cpus", "threads"), [(0.5, 1), (1, 1), (2, 2), (2.5, 2)])
def test_a_worker_has_no_more_threads_than_cpus(cpus: float, threads: int) -> None:
    resources = Resources(2, cpus, 1)
    assert resources.threads == threads
    assert resources.options() == {"num_cpus": cpus, "num_gpus": 1}
