"""The paper's figure as code: import, calibrate, factorize, finetune, correct, merge, evaluate; each skipped where done."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emloc_ray.config import RunConfig, StageConfig
from emloc_ray.errors import DamagedArtifactError, EmlocError
from emloc_ray.io.atomic import remove_leftovers
from emloc_ray.io.fingerprint import fingerprint, fingerprint_large_files
from emloc_ray.io.grams import INDEX
from emloc_ray.io.node_cache import discard, exists, hashes
from emloc_ray.io.resume import discard_unless
from emloc_ray.memory import MemoryModel, total
from emloc_ray.planner import make_plan, row_lengths
from emloc_ray.preparation import Prepared, check_disk, prepare
from emloc_ray.report import write_report
from emloc_ray.reporter import Reporter, Reporters, SilentReporter
from emloc_ray.results import assemble_metrics
from emloc_ray.run_log import RunLog
from emloc_ray.stages import STAGES

if TYPE_CHECKING:
    from emloc_ray.stages.factorize import EmulatorBuild

# Settings that say where work runs, not what comes out of it.
_PLACEMENT = {"num_workers", "cpus_per_worker", "gpus_per_worker"}
# Of the fine-tuning's; its number of workers orders the rows.
_NOT_LEARNED = {"cpus_per_worker", "gpus_per_worker", "max_failures", "deepspeed", "report_to", "run_name"}


def run(
    config: RunConfig,
    *,
    begin: str | None = None,
    until: str = STAGES[-1],
    fresh: bool = False,
    reporter: Reporter | None = None,
    prepared: Prepared | None = None,
) -> dict[str, Any]:
    """Runs the pipeline up to ``until``; finished stages with unchanged inputs are skipped, unless from ``begin`` on.

    Returns metrics.json's content.

    Raises:
        ConfigError: before anything starts or is written.
        EmlocError: where a stage failed; finished stages stay, and the same call goes on from them.
    """
    from emloc_ray.stages.cluster import connection
    from emloc_ray.stages.gauges import StageGauges
    from emloc_ray.stages.visibility import check_visible

    prepared = prepared or prepare(config)
    check_disk(prepared.run, 0 if prepared.run.path("manifest.json").is_file() else make_plan(prepared).disk_bytes)
    prepared.run.lock()
    try:
        prepared.run.create(config.model_dump(mode="json"), fresh=fresh)
        lean = config.memory_budget is not None
        log = RunLog(prepared.run, [spec.name for spec in prepared.layout.specs])
        with log, connection(config.ray.address, lean_memory=lean, **config.ray.init_options):
            check_visible(prepared)
            told = Reporters(reporter or SilentReporter(), log, StageGauges(prepared.run.name))
            Pipeline(prepared, told, begin).run(until)
        return prepared.run.metrics()
    finally:
        prepared.run.unlock()


class Pipeline:
    """One run's stages over one run directory; needs a connection to Ray."""

    def __init__(self, prepared: Prepared, reporter: Reporter, begin: str | None = None) -> None:
        from emloc_ray.jobs import Jobs

        self.prepared, self.config, self.layout = prepared, prepared.config, prepared.layout
        self.directory, self.reporter = prepared.run, reporter
        self.forced = set(STAGES[STAGES.index(begin) :]) if begin else set()
        self.inputs: dict[str, str] = {}
        self._build: EmulatorBuild | None = None
        self._unread: list[str] = []  # stages of earlier runs whose files nobody has read yet
        imported = prepared.source.gguf_file is not None
        self.jobs = Jobs(prepared, self.directory.path("model") if imported else prepared.source.directory)
        self.model_options = self.jobs.model_options

    def run(self, until: str = STAGES[-1]) -> None:
        """Every stage up to ``until``, in order."""
        self._tell_budget()
        redone: set[str] = set()
        while True:
            try:
                self._run_stages(until)
                break
            except DamagedArtifactError as error:
                stage = self.directory.writer(error.path)
                if stage is None or error.path in redone:  # twice: its place alters what is written
                    raise
                redone.add(error.path)
                self.reporter.note(f"{error.path} is not as it was written: {stage} is done again.")
                self.directory.forget(stage)
                discard(self.directory.path(*error.path.split("/")))  # the rest of what the stage wrote may serve again
                self._build = None
        self._write_results()  # once more: a stage may have been committed by a run that was killed right after

    def _run_stages(self, until: str) -> None:
        self.import_model()
        self.prepare_data()
        for stage in STAGES[: STAGES.index(until) + 1]:
            getattr(self, stage)()

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

    def _tell_budget(self) -> None:
        """Which stages are planned to hold more than ``memory_budget``: it bounds calibration alone, and informs of the rest."""
        budget = self.config.memory_budget
        if budget is None:
            return
        memory = MemoryModel(self.prepared, row_lengths(self.prepared))
        above = [f"{name} {size / 2**30:.2f} GiB" for name in STAGES if (size := total(memory.stage(name))) > budget]
        if above:
            self.reporter.note(
                f"memory_budget is {budget / 2**30:.2f} GiB a worker, but the plan says {', '.join(above)}:"
                " see emloc-ray plan --memory-budget for settings that fit."
            )

    def _write_results(self) -> None:
        """metrics.json and report.html, anew from the manifest."""
        self.directory.write_metrics(assemble_metrics(self.directory, self.prepared, self.inputs))
        write_report(self.directory)

    def _step(
        self,
        name: str,
        inputs: dict[str, Any],
        outputs: Sequence[Path],
        execute: Callable[[Callable[[int, int], None]], dict[str, Any]],
        resumes: bool = False,
        recorded: Sequence[Path] | None = None,
    ) -> dict[str, Any]:
        """Runs a stage unless the manifest says that it was done with the same inputs; returns its result.

        What was left in ``outputs`` is removed first, unless a killed try left it and the stage ``resumes`` from that.
        The manifest names ``outputs``, or what is ``recorded`` of them.
        """
        from emloc_ray.stages.failures import explain
        from emloc_ray.stages.monitor import measured

        key = self.inputs[name] = fingerprint(inputs)
        entry = self.directory.stage(name)
        if entry is not None and self._is_done(name, inputs):
            self.reporter.skip(name)
            self._unread.append(name)
            found: dict[str, Any] = entry["result"]
            return found
        self._check_artifacts()
        if entry is not None:
            self.directory.forget(name)
            self._write_results()  # what was shown of it speaks of another run from now on
        for path in outputs if entry is not None or not resumes else ():
            discard(path)
        progress = self.reporter.start(name)
        try:
            with measured() as usage:
                result = execute(progress)
        except (Exception, SystemExit) as error:
            raise explain(error, name) from error
        for path in outputs:
            remove_leftovers(path)
        used = usage.as_dict()
        self.directory.commit(name, key, outputs if recorded is None else recorded, {**result, "usage": used})
        self._write_results()
        self.reporter.finish(name, result, used)
        return result

    def _is_done(self, name: str, inputs: dict[str, Any]) -> bool:
        """Whether the manifest says that a stage was done with these inputs, and it is not to be redone."""
        return name not in self.forced and self.directory.is_done(name, fingerprint(inputs))

    def import_model(self) -> None:
        """The original as a safetensors checkpoint: written once from a GGUF file, else where the config says."""
        source = self.prepared.source
        if source.hub_id is not None:
            from emloc_ray.modeling.loading import fetch_weights
            from emloc_ray.stages.visibility import check_visible

            self.reporter.note(f"The weights of {source.hub_id} are taken from the hub, where they are not cached yet.")
            self.jobs = dataclasses.replace(self.jobs, model_dir=fetch_weights(source))
            check_visible(self.prepared, self.jobs.model_dir)
        if source.gguf_file is None:
            self.inputs["import"] = fingerprint_large_files(sorted(self.jobs.model_dir.iterdir()))
            return
        inputs = {
            "file": fingerprint_large_files([source.directory / source.gguf_file]),
            "dtype": self.config.model.dtype,
        }

        def execute(progress: Callable[[int, int], None]) -> dict[str, Any]:
            import ray

            from emloc_ray.modeling.loading import import_gguf
            from emloc_ray.stages.cluster import Resources, bounded
            from emloc_ray.stages.failures import Losses

            task: Any = ray.remote(import_gguf).options(name="import: the model", **Resources().task_options())
            submit = functools.partial(task.remote, source, self.jobs.model_dir, self.config.model.dtype)
            bounded([("the model", submit)], 1, Losses("import", self.reporter.note))
            return {}

        self._step("import", inputs, [self.jobs.model_dir], execute)

    def prepare_data(self) -> None:
        """Rows, split, as token shards; the split's fingerprint is its content."""
        from emloc_ray.stages.data import split_inputs, tokenize_data

        tokens = self.directory.path("data", "tokens")
        inputs = {"model": self.inputs["import"], **split_inputs(self.prepared)}

        def execute(progress: Callable[[int, int], None]) -> dict[str, Any]:
            out_dir, tell = self.directory.path("data"), self.reporter.note
            return tokenize_data(self.prepared, self.jobs.model_dir, out_dir, progress, inputs, tell)

        counts = self._step("data", inputs, [tokens], execute, resumes=True)["splits"]
        for split, count in counts.items():
            self.inputs[f"data/{split}"] = fingerprint({file.name: sha for file, sha in hashes(tokens / split).items()})
            self._tell_counts(split, count)

    def _tell_counts(self, split: str, count: dict[str, int]) -> None:
        from emloc_ray.stages.data import shortfall

        if count["truncated_rows"]:
            self.reporter.note(
                f"data.{split}: {count['truncated_rows']} rows cut to {self.config.data.max_seq_length} tokens"
                f" ({count['truncated_tokens']} tokens left out), {count['dropped_rows']} dropped with no completion left."
            )
        missing = shortfall(self.config, split, count)
        if missing is not None:
            self.reporter.note(missing)

    def calibrate(self) -> None:
        """One Gram per shared input of the linears that compression targets; what they serve is factorized meanwhile."""
        if not self.layout.ranks:
            self.inputs["calibrate"] = "none needed"
            self.directory.forget("calibrate")
            discard(self.directory.path("calibration"))
            return
        from emloc_ray.jobs import resources
        from emloc_ray.stages.calibrate import calibrate
        from emloc_ray.stages.convergence import calibrate_until_converged

        section, out_dir = self.config.calibration, self.directory.path("calibration")
        inputs: dict[str, Any] = {
            "model": self.inputs["import"],
            "options": self.model_options,
            "data": self.inputs["data/calibration"],
            "tokens": section.tokens,
            "groups": self.jobs.gram_groups(),
        }
        tolerance = section.convergence_tolerance
        if tolerance is not None:
            inputs["convergence_tolerance"] = tolerance

        def execute(progress: Callable[[int, int], None]) -> dict[str, Any]:
            job = self.jobs.calibration()
            # What slots of a streamed run left speaks of their own shards alone.
            slots = section.num_workers if job.mode == "streamed" else None
            discard_unless(out_dir, {**inputs, "mode": job.mode, "waves": len(job.waves or ()), "slots": slots})
            asked, tell = resources(section), self.reporter.note
            if tolerance is not None:
                return calibrate_until_converged(job, out_dir, asked, tolerance, progress, tell)
            if self._is_done("factorize", self._factorize_inputs()):
                return calibrate(job, out_dir, asked, progress, tell=tell)
            build = self._emulator_build()

            def meanwhile(done: int, total: int) -> None:
                progress(done, total)
                build.pump()

            return calibrate(job, out_dir, asked, meanwhile, build.add, tell)

        self.inputs["calibrate"] = fingerprint(inputs)
        needed = section.keep == "grams" or not self._is_done("factorize", self._factorize_inputs())
        if needed and not exists(out_dir / INDEX):
            self.forced.add("calibrate")
        # Grams that are not kept go as they are used, so that the manifest cannot name them.
        recorded = [out_dir] if section.keep == "grams" else []
        self._step("calibrate", inputs, [out_dir], execute, resumes=True, recorded=recorded)

    def _factorize_inputs(self) -> dict[str, Any]:
        return {
            "calibrate": self.inputs["calibrate"],
            "model": self.inputs["import"],
            "ranks": self.layout.ranks,
            "dampening_frac": self.config.emulator.dampening_frac,
            "seed": self.config.seed,
        }

    def _emulator_build(self) -> EmulatorBuild:
        """Made once a run; what a killed run of the same inputs wrote is kept, what a finished one wrote is not."""
        if self._build is None:
            from emloc_ray.jobs import resources
            from emloc_ray.stages.factorize import EmulatorBuild

            out_dir = self.directory.path("emulator")
            if self.directory.stage("factorize") is not None:
                self.directory.forget("factorize")
                discard(out_dir)
            discard_unless(out_dir, self._factorize_inputs())
            drop = self.config.calibration.keep == "none"
            self._build = EmulatorBuild(
                self.jobs.factorization(), resources(self.config.emulator), drop, self.reporter.note
            )
        return self._build

    def factorize(self) -> None:
        """The emulator."""
        out_dir, calibration_dir = self.directory.path("emulator"), self.directory.path("calibration")

        def execute(progress: Callable[[int, int], None]) -> dict[str, Any]:
            return self._emulator_build().finish(calibration_dir, self.jobs.base_config(), progress)

        result = self._step("factorize", self._factorize_inputs(), [out_dir], execute, resumes=True)
        self._tell_thin_calibration(result)
        if self.config.calibration.keep == "none":
            discard(calibration_dir)

    def _tell_thin_calibration(self, result: dict[str, Any]) -> None:
        fewest, highest = result["fewest_tokens"], max(self.layout.ranks.values(), default=0)
        if fewest is not None and fewest < highest:
            section = self.config.calibration
            key = "num_calibration_samples" if section.num_calibration_tokens is None else "num_calibration_tokens"
            self.reporter.note(
                f"Calibration saw {fewest} tokens, fewer than the highest rank {highest}: raise calibration.{key}."
            )

    def finetune(self) -> None:
        """The adapter as trained on the emulator."""
        from emloc_ray.jobs import resources
        from emloc_ray.stages.finetune import finetune

        section = self.config.finetune
        inputs = {
            "factorize": self.inputs["factorize"],
            "data": self.inputs["data/train"],
            "options": self.model_options,
            "adapter": self.config.adapter.model_dump(mode="json"),
            "finetune": _without(section, _NOT_LEARNED),
            "steps": self.jobs.num_steps(),
            "seed": self.config.seed,
        }
        if self.prepared.zero_config is not None:
            inputs["deepspeed"] = self.prepared.zero_config

        def execute(progress: Callable[[int, int], None]) -> dict[str, Any]:
            job = self.jobs.finetuning(f"finetune-{fingerprint(inputs)}")
            result = finetune(job, resources(section), progress, self.reporter.note)
            discard(job.storage_dir)
            return result

        self._step("finetune", inputs, [self.directory.path("adapter_emulator")], execute)

    def correct(self) -> None:
        """The adapter as corrected for the original."""
        from emloc_ray.jobs import resources
        from emloc_ray.stages.correct import correct

        inputs = {
            "finetune": self.inputs["finetune"],
            "correction": self.config.correction.model_dump(mode="json"),
            "data": self.inputs["data/selection"],
        }

        def execute(progress: Callable[[int, int], None]) -> dict[str, Any]:
            return correct(self.jobs.correction(), resources(self.config.merge), progress, self.reporter.note)

        self._step("correct", inputs, [self.directory.path("adapter")], execute)

    def merge(self) -> None:
        """The original with the corrected adapter folded in."""
        from emloc_ray.jobs import resources
        from emloc_ray.stages.merge import merge

        out_dir, size = self.directory.path("merged"), self.config.merge.max_shard_size
        inputs = {"correct": self.inputs["correct"], **({} if size is None else {"max_shard_size": size})}

        def execute(progress: Callable[[int, int], None]) -> dict[str, Any]:
            discard_unless(out_dir, inputs)
            return merge(self.jobs.merging(), resources(self.config.merge), progress, self.reporter.note)

        self._step("merge", inputs, [out_dir], execute, resumes=True)

    def evaluate(self) -> None:
        """Every variant on the held-out rows."""
        from emloc_ray.jobs import resources
        from emloc_ray.stages.evaluate import evaluate

        section = self.config.evaluation
        inputs = {
            "merge": self.inputs["merge"],
            "data": self.inputs["data/eval"],
            "evaluation": _without(section, {*_PLACEMENT, "upper_bound"}),
        }

        def execute(progress: Callable[[int, int], None]) -> dict[str, Any]:
            return evaluate(self.jobs.evaluation(), resources(section), progress, self.reporter.note)

        self._step("evaluate", inputs, [], execute)


def _without(section: StageConfig, keys: set[str]) -> dict[str, Any]:
    return section.model_dump(mode="json", exclude=keys)


def describe_failure(error: EmlocError, place: str) -> str:
    """What a person is told when a stage failed."""
    return f"{error}\nWhat was finished stays in {place}; the same command goes on from there."
