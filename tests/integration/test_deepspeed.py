"""Fine-tuning under DeepSpeed by two workers on CPUs: the adapter is the one that they make without it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
from accelerate.state import AcceleratorState
from ray.train.torch import TorchConfig, TorchTrainer
from safetensors.torch import load_file
from small_runs import FinishedRun, KillingWatcher, redone, run_values

from emloc_ray.config.reading import parse_config
from emloc_ray.config.steps import VERBS
from emloc_ray.modeling.zero_config import read_zero_config
from emloc_ray.planning.prepared import prepare
from emloc_ray.stages.context import Context
from emloc_ray.stages.finetune.job import FinetuneJob
from emloc_ray.stages.finetune.stage import finetune_job
from emloc_ray.stages.finetune.training import train_loop

pytestmark = pytest.mark.deep

EXAMPLE = Path(__file__).parents[2] / "configs" / "zero3.json"


@pytest.fixture
def copied(llama_run: FinishedRun, tmp_path: Path) -> FinishedRun:
    """A finished run, trained without DeepSpeed, to spoil."""
    return llama_run.copy(tmp_path)


def assert_same_adapter(made: Path, expected: Path) -> None:
    """File by file and key by key; values to what the order of sums does to eight steps of Adam."""
    assert {path.name for path in made.iterdir()} == {path.name for path in expected.iterdir()}
    config = "adapter_config.json"
    assert (made / config).read_bytes() == (expected / config).read_bytes()
    ours, theirs = (load_file(directory / "adapter_model.safetensors") for directory in (made, expected))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


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
    found: list[dict[str, Any]] = trainer.fit().return_value
    return found


def test_whole_weights_train_the_same_adapter_and_stop_at_a_number_lost(copied: FinishedRun, tmp_path: Path) -> None:
    # Stages 0, 1 and 2: nothing scattered, the optimizer's state, its gradients too.
    prepared = prepare(parse_config(copied.values))
    job = finetune_job(Context(prepared, copied.model_dir), "plain")
    jobs = []
    for stage, rate in ((0, 5e-3), (1, 5e-3), (2, 5e-3), (2, 1e30)):
        path = tmp_path / "zero.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        name = f"zero-{stage}-{rate}"
        arguments = {**job.training_arguments, "save_strategy": "no", "learning_rate": rate}
        changes: dict[str, Any] = {"out_dir": tmp_path / name, "name": name, "zero_config": read_zero_config(str(path))}
        jobs.append(dataclasses.replace(job, training_arguments=arguments, **changes))
    outcomes = in_one_group(jobs, tmp_path / "training")
    for outcome, made in zip(outcomes[:-1], jobs, strict=False):
        assert outcome["failure"] is None
        assert outcome["train_loss"] == pytest.approx(copied.metrics["finetune"]["train_loss"], rel=1e-4)
        assert_same_adapter(made.out_dir, copied.root / "adapter_emulator")
    assert outcomes[-1]["failure"] == "The loss or a gradient is NaN or Inf at step 2: lower the learning rate."
    assert outcomes[-1]["steps"] == 2
    assert not jobs[-1].out_dir.exists()


def test_zero_3_trains_the_same_adapter_and_goes_on_after_a_killed_worker(
    copied: FinishedRun, llama_run: FinishedRun, tmp_path: Path
) -> None:
    path = tmp_path / "zero3.json"
    path.write_text(EXAMPLE.read_text())
    # A checkpoint after every step: it also makes steps slow enough to be killed between two of them.
    values = copied.changed(finetune={"deepspeed": str(path), "save_steps": 1})
    with KillingWatcher(copied.root / "training", steps=3) as watcher:
        reporter = run_values(values, until="finetune")
    assert 3 <= max(watcher.logged_when_killed) < 8
    assert watcher.logged.count(1) == 1  # it went on from a checkpoint; it did not begin again
    assert reporter.skipped == ["data", "calibrate", "factorize"]
    assert_same_adapter(copied.root / "adapter_emulator", llama_run.root / "adapter_emulator")
    assert not (copied.root / "training").exists()
    # What counts is what the file says.
    path.write_text(json.dumps(json.loads(EXAMPLE.read_text())))
    assert redone(values)[0] == "correct"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert redone(values) == list(VERBS[VERBS.index("finetune") :])


def test_ranks_whose_batches_show_no_image(
    ray_session: None, family_run: Callable[[str], FinishedRun], tmp_path: Path
) -> None:
    """A row in six shows none: such a rank runs the vision tower too, and what is learned is the same at every stage."""
    run = family_run("LLaVA").copy(tmp_path)
    job = finetune_job(Context(prepare(parse_config(run.values)), run.model_dir), "plain")
    jobs = []
    for stage in (None, 1, 2, 3):
        path = tmp_path / "zero.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        zero = {} if stage is None else {"zero_config": read_zero_config(str(path))}
        arguments = {**job.training_arguments, "save_strategy": "no"}
        changes: dict[str, Any] = {
            "out_dir": tmp_path / f"zero-{stage}",
            "name": f"zero-{stage}",
            "batch_size": 1,
            **zero,
        }
        jobs.append(dataclasses.replace(job, training_arguments=arguments, **changes))
    outcomes = in_one_group(jobs, tmp_path / "training")
    assert [outcome["failure"] for outcome in outcomes] == [None] * 4
    for made in jobs[1:]:
        assert_same_adapter(made.out_dir, jobs[0].out_dir)
