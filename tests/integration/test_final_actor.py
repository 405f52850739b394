"""The final actor: it works without a CPU, is begun again where it is lost, and ends with its run."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from small_runs import FinishedRun, RecordingReporter, Stopping, run_values, worker_processes

from emloc_ray.errors import StageError, Stopped
from emloc_ray.io.runs.directory import CARD
from emloc_ray.stages.correct import correct as correcting
from emloc_ray.stages.merge import merge as merging
from emloc_ray.stages.ray import losses as failures
from emloc_ray.stages.ray.final_actor import FinalActorHandle, FinalActors, Step
from emloc_ray.stages.ray.losses import Losses, Tell
from emloc_ray.stages.ray.spans import Span, listening
from emloc_ray.stages.ray.tasks import Progress, Resources, bounded

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Losses, "delays", (0.0,))


def living() -> int:
    count = 0
    for process in worker_processes():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            count += "FinalActor" in process.name()
    return count


def none_is_left() -> bool:
    end = time.monotonic() + 20
    while living() and time.monotonic() < end:
        time.sleep(0.2)
    return not living()


def silent(done: int, total: int) -> None:
    """Shows nothing."""


def killed_once(step: Step, mark: Path, when: int) -> Step:
    """The step, whose actor kills its own process once so much is done."""

    def killed(job: Any, resources: Resources, progress: Progress, tell: Tell) -> dict[str, Any]:
        def kill(done: int, total: int) -> None:
            progress(done, total)
            if done >= when and not mark.exists():
                mark.write_text(f"{done} {total}")
                os.kill(os.getpid(), signal.SIGKILL)

        return step(job, resources, kill, tell)

    return killed


@pytest.mark.parametrize(
    "kills", [{"correct": 1, "merge": 1}, {"correct": 10}], ids=["modules and merge", "candidates"]
)
def test_a_run_outlives_its_final_actor(
    kills: dict[str, int], llama_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = llama_run.copy(tmp_path)
    for stage, when in kills.items():
        module: Any = {"correct": correcting, "merge": merging}[stage]
        monkeypatch.setattr(module, stage, killed_once(getattr(module, stage), tmp_path / stage, when))
    reporter = run_values(copied.values, begin="correct", until="merge")
    for stage, when in kills.items():
        done, total = map(int, (tmp_path / stage).read_text().split())
        assert when <= done < total
    told = [note for note in reporter.notes if "lost its worker" in note]
    assert [note.split(" because")[0] for note in told] == [
        f"{stage}: the final actor lost its worker" for stage in kills
    ]
    for folder in ("adapter", "merged"):
        for file in {*(llama_run.root / folder).iterdir()} - {
            llama_run.root / folder / CARD
        }:  # it says what was evaluated
            assert (copied.root / folder / file.name).read_bytes() == file.read_bytes(), file.name
    assert not (copied.root / "correction").exists()
    assert none_is_left()


def test_a_stopped_correction_goes_on_from_what_it_had(llama_run: FinishedRun, tmp_path: Path) -> None:
    copied = llama_run.copy(tmp_path)
    values = copied.changed(correction={"method": "auto", "dampening_frac": 1e-3})
    with pytest.raises(Stopped):
        run_values(values, Stopping("correct", 3), until="correct")
    assert none_is_left()
    kept = {path: path.stat().st_mtime_ns for path in (copied.root / "correction").glob("*.safetensors")}
    assert len(kept) >= 3
    seen: dict[Path, int] = {}

    class Watching(RecordingReporter):
        def start(self, stage: str) -> Callable[[int, int], None]:
            super().start(stage)
            return lambda done, total: seen.update({path: path.stat().st_mtime_ns for path in kept if path.exists()})

    run_values(values, Watching(), until="correct")
    assert seen == kept


def test_it_reports_while_tasks_take_every_cpu() -> None:
    def sleeping(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def fan_out(job: float, resources: Resources, progress: Progress, tell: Tell) -> dict[str, Any]:
        tell(f"begun with {ray.get_runtime_context().get_assigned_resources()}")
        task = resources.task(sleeping)
        work = [(f"piece {number}", lambda: task.remote(job)) for number in range(2)]
        return {"slept": bounded(work, resources.num_workers, Losses("merge", tell), progress)}

    all_there_is = Resources(1, ray.cluster_resources()["CPU"])
    notes: list[str] = []
    steps: list[tuple[int, int]] = []
    spans: list[Span] = []
    progress: Progress = lambda done, total: steps.append((done, total))  # noqa: E731
    with FinalActorHandle("a run") as actor, listening(spans.append):
        assert actor.work("merge", fan_out, 1.5, all_there_is, progress, notes.append) == {"slept": [1.5, 1.5]}
        assert actor.work("merge", fan_out, 0.0, all_there_is, progress, notes.append) == {"slept": [0.0, 0.0]}
        assert living() == 1
    assert (1, 2) in steps
    assert steps[-1] == (2, 2)
    assert notes == ["begun with {}"] * 2
    assert [span.unit for span in spans] == ["piece 0", "piece 1"] * 2
    assert none_is_left()


def test_the_runs_of_a_batch_hand_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    bounded_once = functools.partial(Losses, bound=1)  # an actor takes two seconds to start
    monkeypatch.setattr("emloc_ray.stages.ray.final_actor.Losses", bounded_once)

    def whose(job: bool, resources: Resources, progress: Progress, tell: Tell) -> dict[str, Any]:
        if job:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"process": os.getpid(), "name": ray.get_runtime_context().get_actor_name()}

    def fail(run: str) -> None:
        with FinalActorHandle(run, actors) as actor:
            actor.work("merge", whose, True, Resources(), silent, lambda text: None)

    def work(run: str, lost: bool = False) -> dict[str, Any]:
        with FinalActorHandle(run, actors) as actor:
            if lost:
                with pytest.raises(StageError, match="lost its worker 2 times"):
                    actor.work("merge", whose, True, Resources(), silent, lambda text: None)
            return dict(actor.work("merge", whose, False, Resources(), silent, lambda text: None))

    with FinalActors("a batch") as actors:
        first, second = work("a"), work("b")
        assert first == second
        assert first["name"].startswith("final actor of a batch, ")
        with FinalActorHandle("c", actors) as held:  # the one that there is
            held.work("merge", whose, False, Resources(), silent, lambda text: None)
            assert work("d", lost=True)["process"] != first["process"]
        assert living() == 2
        with pytest.raises(StageError):
            fail("e")
        assert len(actors.idle) == 1  # what a run that did not end well was at may be going on
        assert work("f")["name"].startswith("final actor of a batch, ")
    assert none_is_left()


def test_what_fails_in_it_is_said_in_its_own_words() -> None:
    def failing(job: str, resources: Resources, progress: Progress, tell: Tell) -> dict[str, Any]:
        tell("first")
        raise StageError(f"merge: {job} is full.")

    def imported(job: None, resources: Resources, progress: Progress, tell: Tell) -> dict[str, Any]:
        led = [module.__name__ for module in (correcting, merging)]
        return {"led": led, "heavy": sorted({"peft", "transformers.modeling_utils"} & sys.modules.keys())}

    def dying(job: None, resources: Resources, progress: Progress, tell: Tell) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    notes: list[str] = []
    with FinalActorHandle("a run") as actor:
        # What it leads it imports alone: the rest would keep each run for seconds.
        assert actor.work("correct", imported, None, Resources(), silent, notes.append)["heavy"] == []
        with pytest.raises(ray.exceptions.RayTaskError) as caught:
            actor.work("merge", failing, "the disk", Resources(), silent, notes.append)
        assert str(failures.explain(caught.value, "merge")) == "merge: the disk is full."
        assert notes == ["first"]
        with pytest.raises(StageError, match="merge: the final actor lost its worker 4 times"):
            actor.work("merge", dying, None, Resources(), silent, notes.append)
        assert len(notes) == 4
    assert none_is_left()


def test_a_run_needs_one_cpu(llama_run: FinishedRun, tmp_path: Path) -> None:
    """Each stage of one worker, which takes all there is: the actor holds none of it."""
    cpus = ray.cluster_resources()["CPU"]
    one = {"num_workers": 1, "cpus_per_worker": cpus}
    copied = llama_run.copy(tmp_path)
    values = copied.changed(evaluation=one, merge=one)
    run_values(values, begin="correct", until="merge")
    result = json.loads((copied.root / "manifest.json").read_text())["stages"]["merge"]["result"]
    assert result["num_workers"] == 1
