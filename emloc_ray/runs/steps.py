"""The steps of one run: each is skipped where the manifest has it, linked from the cache where another run did it, else run in
its turn and recorded."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from emloc_ray.config.steps import STEP_NAMES
from emloc_ray.errors import ArtifactError, DamagedArtifactError, EmlocError, Stopped
from emloc_ray.io.runs.cache import ArtifactCache, Entry, EntryGone
from emloc_ray.io.runs.fingerprint import fingerprint
from emloc_ray.io.store.atomic import remove_leftovers
from emloc_ray.io.store.node_cache import discard
from emloc_ray.planning.plan import Plan
from emloc_ray.planning.prepared import Prepared
from emloc_ray.runs.reporter import Reporter
from emloc_ray.runs.results import assemble_metrics
from emloc_ray.runs.turns import Turns
from emloc_ray.runs.versions import check_versions, is_begun_by_others, is_foreign, made_with
from emloc_ray.stages.context import Context, Inputs, Result
from emloc_ray.stages.ray.losses import explain
from emloc_ray.stages.ray.nodes import autoscaler_nodes, has_unknown_autoscaler, live_nodes, memory_to_ask, shortage
from emloc_ray.stages.ray.session import hardware
from emloc_ray.stages.ray.tasks import Resources
from emloc_ray.stages.ray.usage import measured
from emloc_ray.stages.stage import Stage
from emloc_ray.text import listed, version_changes

_NOTE_S = 60.0  # between two notes of how long a stage has run: what a kill loses at most
_MAX_LINKS = 2  # tries to link an entry, which may go at any time


class Dropped(EmlocError):
    """A stage needs files that were deleted: the run goes through the stages before it again."""


class Steps:
    """Runs stages over one run directory; redoes those in ``forced``, whatever the manifest says."""

    def __init__(
        self,
        prepared: Prepared,
        reporter: Reporter,
        turns: Turns,
        cache: ArtifactCache | None = None,
        forced: Collection[str] = (),
        plan: Plan | None = None,
        accept_versions: bool = False,
    ) -> None:
        """``plan``: what workers are planned to hold, for metrics.json, and of their node's memory for Ray;
        ``accept_versions``: whether finished stages that were made with others are taken as they are."""
        self.prepared, self.directory, self.reporter = prepared, prepared.run, reporter
        self.turns, self.cache, self.forced = turns, cache, set(forced)
        self.planned = plan.worker_bytes if plan is not None else {}
        self._host_bytes = plan.host_bytes if plan is not None else {}
        self._gpu_bytes = plan.gpu_bytes if plan is not None else {}
        self._seconds = {part.name: part.seconds for part in plan.stages} if plan is not None else {}
        self._trusts = prepared.config.model.trust_remote_code
        self._checked: dict[str, bool] = {}  # of finished stages, whether their files were
        self._redone: dict[str, str] = {}  # damaged files: the stages that wrote them
        self.accept_versions = accept_versions
        self._mixed = False  # whether a stage of other versions was taken: others must not share what follows from it
        self._outdated: str | None = None  # the first finished stage with other inputs now

    def run(self, stage: Stage, context: Context) -> None:
        """Brings one stage up to date; puts the fingerprint of its inputs and its result into ``context``. Removes what it left
        that the config leaves out now. Raises Dropped where it needs deleted files, with the stages that make them out of the
        manifest."""
        if not stage.wanted(self.prepared):
            self._leave_out(stage)
            return
        inputs = stage.inputs(context)
        context.made[stage.name] = key = fingerprint(inputs)
        result = self._done_before(stage, key)
        if result is None:
            result = self.make(stage, context, inputs)
        context.results[stage.name] = result
        self._note(*stage.remarks(context, result))
        for path in stage.scratch:  # not before the stage is recorded
            discard(self.directory.path(path))
        for dropped in stage.drops(context):
            self.directory.drop(dropped)

    def _leave_out(self, stage: Stage) -> None:
        self.directory.forget(stage.name)
        for path in self._outputs(stage, *stage.scratch):
            discard(path)

    def _done_before(self, stage: Stage, key: str) -> Result | None:
        entry = self.directory.stage(stage.name)
        if entry is None or stage.name in self.forced:
            return None
        if not self.directory.is_done(stage.name, key):
            if self._outdated is None and entry["inputs"] != key:
                self._outdated = stage.name
                self._note(
                    f"{stage.name} and what follows from it are redone: the config, the files or the version of emloc_ray"
                    " have changed since."
                )
            return None
        self._check_versions(stage, entry)
        self.reporter.skip(stage.name)
        self.directory.confirm(stage.name, ahead=STEP_NAMES[: STEP_NAMES.index(stage.name)])
        self._checked.setdefault(stage.name, False)
        return entry["result"]

    def _check_versions(self, stage: Stage, entry: Mapping[str, Any]) -> None:
        """Raises ConfigError where a stage that stands was made with other versions, unless these are accepted: notes that."""
        now = made_with(stage)
        if is_foreign(entry, stage):
            check_versions(self.prepared, self.forced, stage.verb, self.accept_versions)
            self.directory.accept(stage.name, now)
            if not self._mixed:
                self._note(
                    f"{stage.name} was made with {version_changes(entry.get('versions'), now)}: it and what stands after it are"
                    " taken as they are."
                )
        self._mixed |= entry.get("versions") != now

    def make(self, stage: Stage, context: Context, inputs: Inputs) -> Result:
        """The stage's result, from the cache or by its own work; records it."""
        self.reporter.wait(stage.name)
        self._check_artifacts()
        self.directory.check_held()  # before files are removed or overwritten: another process may own them now
        entry = self.directory.stage(stage.name)
        if entry is not None:
            self._clear(stage, entry, is_same=entry["inputs"] == context.made[stage.name])
            self.write_results()  # its old numbers are no longer this run's
        shared = self._shared_inputs(stage, context, inputs)
        return self._work(stage, context, inputs) if shared is None else self._share(stage, context, inputs, shared)

    def _shared_inputs(self, stage: Stage, context: Context, inputs: Inputs) -> Inputs | None:
        """What the stage's key in the cache is made of; None where it is not shared."""
        gives = self.cache is not None and (self.cache.knows_owners or not self._trusts) and not self._mixed
        if not gives or stage.is_shared is None or not stage.is_shared(context):
            return None
        # Another user's entries must not stand in for this one's.
        return {**inputs, "user": os.geteuid()} if self._trusts else inputs

    def _share(self, stage: Stage, context: Context, inputs: Inputs, shared: Inputs, links: int = _MAX_LINKS) -> Result:
        """The first of the runs that are about to make the same makes it. The others link it once they have given the turn on,
        for a store copies all of it; one that fails at that ``links`` times makes it too."""
        assert self.cache is not None
        key = cache_key(stage, shared)
        self.reporter.wait(stage.name, "another")
        alone = self.cache.alone(key, self.turns.stopped, lambda text: self._note(f"{stage.name}: {text}"))
        with self.turns.first(stage.name, context.made[stage.name]), alone:
            self.reporter.wait(stage.name)
            entry = self._find(stage, key) if links else None
            if entry is None:
                with self.cache.making(key, self.directory.name):
                    result = self._work(stage, context, inputs)
                self._to_cache(stage, key, shared, result)
                return result
        linked = self._link(stage, context, entry)
        return self._share(stage, context, inputs, shared, links - 1) if linked is None else linked

    def _work(self, stage: Stage, context: Context, inputs: Inputs) -> Result:
        """The stage's result by its own work, which goes on from what an earlier try left."""
        self._check_read(stage, context)
        anew = stage.name in self.forced and self.directory.begun().get(stage.name) != made_with(stage)
        if anew or not stage.resumes:
            for path in self._outputs(stage, *(stage.scratch if anew else ())):
                discard(path)
        goes_on = not anew and (stage.resumes or bool(stage.scratch))
        spent = self.directory.spent(stage.name, context.made[stage.name]) if goes_on else 0.0
        asked = resources_of(stage, self.prepared)
        with self.turns.take(stage.name, asked, 1 if stage.divisible else asked.num_workers) as granted:
            context.check_original()  # after the wait for its turn
            self._begin(stage, context.made[stage.name], spent)
            result = self._execute(stage, context, inputs, granted, spent)
        for path in self._outputs(stage):
            remove_leftovers(path)
        self._record(stage, context, result)
        return result

    def _clear(self, stage: Stage, entry: Mapping[str, Any], is_same: bool) -> None:
        """Removes what a finished stage wrote and takes it out of the manifest, before it is made again; where its inputs are the
        same, and it goes on from what is whole, no other files than those that are not."""
        stale = self._outputs(stage)
        if is_same and stage.name not in self.forced:
            lost = sorted({*self.directory.altered(entry), *self.directory.damaged(stage.name)})
            names = [file.relative_to(self.directory.root).as_posix() for file in lost]
            self._note(f"{stage.name} makes again what is missing or altered: {listed(names)}.")
            stale = lost if stage.resumes else stale
        for path in stale:  # first: once the stage is forgotten, a later try goes on from what is there
            discard(path)
        self.directory.forget(stage.name)

    def _begin(self, stage: Stage, key: str, spent: float) -> None:
        now, begun = made_with(stage), self.directory.begun()
        if stage.name not in self.forced and is_begun_by_others(stage, begun):  # and accepted: see check_versions
            self._note(f"{stage.name} continues what was begun with {version_changes(begun[stage.name], now)}.")
        self.directory.begin(stage.name, now, key, spent)

    def _execute(
        self, stage: Stage, context: Context, inputs: Inputs, granted: Resources, spent_before: float
    ) -> Result:
        """What the stage gives, and what it used; ``wall_s`` counts the seconds of all its tries."""
        together = stage.workers(self.prepared.config).together
        self._note(shortage(stage.name, granted, together))
        planned = self._host_bytes.get(stage.name, 0)
        memory, remark = 0, None
        if planned:
            nodes, addable, grows = live_nodes(), autoscaler_nodes(), has_unknown_autoscaler()
            memory, remark = memory_to_ask(stage.name, planned, granted, together, nodes, addable, grows)
        self._note(remark)
        seconds = self._seconds.get(stage.name, 0.0)
        granted = dataclasses.replace(granted, memory_per_worker=memory, planned_s=seconds)
        report = self.reporter.start(stage.name)
        begun_at = noted_at = time.monotonic()

        def spent() -> float:
            return round(spent_before + time.monotonic() - begun_at, 2)

        def note_spent() -> None:
            with contextlib.suppress(EmlocError, OSError):  # what fails for long ends the run elsewhere
                self.directory.begin(stage.name, made_with(stage), context.made[stage.name], spent())

        def progress(done: int, total: int) -> None:
            nonlocal noted_at
            if self.turns.stopped():  # asked first, for a store may not answer for long
                raise Stopped(f"{stage.name} was stopped at {done} of {total}.")
            with contextlib.suppress(ArtifactError):  # where a store does not answer, writers wait or fail
                self.directory.check_held()
            report(done, total)
            if time.monotonic() >= noted_at + _NOTE_S:
                noted_at = time.monotonic()
                note_spent()

        try:
            with measured(stage.name) as usage:
                result = stage.run(context, inputs, granted, progress)
        except BaseException as error:
            note_spent()
            if isinstance(error, Exception):
                raise explain(error, stage.name) from error
            raise
        return {**result, "usage": {**usage.as_dict(), "wall_s": spent()}}

    def _record(self, stage: Stage, context: Context, result: Result, known: Mapping[Path, str] | None = None) -> None:
        made = context.made[stage.name]
        self.directory.commit(stage.name, made, self._outputs(stage), result, made_with(stage), known)
        self.forced.discard(stage.name)
        self.write_results()
        self.reporter.finish(stage.name, result, result["usage"])

    def _find(self, stage: Stage, key: str) -> Entry | None:
        if self.cache is None or stage.name in self.forced:
            return None
        doubted = stage.name in self._redone.values()  # what was damaged may have come from there
        return self.cache.find(
            stage.name, key, True, stage.outputs, doubted, own_only=self._trusts, stopped=self.turns.stopped
        )

    def _link(self, stage: Stage, context: Context, entry: Entry) -> Result | None:
        assert self.cache is not None
        with self.cache.linking(self.turns.stopped):
            report = self.reporter.start(stage.name)
            with measured(stage.name) as usage:
                for path in self._outputs(stage):
                    discard(path)
                try:
                    self.cache.link(entry, self.directory.root, self.turns.stopped)
                except EntryGone:
                    return None
        report(1, 1)
        result = {**entry.result, "taken_from": entry.origin, "usage": usage.as_dict()}
        known = {self.directory.path(path): content["sha256"] for path, content in entry.files.items()}
        self._record(stage, context, result, known)
        return result

    def _to_cache(self, stage: Stage, key: str, inputs: Inputs, result: Result) -> None:
        name, entry = stage.name, self.directory.stage(stage.name)
        if self.cache is None or entry is None:
            return
        plain = {part: value for part, value in result.items() if part != "usage"}
        why_not = self.cache.add(name, key, self.directory.root, entry["outputs"], plain, inputs)
        if why_not is not None:
            self._note(f"{name}: other tasks cannot share its result: {why_not}")

    def _check_read(self, stage: Stage, context: Context) -> None:
        """Takes stages out of the manifest whose deleted files are needed again; raises Dropped where there are any."""
        gone = [name for name in stage.reads(context) if self.directory.is_dropped(name)]
        for name in gone:
            self.directory.drop(name)  # a later try must not continue from what a kill left
            self.directory.forget(name)
        if gone:
            raise Dropped(
                f"{stage.name} needs the result of {' and '.join(gone)}, which was deleted: it is made again."
            )

    def _check_artifacts(self) -> None:
        """Checks the files of finished stages once, before the first stage runs. Raises DamagedArtifactError where the content
        of a stage's files differs from the manifest; removes these files."""
        for name in [name for name, is_checked in self._checked.items() if not is_checked]:
            damaged = self.directory.damaged(name, self.turns.stopped)
            self._checked[name] = not damaged
            for file in damaged:
                discard(file)
            for file in damaged[:1]:
                path = file.relative_to(self.directory.root).as_posix()
                raise DamagedArtifactError(
                    f"{file} has changed since {name} wrote it: run the same command again.", path
                )

    def forget_damaged(self, error: DamagedArtifactError) -> None:
        """Takes the stage that wrote a damaged file out of the manifest, so that it is redone. Raises ``error`` itself, where
        no stage wrote the file, or it was redone before."""
        name = self.directory.writer(error.path)
        if name is None or error.path in self._redone:  # damaged twice: the disk alters what is written
            raise error
        self._redone[error.path] = name
        self._note(f"{error.path} is damaged: {name} is redone.")
        discard(self.directory.path(*error.path.split("/")))  # first: a later try takes what is there for whole
        self.directory.forget(name)

    def write_results(self) -> None:
        """Writes metrics.json from the manifest, and tells the reporter."""
        seen = hardware() or self.directory.metrics().get("hardware")  # without Ray what it was when a stage ran
        metrics = assemble_metrics(self.directory, self.prepared, self.planned, seen, self._gpu_bytes)
        self.directory.write_metrics(metrics)
        self.reporter.changed(self.directory)

    def _outputs(self, stage: Stage, *more: str) -> list[Path]:
        return [self.directory.path(*path.split("/")) for path in (*stage.outputs, *more)]

    def _note(self, *remarks: str | None) -> None:
        for remark in filter(None, remarks):
            self.reporter.note(remark)


def resources_of(stage: Stage, prepared: Prepared) -> Resources:
    """The workers that a stage asks of Ray."""
    section = stage.asked(prepared)
    return Resources(section.num_workers, section.cpus_per_worker, section.gpus)


def cache_key(stage: Stage, inputs: Inputs) -> str:
    """The key in the cache, which outlives what is installed: another version may make something else of the same inputs."""
    return ArtifactCache.key(stage.name, [made_with(stage), inputs])
