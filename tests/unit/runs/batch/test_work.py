"""A batch's tasks are checked before any of them begins."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import make_values, task_rows, write_jsonl
from transformers import AutoTokenizer

from emloc_ray.config.reading import parse_config
from emloc_ray.data import units
from emloc_ray.errors import ConfigError
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.planning import calibration_memory, data_checks, prepared
from emloc_ray.runs.batch.tasks import Task
from emloc_ray.runs.batch.work import PipelineWork
from emloc_ray.runs.versions import made_with
from emloc_ray.stages.calibrate.stage import CALIBRATE
from emloc_ray.stages.finetune.stage import FINETUNE

FLASH = {"attn_implementation": "flash_attention_2"}


@pytest.fixture
def task(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> Callable[..., Task]:
    """``task(name, evaluation={…})``: of a machine with one GPU."""
    rows = write_jsonl(tmp_path / "rows.jsonl", task_rows(40))

    def make(name: str, **sections: dict[str, Any]) -> Task:
        values = make_values(tmp_path / name, tiny_model_dir(), rows, **{"ray": {"num_gpus": 1}, **sections})
        return Task(name, parse_config(values))

    return make


def test_what_its_gpus_cannot_do_is_told_before_a_batch_begins(
    task: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_memory, "gpu_bytes", lambda: 2**30)
    on_cpus = {section: {"gpus_per_worker": 0} for section in ("calibration", "finetune", "evaluation")}
    share = {"gpus_per_worker": 0.25, "num_workers": 1}
    tasks = [
        task("sound", **on_cpus),
        task("kernel", **on_cpus, model=FLASH),
        task("share", **{**on_cpus, "evaluation": share}),
        task("other-share", **{**on_cpus, "evaluation": share}),
    ]
    with pytest.raises(ConfigError) as caught:
        PipelineWork(None).prepare(tasks)
    kernel, shared = str(caught.value).split("\n")
    assert kernel.startswith("task kernel: model.attn_implementation: flash_attention_2 computes on GPUs alone, and")
    assert shared.startswith("task share, other-share: evaluation.gpus_per_worker is 0.25, of which 23")


def test_gpus_that_are_not_there_are_told_when_a_batch_starts(
    task: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    work = PipelineWork(None)
    work.prepare([task("on-gpu"), task("on-cpus", ray={"num_gpus": 0})])  # as a dry run does
    with pytest.raises(ConfigError, match=r"^task on-gpu: ray\.num_gpus is 1, and torch sees 0 GPUs of this machine"):
        work.check_num_gpus()


def test_an_attention_that_a_joined_ray_cannot_compute_is_told_once_its_gpus_are_known(
    task: Callable[..., Task],
) -> None:
    work = PipelineWork(None)
    work.prepare([task("kernel", ray={"address": "a-cluster:6379"}, model=FLASH)])
    with pytest.raises(ConfigError, match=r"task kernel: .* computes on GPUs alone, and calibration has none"):
        work.with_gpus(0)


def test_what_tasks_wait_for_is_asked_for_at_once_and_what_they_share_once(
    task: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    all_at_once, checking = threading.Barrier(3, timeout=60), RunDirectory.check

    def check(run: RunDirectory) -> dict[str, Any]:
        all_at_once.wait()
        return checking(run)

    monkeypatch.setattr(RunDirectory, "check", check)
    calls = list[tuple[str, bool]]()

    def count(module: Any, name: str) -> None:
        plain = getattr(module, name)

        def call(*args: Any, **how: Any) -> Any:
            calls.append((name, threading.current_thread() is threading.main_thread()))
            return plain(*args, **how)

        monkeypatch.setattr(module, name, call)

    for name in ("resolve_source", "look_at_files", "row_lengths"):
        count(prepared, name)
    count(data_checks, "scan")
    tasks = [task(str(ratio), emulator={"compression_ratio": ratio}) for ratio in (0.3, 0.4, 0.5)]
    work = PipelineWork(None)
    work.prepare(tasks)
    assert sorted(calls) == [("look_at_files", False), ("resolve_source", False), ("row_lengths", True), ("scan", True)]
    assert [work.config(task).emulator.compression_ratio for task in tasks] == [0.3, 0.4, 0.5]


def test_tasks_of_one_model_open_its_tokenizer_once(
    task: Callable[..., Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, open_one = list[int](), AutoTokenizer.from_pretrained

    def count(*args: Any, **options: Any) -> Any:
        opened.append(1)
        return open_one(*args, **options)

    def chats(name: str) -> Task:
        turns = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Yes."}]
        rows = write_jsonl(tmp_path / f"{name}.jsonl", [{"messages": turns}] * 24)
        return task(name, data={"train": {"path": str(rows)}, "format": "messages"})

    work = PipelineWork(None)
    work.prepare([chats("a")])
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", count)
    work.prepare([chats("b"), chats("c")])
    assert not opened


def test_a_task_s_plan_names_the_shared_stages_that_it_has_begun(task: Callable[..., Task], tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "cut")
    run.create({})
    for stage in (CALIBRATE, FINETUNE):
        run.begin(stage.name, made_with(stage), "key", 7.0)
    work = PipelineWork(None)
    assert work.planned(task("cut")).begun == {"calibrate": ("key", 7.0)}
    assert work.planned(task("new")).begun == {}


def test_a_task_that_is_refused_ends_alone_and_in_order(task: Callable[..., Task], tmp_path: Path) -> None:
    for name in ("c", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "something").touch()
    with pytest.raises(ConfigError) as caught:
        PipelineWork(None).prepare([task(name) for name in "cba"])
    assert [line.partition(": run_dir ")[0] for line in str(caught.value).split("\n")] == ["task c", "task a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c", "rows.jsonl"]


@pytest.mark.parametrize(("most", "expected"), [(2**23, 1), (0, 3)], ids=["small rows", "large rows"])
def test_reading_rows_is_admitted_with_the_workers_that_it_takes(
    task: Callable[..., Task], monkeypatch: pytest.MonkeyPatch, most: int, expected: int
) -> None:
    """Else a batch would hold more than its limits."""
    monkeypatch.setattr(units, "SMALL_BYTES", most)
    one = task("a", calibration={"num_workers": 3, "gpus_per_worker": 0}, ray={"num_gpus": 0})
    stages = {stage.name: stage for stage in PipelineWork(None).stages(one)}
    data = stages["data"]
    assert (data.num_workers, data.cpus_per_worker, data.gpus_per_worker, data.divisible) == (expected, 1, 0, True)
