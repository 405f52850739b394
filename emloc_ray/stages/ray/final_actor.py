"""The final actor: one Ray actor a run, which corrects the adapter and has it merged. In a batch a run hands it on.

It takes no CPU, and asks for no memory: what is heavy are tasks that it fans out, which ask for theirs. An actor that held
some while its tasks wait for more could wait for another run's, which waits for this one's, for ever. Its state is on disk: a
lost actor is started again and goes on.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import ray

from emloc_ray.stages.ray.losses import Losses, Tell
from emloc_ray.stages.ray.spans import Span, listening, tell_span
from emloc_ray.stages.ray.tasks import LOOK_S, Progress, Resources, set_threads
from emloc_ray.text import duration

T = TypeVar("T")
Step = Callable[[Any, Resources, Progress, Tell], dict[str, Any]]
_ANSWER_S, _SILENT_S = 30.0, 900.0  # for one report; and after which an actor that gave none is ended


@dataclass(frozen=True)
class Report:
    """The progress of the actor's step, and its messages since the last report."""

    done: int
    total: int
    notes: tuple[str, ...]
    spans: tuple[Span, ...]


class FinalActor:
    """Works off one step at a time, and says how far it is while it does."""

    def __init__(self) -> None:
        set_threads(1)
        self._position = (0, 1)
        self._notes: collections.deque[str] = collections.deque()
        self._spans: collections.deque[Span] = collections.deque()

    def work(self, step: Step, job: Any, resources: Resources) -> dict[str, Any]:
        """Runs ``step(job, resources, progress, tell)``, a stage's function that fans out tasks; returns its result."""
        self._position = (0, 1)
        with listening(self._spans.append):
            return step(job, resources, self._progress, self._notes.append)

    def _progress(self, done: int, total: int) -> None:
        self._position = (done, total)

    @ray.method(concurrency_group="progress", max_task_retries=-1)
    def report(self) -> Report:
        """Answered by a thread of its own; asked of a lost actor, once it is started again."""
        return Report(*self._position, _taken(self._notes), _taken(self._spans))


def _taken(held: collections.deque[T]) -> tuple[T, ...]:
    return tuple(held.popleft() for _ in range(len(held)))


class FinalActors:
    """The final actors of a batch that no run needs now. Starting one takes as long as a short run. They end with the block."""

    def __init__(self, batch: str) -> None:
        self.batch = batch
        self.idle: list[Any] = []

    def __enter__(self) -> FinalActors:
        return self

    def __exit__(self, *error: object) -> None:
        while self.idle:
            ray.kill(self.idle.pop())


class FinalActorHandle:
    """The final actor of one run: started when it is first needed, ended with the block, however that ends.

    One of ``actors`` is taken where there is any; where the block ends well, it is theirs.
    """

    def __init__(self, run: str, actors: FinalActors | None = None) -> None:
        whose = run if actors is None else actors.batch
        self.name = f"final actor of {whose}, {uuid.uuid4().hex[:8]}"  # a run's last actor may be about to end
        self.actors = actors
        self._actor: Any = None
        self._asked: Any = None  # the report that was asked for and not heard yet
        self._position, self._heard_at = (0, 1), time.monotonic()
        self._furthest = 0

    def __enter__(self) -> FinalActorHandle:
        return self

    def __exit__(self, kind: object, error: object, at: object) -> None:
        actor, self._actor = self._actor, None
        if actor is not None and self.actors is not None and error is None:
            self.actors.idle.append(actor)
        elif actor is not None:
            ray.kill(actor)  # its tasks end with it

    def work(self, stage: str, step: Step, job: Any, resources: Resources, progress: Progress, tell: Tell) -> Any:
        """Has the actor do a step, and passes on what it reports; does it again where the actor is lost. Raises StageError
        where the actor was lost more often than work may be."""
        if self._actor is None:
            idle = self.actors is not None and self.actors.idle
            self._actor = idle.pop() if idle else actor_kind().options(name=self.name).remote()
        self._furthest = 0
        losses = Losses(stage, tell, reached=lambda: self._furthest)
        while True:
            answer, self._heard_at = self._actor.work.remote(step, job, resources), time.monotonic()
            try:
                while not ray.wait([answer], timeout=LOOK_S)[0]:
                    self._pass_on(progress, tell)
                # Where it was lost this waits for the next, which a step given too early would count as lost once more.
                with contextlib.suppress(ray.exceptions.RayError):
                    self._pass_on(progress, tell, _SILENT_S)
                return ray.get(answer)
            except ray.exceptions.RayError as error:
                time.sleep(losses.record_lost_worker("the final actor", error))

    def _pass_on(self, progress: Progress, tell: Tell, patience_s: float = _ANSWER_S) -> None:
        self._asked = self._asked or self._actor.report.remote()
        if not ray.wait([self._asked], timeout=patience_s)[0]:
            progress(*self._position)  # raises where the run is to stop
            if time.monotonic() - self._heard_at > _SILENT_S:
                tell(f"The final actor has not answered for {duration(_SILENT_S)}: it is restarted.")
                ray.kill(self._actor, no_restart=False)
                self._heard_at = time.monotonic()
            return
        asked, self._asked = self._asked, None
        report = ray.get(asked)
        self._position, self._heard_at = (report.done, report.total), time.monotonic()
        self._furthest = max(self._furthest, report.done)
        for span in report.spans:
            tell_span(span)
        for note in report.notes:
            tell(note)
        progress(report.done, report.total)


@functools.cache
def actor_kind() -> Any:
    """The final actor as Ray takes it, made once."""
    options: dict[str, Any] = {
        "num_cpus": 0,
        "max_restarts": -1,  # whoever hands on an actor that was lost hands on a living one
        "max_task_retries": 0,  # a step that lost it is begun again by its handle, which says so and bounds that
        "concurrency_groups": {"progress": 1},
    }
    return ray.remote(**options)(FinalActor)
