"""What goes wrong on Ray, in our words; work that lost its worker is counted, told of, and given up in the end."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import (
    ActorDiedError,
    NodeDiedError,
    OutOfDiskError,
    OutOfMemoryError,
    RayTaskError,
    RuntimeEnvSetupError,
    WorkerCrashedError,
)
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import WorkerGroupError

from emloc_ray.errors import DataError, NumericsError, StageError
from emloc_ray.stages.finetune.group_callbacks import FailureLog
from emloc_ray.stages.finetune.job import FinetuneJob
from emloc_ray.stages.ray import losses as failures
from emloc_ray.stages.ray.losses import Losses, explain, own_error

# What torch adds to the first line of every error of CUDA.
CUDA_HELP = (
    "Search for `cudaErrorX' in https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html for more"
    " information.\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below"
    " might be incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to"
    " enable device-side assertions.\n"
)


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
    signed = ValueError("GET https://host/rows?sig=aBc%3D failed")
    assert str(explain(signed, "tokens")) == "tokens: ValueError: GET https://host/rows?sig=(hidden) failed"
    assert "ran out of memory" in str(explain(OutOfMemoryError("node"), "finetune"))
    assert own_error(ValueError("x")) is None


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried …"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError(f"CUDA error: out of memory\n{CUDA_HELP}"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    ],
)
def test_memory_that_ran_out_is_said_whoever_ran_out_of_it(error: Exception) -> None:
    in_training = WorkerGroupError("two workers failed", {1: UserExceptionWithTraceback(error, "Traceback …")})
    for raised in (as_ray_raises(error), in_training):
        assert str(explain(raised, "finetune")).startswith("finetune: a worker ran out of memory: set memory_budget")


def test_of_an_error_on_a_gpu_the_line_is_said_that_names_it() -> None:
    raised = RuntimeError(f"CUDA error: device-side assert triggered\n{CUDA_HELP}")
    on_a_worker = RayTaskError("task", f"Traceback …\ntorch.AcceleratorError: {raised}", raised, pid=1, ip="127.0.0.1")
    for error in (raised, on_a_worker.as_instanceof_cause()):
        assert str(explain(error, "evaluate")).endswith(": CUDA error: device-side assert triggered")
    assert str(explain(RuntimeError(CUDA_HELP), "evaluate")) == "evaluate: RuntimeError: RuntimeError"


def test_a_full_disk_is_said_with_its_place() -> None:
    told = str(explain(as_ray_raises(OSError(errno.ENOSPC, "No space left on device", "/runs/a")), "merge"))
    assert told == "merge: the disk is full at /runs/a: free some and run the same command again."


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/runs/a"), "the disk is full at /runs/a: free some"),
        (OutOfDiskError("x"), "a node's disk is full where Ray keeps what its memory does not hold: free some there"),
        (RuntimeEnvSetupError("pip said\nno such package"), "environment (no such package): correct ray.runtime_env"),
    ],
)
def test_what_another_try_does_not_change_ends_the_stage_at_once(error: Exception, said: str) -> None:
    behind = WorkerCrashedError()
    behind.__cause__ = error
    for raised in (as_ray_raises(error) if isinstance(error, OSError) else error, behind):
        losses = Losses("merge")
        with pytest.raises(type(raised)):
            losses.record_lost_worker("shard a", raised)
        assert not losses.counts
        assert said in str(explain(raised, "merge"))


def test_an_error_that_causes_itself_ends() -> None:
    error = ValueError("round")
    error.__cause__ = other = ValueError("and round")
    other.__cause__ = error
    assert own_error(error) is None


def test_a_lost_worker_is_told_of_and_begun_again_later_each_time() -> None:
    told: list[str] = []
    losses = Losses("merge", told.append, bound=2)
    delays = [losses.record_lost_worker("shard a", WorkerCrashedError()) for _ in range(2)]
    losses.record_lost_worker("shard b", NodeDiedError("node"))
    assert delays == sorted(delays)
    assert told == [
        "merge: shard a lost its worker because its process crashed or was killed; restarted (1 of 2).",
        "merge: shard a lost its worker because its process crashed or was killed; restarted (2 of 2).",
        "merge: shard b lost its worker because its node died; restarted (1 of 2).",
    ]
    with pytest.raises(StageError, match=r"^merge: shard a lost its worker 3 times, the last time because its process"):
        losses.record_lost_worker("shard a", WorkerCrashedError())


def test_a_piece_that_has_written_further_files_is_counted_anew(tmp_path: Path) -> None:
    files = [tmp_path / str(number) for number in range(5)]
    losses = Losses("factorize", bound=1, files={"layer k, …": files})
    for file in files:
        file.touch()
        losses.record_lost_worker("layer k, …", WorkerCrashedError())
    with pytest.raises(StageError, match=r"^factorize: layer k, … lost its worker 2 times"):
        losses.record_lost_worker("layer k, …", WorkerCrashedError())


def test_what_the_work_itself_raised_is_not_begun_again() -> None:
    losses = Losses("merge")
    for error in (ValueError("x"), as_ray_raises(NumericsError("Layer q holds NaN.")), as_ray_raises(MemoryError())):
        with pytest.raises(type(error)):
            losses.record_lost_worker("shard a", error)
    assert not losses.counts


def test_memory_is_named_where_it_killed_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = Losses("evaluate", bound=0)
    with pytest.raises(StageError, match="because its node ran out of memory: set memory_budget"):
        losses.record_lost_worker("part 1", OutOfMemoryError("node"))
    monkeypatch.setattr(failures, "kernel_kills", lambda: 10**9)
    with pytest.raises(StageError, match="because the kernel killed a process for memory: set memory_budget"):
        losses.record_lost_worker("part 2", WorkerCrashedError())


def test_a_trainings_failure_is_written_down_while_it_is_recovered_from(tmp_path: Path) -> None:
    fields: dict[str, Any] = dict.fromkeys(("emulator_dir", "tokens_dir", "out_dir"), tmp_path)
    job = FinetuneJob(**fields, storage_dir=tmp_path / "training", name="a", adapter={}, portable_targets=[],
                      base_model="", max_steps=1, batch_size=1, max_failures=2)  # fmt: skip
    log = FailureLog(job)
    closed = RuntimeError("Traceback\nConnection closed by peer")
    log.after_exception(None, {0: closed})
    log.after_exception(None, {0: closed, 1: WorkerHealthCheckFailedError("rank 1", ActorDiedError())})
    log.after_exception(None, {0: closed})
    assert job.failure_path.read_text().splitlines() == [
        "finetune: rank 0 failed (Connection closed by peer); restarted from the last checkpoint (1 of 2).",
        "finetune: rank 1 lost its worker because its process crashed or was killed; restarted from the last checkpoint"
        " (2 of 2).",
    ]
