"""What stages need of Ray, as far as it can be told without one: errors in their own words."""

from __future__ import annotations

import errno

import pytest
import torch
from ray.exceptions import OutOfMemoryError, RayTaskError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import WorkerGroupError

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


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried …"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory."),
    ],
)
def test_memory_that_ran_out_is_said_whoever_ran_out_of_it(error: Exception) -> None:
    in_training = WorkerGroupError("two workers failed", {1: UserExceptionWithTraceback(error, "Traceback …")})
    for raised in (as_ray_raises(error), in_training):
        assert str(explain(raised, "finetune")).startswith("finetune: a worker ran out of memory: set memory_budget")


def test_a_full_disk_is_said_with_its_place() -> None:
    told = str(explain(as_ray_raises(OSError(errno.ENOSPC, "No space left on device", "/runs/a")), "merge"))
    assert told == "merge: the disk is full at /runs/a: free some and run the same command again."


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
