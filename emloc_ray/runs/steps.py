"""Stages as steps of a run: each is skipped where the manifest says that it was done, taken from the cache where another
run did it, else run in its turn and recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emloc_ray.config.base import StageConfig
from emloc_ray.config.steps import GROUPS, STEPS, SUMS
from emloc_ray.errors import DamagedArtifactError, EmlocError, Stopped
from emloc_ray.io.runs.cache import ArtifactCache, EntryGone
from emloc_ray.io.runs.fingerprint import fingerprint
from emloc_ray.io.store.atomic import remove_leftovers
from emloc_ray.io.store.node_cache import discard
from emloc_ray.planning.plan import planned_memory
from emloc_ray.planning.prepared import Prepared
from emloc_ray.runs.reporter import Reporter
from emloc_ray.runs.results import assemble_metrics
from emloc_ray.runs.turns import Turns

if TYPE_CHECKING:
    from emloc_ray.stages.ray.tasks import Resources

Inputs = dict[str, Any]
# Settings of the fine-tuning that do not enter what comes out of it; its number of workers does, which orders the rows.
NOT_LEARNED = frozenset({"cpus_per_worker", "gpus_per_worker", "max_failures", "deepspeed", "report_to", "run_name"})
Execute = Callable[[Callable[[int, int], None], "Resources"], dict[str, Any]]


class Dropped(EmlocError):
    """A stage is to read files that were dropped: the stages before it are gone through again."""


class Steps:
    """The steps of one run; ``inputs`` holds the fingerprint of what each was done with, by stage."""

    def __init__(
        self,
        prepared: Prepared,
        reporter: Reporter,
        turns: Turns,
        cache: ArtifactCache | None = None,
        forced: Sequence[str] = (),
    ) -> None:
        """``forced``: stages to be done again, whatever the manifest says."""
        self.prepared, self.directory, self.reporter = prepared, prepared.run, reporter
        self.turns, self.cache, self.forced = turns, cache, set(forced)
        self.planned = planned_memory(prepared)
        self.inputs: dict[str, str] = {}
        self._unread: list[str] = []  # stages of earlier runs whose files nobody has read yet
        self._redone: set[str] = set()

    def run(
        self,
        name: str,
        inputs: Inputs,
        outputs: Sequence[Path],
        execute: Execute,
        asked: Resources,
        *,
        resumes: bool = False,
        read: Sequence[str] = (),
        shared: Inputs | None = None,
    ) -> dict[str, Any]:
        """Runs a stage unless the manifest says that it was done with the same inputs; returns its result.

        What was left in ``outputs`` is removed first, unless a killed try left it and the stage ``resumes`` from that.
        With ``shared`` it may come from the cache, and goes there, under the inputs and this: what else tells it from what
        others make. ``read`` are the stages whose sums it reads.

        Raises:
            Dropped: where these were not kept; they are out of the manifest then.
        """
        key = self.inputs[name] = fingerprint(inputs)
        entry = self.directory.stage(name)
        if entry is not None and self.is_done(name, inputs):
            self.reporter.skip(name)
            self.directory.confirm(name, ahead=STEPS[: STEPS.index(name)])
            self._unread.append(name)
            found: dict[str, Any] = entry["result"]
            return found
        self._check_artifacts()
        self.directory.check_held()  # before files are removed, or written over: they may be another's by now
        if entry is not None:
            for path in outputs:  # first: what a kill in between left would be gone on from, once it is forgotten
                discard(path)
            self.directory.forget(name)
            self.write_results()  # what was shown of it speaks of another run from now on
        cached = None if shared is None or self.cache is None else {**inputs, "shared": shared}
        with self._alone(name, cached):
            if cached and (result := self._from_cache(name, cached, outputs)) is not None:
                return result
            self._check_read(name, read)
            for path in outputs if not resumes else ():
                discard(path)
            with self.turns.take(name, asked) as granted:
                result = self._execute(name, execute, granted)
            used = result["usage"]
            for path in outputs:
                remove_leftovers(path)
            self.directory.commit(name, key, outputs, result)
            self.forced.discard(name)
            self.write_results()
            self.reporter.finish(name, result, used)
            if cached:
                self._to_cache(name, cached, result)
        return result

    def _execute(self, name: str, execute: Execute, granted: Resources) -> dict[str, Any]:
        from emloc_ray.stages.ray.losses import explain
        from emloc_ray.stages.ray.tasks import shortage
        from emloc_ray.stages.ray.usage import measured

        missing = shortage(name, granted, together=name in GROUPS)
        if missing is not None:
            self.reporter.note(missing)
        told = self.reporter.start(name)

        def progress(done: int, total: int) -> None:
            self.directory.check_held()
            if self.turns.stopped():
                raise Stopped(f"{name} was stopped at {done} of {total}.")
            told(done, total)

        try:
            with measured(name) as usage:
                result = execute(progress, granted)
        except Exception as error:
            raise explain(error, name) from error
        return {**result, "usage": usage.as_dict()}

    @contextlib.contextmanager
    def _alone(self, name: str, inputs: Inputs | None) -> Iterator[None]:
        """Where others may be about to make the same, the first makes it and they wait for that."""
        if self.cache is None or inputs is None:
            yield
            return
        with self.cache.alone(_key(name, inputs), self.turns.stopped):
            yield

    def _from_cache(self, name: str, inputs: Inputs, outputs: Sequence[Path]) -> dict[str, Any] | None:
        """``inputs`` with what else is ``shared``."""
        if self.cache is None or name in self.forced:
            return None
        entry = self.cache.find(name, _key(name, inputs), verify=True)
        if entry is None:
            return None
        from emloc_ray.stages.ray.usage import measured

        told = self.reporter.start(name)
        with measured(name) as usage:
            for path in outputs:
                discard(path)
            try:
                self.cache.link(entry, self.directory.root)
            except EntryGone:
                return None
        told(1, 1)
        result = {**entry.result, "taken_from": entry.origin, "usage": usage.as_dict()}
        self.directory.commit(name, self.inputs[name], outputs, result)
        self.write_results()
        self.reporter.finish(name, result, result["usage"])
        return result

    def _to_cache(self, name: str, inputs: Inputs, result: dict[str, Any]) -> None:
        entry = self.directory.stage(name)
        if self.cache is None or entry is None:
            return
        plain = {key: value for key, value in result.items() if key != "usage"}
        why_not = self.cache.add(
            name,
            _key(name, inputs),
            self.directory.root,
            entry["outputs"],
            plain,
            inputs,
        )
        if why_not is not None:
            self.reporter.note(f"{name}: what it made is not shared with other tasks: {why_not}")

    def leave_out(self, name: str, key: str, output: Path) -> None:
        """For a stage that the config has no use of: what an earlier one left is gone, later stages build on ``key``."""
        self.inputs[name] = key
        self.directory.forget(name)
        discard(output)

    def is_done(self, name: str, inputs: Inputs) -> bool:
        """Whether the manifest says that a stage was done with these inputs, and it is not to be redone."""
        return name not in self.forced and self.directory.is_done(name, fingerprint(inputs))

    def _check_read(self, name: str, read: Sequence[str]) -> None:
        """Takes the stages out of the manifest whose files were dropped and are to be ``read`` again.

        Raises:
            Dropped: where there are some.
        """
        gone = [stage for stage in read if self.directory.is_dropped(stage)]
        for stage in gone:
            self.directory.drop(stage)  # what a kill left of its files is not to be gone on from
            self.directory.forget(stage)
        if gone:
            raise Dropped(f"{name} reads what {' and '.join(gone)} made, which was not kept: it is made again.")

    def _check_artifacts(self) -> None:
        """Reads once, before the first stage that is to run, what earlier runs finished.

        Raises:
            DamagedArtifactError: where a stage has files whose content is not what the manifest says; all are gone then.
        """
        while self._unread:
            name = self._unread.pop(0)
            damaged = self.directory.damaged(name)
            for file in damaged:
                discard(file)
            for file in damaged[:1]:
                path = file.relative_to(self.directory.root).as_posix()
                raise DamagedArtifactError(f"{file} is not as {name} wrote it: run the same command again.", path)

    def forget_damaged(self, error: DamagedArtifactError) -> None:
        """Takes the stage that wrote a damaged file out of the manifest, so that it is done again.

        Raises:
            DamagedArtifactError: ``error`` itself, where no stage wrote it, or it was done again already.
        """
        stage = self.directory.writer(error.path)
        if stage is None or error.path in self._redone:  # twice: its place alters what is written
            raise error
        self._redone.add(error.path)
        self.reporter.note(f"{error.path} is not as it was written: {stage} is done again.")
        self.directory.forget(stage)
        # The rest of what the stage wrote may serve again; but sums that have an index are taken for whole.
        folder, *_ = error.path.split("/")
        discard(self.directory.path(folder) if stage in SUMS else self.directory.path(*error.path.split("/")))

    def write_results(self) -> None:
        """Writes metrics.json anew from the manifest, and says so."""
        self.directory.write_metrics(assemble_metrics(self.directory, self.prepared, self.planned))
        self.reporter.changed(self.directory)


def _key(name: str, inputs: Inputs) -> str:
    """In the cache, which outlives the installed version: another may make something else of the same inputs."""
    return ArtifactCache.key(name, [version("emloc-ray"), inputs])


def without(section: StageConfig, keys: Collection[str]) -> Inputs:
    """A section's settings as inputs of a stage, but for some."""
    return section.model_dump(mode="json", exclude=set(keys))
