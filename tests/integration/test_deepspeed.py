"""Fine-tuning under DeepSpeed by two workers on CPUs: the adapter is the one that they make without it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
from accelerate.state import AcceleratorState
from ray.train.torch import TorchConfig, TorchTrainer
from safetensors.torch import load_file
from small_runs import GROUP, FinishedRun, act_in_training, redone, run_values

from emloc_ray.config.reading import parse_config
from emloc_ray.config.steps import VERBS
from emloc_ray.io.formats.teacher_shards import write_teacher_index
from emloc_ray.modeling.zero_config import read_zero_config
from emloc_ray.planning.prepared import prepare
from emloc_ray.stages.context import Context
from emloc_ray.stages.finetune.job import FinetuneJob
from emloc_ray.stages.finetune.stage import finetune_job
from emloc_ray.stages.finetune.training import train_loop
from emloc_ray.stages.heal.stage import healing_job
from emloc_ray.stages.heal.teacher import teach_part

pytestmark = pytest.mark.deep

EXAMPLE = Path(__file__).parents[2] / "configs" / "zero3.json"


def assert_same_adapter(made: Path, expected: Path, atol: float = 1e-4) -> None:
    """File by file and key by key; values to what the order of sums does to eight steps of Adam."""
    assert {path.name for path in made.iterdir()} == {path.name for path in expected.iterdir()}
    config = "adapter_config.json"
    assert (made / config).read_bytes() == (expected / config).read_bytes()
    ours, theirs = (load_file(directory / "adapter_model.safetensors") for directory in (made, expected))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def in_one_group(jobs: list[FinetuneJob], storage: Path) -> list[dict[str, Any]]:
    """Runs each job by the same two workers, which takes much longer to start than to train."""

    def train_all(settings: dict[str, Any]) -> list[dict[str, Any]]:
        outcomes = []
        for job in jobs:
            AcceleratorState._reset_state(reset_partial_state=True)  # as in a process of its own
            outcomes.append(train_loop({**settings, "job": job}))
        return outcomes

    trainer: Any = TorchTrainer(
        train_all,  # type: ignore[arg-type]
        train_loop_config={"threads": 1, "device": "cpu"},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(name="all", storage_path=str(storage)),
    )
    return trainer.fit().return_value


Trained = dict[str, tuple[FinetuneJob, dict[str, Any]]]


@pytest.fixture(scope="module")
def trained(
    llama_run: FinishedRun,
    healed_run: FinishedRun,
    pivoted_run: FinishedRun,
    family_run: Callable[[str], FinishedRun],
    tmp_path_factory: pytest.TempPathFactory,
) -> Trained:
    """Trainings and their outcomes by name and ZeRO stage, ``plain`` without DeepSpeed, all by one group."""
    root = tmp_path_factory.mktemp("zero")
    llama, pivoted, images = map(finetuning, (llama_run, pivoted_run, family_run("LLaVA")))
    images = dataclasses.replace(images, batch_size=1)
    healing = healing_of(healed_run, root / "teacher")
    lost = {**llama.training_arguments, "learning_rate": 1e30}
    jobs = {
        "images plain": images,
        "healing plain": healing,
        "llama 0": scattered(llama, 0, root),
        **{
            f"{name} 2": scattered(job, 2, root)
            for name, job in (("llama", llama), ("healing", healing), ("images", images))
        },
        **{f"{name} 3": scattered(job, 3, root) for name, job in (("healing", healing), ("images", images))},
        "pivoted 3": dataclasses.replace(pivoted, zero_config=read_zero_config(str(EXAMPLE))),
        "lost 2": dataclasses.replace(scattered(llama, 2, root), training_arguments=lost),
    }
    jobs = {
        name: dataclasses.replace(
            job,
            out_dir=root / name,
            storage_dir=root / "training",
            name=name.replace(" ", "-"),
            training_arguments={**job.training_arguments, "save_strategy": "no"},
        )
        for name, job in jobs.items()
    }
    outcomes = in_one_group(list(jobs.values()), root / "training")
    return {name: (job, outcome) for (name, job), outcome in zip(jobs.items(), outcomes, strict=True)}


def finetuning(run: FinishedRun) -> FinetuneJob:
    """A finished run's training by two ranks."""
    prepared = prepare(parse_config(run.changed(finetune=GROUP)))
    return finetune_job(Context(prepared, run.model_dir), "plain")


def healing_of(run: FinishedRun, teacher_dir: Path) -> FinetuneJob:
    """A finished run's healing by two ranks, with a teacher of its own."""
    prepared = prepare(parse_config(run.changed(finetune=GROUP)))
    section = prepared.config.emulator.healing
    assert section is not None
    job = healing_job(Context(prepared, run.model_dir), section, "plain")
    teacher = dataclasses.replace(job.teacher, out_dir=teacher_dir)
    teach_part(teacher, 0, 1)
    write_teacher_index(teacher.out_dir, [rows[0] for rows in teacher.shards()])
    return dataclasses.replace(job.training, teacher_dir=teacher.out_dir)


def scattered(job: FinetuneJob, stage: int, root: Path) -> FinetuneJob:
    """The same under a stage of ZeRO: nothing scattered, the optimizer's state and gradients (2), the weights too (3)."""
    path = root / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    return dataclasses.replace(job, zero_config=read_zero_config(str(path)))


@pytest.mark.parametrize("stage", [0, 2])
def test_whole_weights_train_the_same_adapter(trained: Trained, llama_run: FinishedRun, stage: int) -> None:
    job, outcome = trained[f"llama {stage}"]
    assert outcome["failure"] is None
    assert outcome["train_loss"] == pytest.approx(llama_run.metrics["finetune"]["train_loss"], rel=1e-4)
    assert_same_adapter(job.out_dir, llama_run.root / "adapter_emulator")


def test_it_stops_at_a_number_lost(trained: Trained) -> None:
    job, outcome = trained["lost 2"]
    assert outcome["failure"] == "The loss or a gradient is NaN or Inf at step 2: lower the learning rate."
    assert outcome["steps"] == 2
    assert not job.out_dir.exists()


def test_scattered_pivoted_factors_train_the_same_adapter(trained: Trained, pivoted_run: FinishedRun) -> None:
    job, outcome = trained["pivoted 3"]
    assert outcome["failure"] is None
    assert_same_adapter(job.out_dir, pivoted_run.root / "adapter_emulator")


@pytest.mark.parametrize("stage", ["plain", "2", "3"])
def test_it_heals_as_well(trained: Trained, healed_run: FinishedRun, stage: str) -> None:
    job, outcome = trained[f"healing {stage}"]
    assert outcome["failure"] is None
    assert outcome["train_loss"] == pytest.approx(healed_run.metrics["healing"]["train_loss"], rel=1e-3)
    assert_same_adapter(job.out_dir, trained["healing plain"][0].out_dir, 1e-3)


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_whose_batches_show_no_image(trained: Trained, stage: int) -> None:
    """A row in six shows none: such a rank runs the vision tower too, and what is learned is the same at every stage."""
    job, outcome = trained[f"images {stage}"]
    assert outcome["failure"] is None
    assert_same_adapter(job.out_dir, trained["images plain"][0].out_dir)


@pytest.fixture
def copied(llama_run: FinishedRun, tmp_path: Path) -> FinishedRun:
    """A finished run, trained without DeepSpeed, to spoil."""
    return llama_run.copy(tmp_path)


def test_zero_3_trains_the_same_adapter_and_goes_on_after_a_killed_worker(
    copied: FinishedRun, llama_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "zero3.json"
    path.write_text(EXAMPLE.read_text())
    values = copied.changed(finetune={**GROUP, "deepspeed": str(path), "save_steps": 1})
    act_in_training(monkeypatch, "finetune", 3, tmp_path / "killed")
    reporter = run_values(values, until="finetune")
    assert any(re.match("finetune: rank [01] .*; restarted from the last", note) for note in reporter.notes)
    metrics = json.loads((copied.root / "metrics.json").read_text())
    assert "tokens_per_second" not in metrics["finetune"]  # it went on from a checkpoint; it did not begin again
    assert reporter.skipped == ["data", "calibrate", "factorize"]
    assert_same_adapter(copied.root / "adapter_emulator", llama_run.root / "adapter_emulator")
    assert not (copied.root / "training").exists()
    # What counts is what the file says.
    path.write_text(json.dumps(json.loads(EXAMPLE.read_text())))
    assert redone(values)[0] == "correct"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert redone(values) == list(VERBS[VERBS.index("finetune") :])
