"""What stages need of Ray, as far as it can be told without one."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import NodeDiedError, WorkerCrashedError

from emloc_ray.errors import ArtifactError, StageError, TakenOver
from emloc_ray.stages.ray import tasks
from emloc_ray.stages.ray.losses import Losses
from emloc_ray.stages.ray.nodes import shortage
from emloc_ray.stages.ray.spans import Span, Timed
from emloc_ray.stages.ray.tasks import Resources, bounded

SPAN = Span("", "process 1 on here", "", 0.0, 1.0)


@pytest.mark.parametrize(("cpus", "threads"), [(0.5, 1), (1, 1), (2, 2), (2.5, 2)])
def test_a_worker_has_no_more_threads_than_cpus(cpus: float, threads: int) -> None:
    resources = Resources(2, cpus, 1)
    assert resources.threads == threads
    assert resources.options() == {"num_cpus": cpus, "num_gpus": 1}


def nothing() -> None:
    pass


def test_a_process_that_had_a_gpu_ends_with_its_task() -> None:
    """Ray would keep it: torch holds what it has taken, and stays with the GPU it has seen first."""
    assert Resources(gpus_per_worker=0.5).task(nothing)._max_calls == 1
    assert Resources().task(nothing)._max_calls == 0
    assert Resources().task(nothing, alone=True)._max_calls == 1


def test_a_stage_of_another_run_is_the_same_kind_of_task_to_ray() -> None:
    """Each call of ``ray.remote`` makes a kind of its own, which the driver and its node keep."""
    assert Resources(3, 2).task(nothing) is Resources(1, 2).task(nothing)
    assert Resources(3, 2).task(nothing) is not Resources(3, 1).task(nothing)


@pytest.mark.parametrize(
    ("gpus", "of_cluster", "variables", "hides"),
    [
        (0, 1, {}, True),
        (1, 1, {}, False),
        (0, 0, {}, False),  # there are none to see
        (0, 1, tasks.NO_GPU_UNASKED, False),  # hidden from all workers of the job, as where we started Ray
    ],
)
def test_a_worker_of_the_caller_s_ray_sees_no_gpu_unasked(
    gpus: int, of_cluster: int, variables: dict[str, str], hides: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    with monkeypatch.context() as patch:  # over before the test is: what looks after Ray asks it too
        patch.setattr(tasks.ray, "is_initialized", lambda: True)
        patch.setattr(tasks.ray, "get_runtime_context", lambda: SimpleNamespace(runtime_env={"env_vars": variables}))
        patch.setattr(tasks.ray, "cluster_resources", lambda: {"GPU": of_cluster})
        patch.setattr(tasks.ray, "remote", lambda **options: asked.append(options) or (lambda function: function))
        tasks.remote_task(lambda: None, num_cpus=1, num_gpus=gpus)
    assert ("runtime_env" in asked[0]) == hides


def test_another_ray_is_asked_anew_whether_it_hides_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook whose first run started a Ray of its own, before the caller started one."""
    hides: list[bool] = []
    with monkeypatch.context() as patch:
        patch.setattr(tasks.ray, "remote", lambda **o: hides.append("runtime_env" in o) or (lambda function: function))
        patch.setattr(tasks.ray, "is_initialized", lambda: False)
        tasks.remote_task(nothing, num_cpus=3)
        patch.setattr(tasks.ray, "is_initialized", lambda: True)
        patch.setattr(tasks.ray, "get_runtime_context", lambda: SimpleNamespace(runtime_env={}))
        patch.setattr(tasks.ray, "cluster_resources", lambda: {"GPU": 1})
        tasks.remote_task(nothing, num_cpus=3)
    assert hides == [False, True]


def test_a_look_at_a_store_that_does_not_answer_says_what_it_said_before() -> None:
    answers: list[Any] = [ArtifactError("no answer"), 1, OSError("no answer"), TakenOver("taken over")]

    def ask() -> int:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return int(answer)

    look = tasks.newest(ask, 0, clock=lambda: 0.0)
    assert [look(), look(), look()] == [0, 1, 1]
    with pytest.raises(TakenOver):
        look()


def test_a_look_that_takes_long_is_made_less_often() -> None:
    now, asked = 0.0, []

    def ask() -> int:
        nonlocal now
        now += 2.0
        asked.append(now)
        return len(asked)

    look = tasks.newest(ask, 0, clock=lambda: now)
    seen = []
    for _ in range(100):
        seen.append(look())
        now += 1.0
    assert asked[-1] < 110
    assert seen[0] == 1
    assert len(asked) == seen[-1] == 3


def test_what_no_node_has_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 4.0}}, {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}}]
    monkeypatch.setattr(tasks.ray, "nodes", lambda: [*nodes, {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 9.0}}])
    assert shortage("merge", Resources(99, 8), together=False) is None
    assert shortage("finetune", Resources(3, 4, 0), together=True) is None
    assert shortage("merge", Resources(9, 9), together=False) == (
        "merge begins with 1 worker, 9 CPUs and 0 GPUs each, of which the nodes hold 0: it waits until more have joined."
    )
    assert "2 workers, 1 CPUs and 1 GPUs each, of which the nodes hold 1: it waits" in str(
        shortage("finetune", Resources(2, 1, 1), together=True)
    )


def test_lost_tasks_start_again_and_results_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: dict[str, list[Any]] = {"a": [WorkerCrashedError(), NodeDiedError("node"), 1], "b": [2], "c": [3]}
    started: list[str] = []

    def submit(name: str) -> Iterator[Any]:
        started.append(name)
        outcome = outcomes[name].pop(0)
        return iter([None, outcome if isinstance(outcome, Exception) else Timed(outcome, SPAN)])

    def get(given: Any) -> Any:
        if isinstance(given, Exception):
            raise given
        return given

    monkeypatch.setattr(tasks.ray, "wait", lambda references, **options: (references[:1], references[1:]))
    monkeypatch.setattr(tasks.ray, "get", get)
    monkeypatch.setattr(Losses, "delays", (0.0,))
    told: list[str] = []
    shown: list[tuple[int, int]] = []
    named = [(name, functools.partial(submit, name)) for name in outcomes]
    assert bounded(named, 2, Losses("merge", told.append), lambda done, of: shown.append((done, of))) == [1, 2, 3]
    assert sorted(started) == ["a", "a", "a", "b", "c"]
    assert len(told) == 2
    assert shown[-1] == (3, 3)


def test_the_progress_of_tasks_that_write_files_is_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, shown = [tmp_path / str(number) for number in range(3)], list[tuple[int, int]]()

    def write() -> Iterator[Timed | None]:
        for file in files:
            file.touch()
            yield None
        yield Timed(1, SPAN)

    monkeypatch.setattr(tasks.ray, "wait", lambda references, **options: (references[:1], references[1:]))
    monkeypatch.setattr(tasks.ray, "get", lambda given: given)
    losses = Losses("factorize", files={"layer k, …": files})
    assert bounded([("layer k, …", write)], 1, losses, lambda done, of: shown.append((done, of))) == [1]
    assert (shown[0], shown[-1]) == ((1, 3), (3, 3))


@pytest.mark.parametrize(
    ("asked", "granted", "in_group", "seen"),
    [("1", [3], False, "3"), ("1", [], False, ""), ("1", [3], True, "0,1,2,3"), ("0", [3], False, "0,1,2,3")],
)
def test_a_worker_sees_its_own_gpus_where_ray_hides_none(
    asked: str, granted: list[int], in_group: bool, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", asked)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    with monkeypatch.context() as patch:
        patch.setattr(tasks.ray, "is_initialized", lambda: True)
        patch.setattr(tasks.ray, "get_gpu_ids", lambda: granted)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        tasks.set_threads(torch.get_num_threads(), in_group)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


@pytest.mark.parametrize(("granted", "opens"), [([0], False), ([0], True), ([], False)])
def test_a_granted_gpu_that_torch_cannot_open_is_told(
    granted: list[int], opens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tasks.ray, "is_initialized", lambda: True)
        patch.setattr(tasks.ray, "get_gpu_ids", lambda: granted)
        patch.setattr(torch.cuda, "is_available", lambda: opens)
        if granted and not opens:
            with pytest.raises(StageError, match="GPU 0, which torch"):
                tasks.set_threads(torch.get_num_threads())
        else:
            tasks.set_threads(torch.get_num_threads())
