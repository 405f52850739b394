"""The paper's figure as code: import, calibrate, factorize, heal, finetune, correct, merge, evaluate; each skipped where done."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from emloc_ray.config.schema import RunConfig
from emloc_ray.config.steps import STAGES, STEPS, SUMS
from emloc_ray.errors import DamagedArtifactError
from emloc_ray.io.runs.cache import ArtifactCache
from emloc_ray.io.runs.fingerprint import fingerprint, fingerprint_large_files
from emloc_ray.io.runs.resume import discard_unless
from emloc_ray.io.store.node_cache import discard, hashes
from emloc_ray.planning.budget import check_gradients
from emloc_ray.planning.plan import missing_disk, needed_steps, row_lengths
from emloc_ray.planning.prepared import Prepared, check_disk, check_resources, prepare
from emloc_ray.runs import remarks
from emloc_ray.runs.inputs import RankSteps
from emloc_ray.runs.log import RunLog
from emloc_ray.runs.reporter import Reporter, Reporters, SilentReporter
from emloc_ray.runs.steps import NOT_LEARNED, Dropped, Steps, without
from emloc_ray.runs.trace import Trace
from emloc_ray.runs.turns import AtOnce, Turns

if TYPE_CHECKING:
    from emloc_ray.stages.ray.tasks import Progress, Resources

# Settings that say where work runs, not what comes out of it.
_PLACEMENT = {"num_workers", "cpus_per_worker", "gpus_per_worker"}


def run(
    config: RunConfig,
    *,
    begin: str | None = None,
    until: str = STAGES[-1],
    fresh: bool = False,
    reporter: Reporter | None = None,
    prepared: Prepared | None = None,
    turns: Turns | None = None,
    cache: ArtifactCache | None = None,
) -> dict[str, Any]:
    """Runs the pipeline up to ``until``; finished stages with unchanged inputs are skipped, unless from ``begin`` on.

    ``turns`` says when each stage may start, at once by default; through ``cache`` runs share what they would make alike.
    Returns metrics.json's content.

    Raises:
        ConfigError: before any stage starts or anything is written.
        EmlocError: where a stage failed; finished stages stay, and the same call goes on from them.
    """
    from emloc_ray.stages.ray.gauges import StageGauges
    from emloc_ray.stages.ray.losses import explain
    from emloc_ray.stages.ray.session import check_visible
    from emloc_ray.stages.ray.tasks import connection, total

    prepared = prepared or prepare(config)
    redone = fresh or begin == STAGES[0] or "gradients" not in prepared.run.stages()
    if turns is None and redone:  # in a batch others hold memory now, and a stage waits until they have given it back
        check_gradients(prepared, row_lengths(prepared))
    if prepared.run.store is None:  # which has room; a node's cache makes its own
        check_disk(prepared.run, missing_disk(prepared, fresh))
    reporter = reporter or SilentReporter()
    try:
        prepared.run.lock(reporter.note)
        lean = config.memory_budget is not None
        with connection(config.ray.address, lean_memory=lean, **config.ray.init_options):
            if turns is None:  # once more, by what Ray counts: in a container that is less than the machine has
                check_resources(config, total("CPU"), total("GPU"))
            prepared.run.create(config.model_dump(mode="json"), fresh=fresh, steps=["data", *needed_steps(prepared)])
            linears = [spec.name for spec in prepared.layout.specs]
            with RunLog(prepared.run, linears) as log, Trace(prepared.run) as trace:
                check_visible(prepared)
                for remark in remarks.of_machines([config]) if turns is None else ():
                    reporter.note(remark)
                told = Reporters(reporter, log, trace, StageGauges(prepared.run.name))
                Pipeline(prepared, told, begin, turns or AtOnce(), cache).run(until)
        return prepared.run.metrics()
    except OSError as error:  # of the run's own small files: a stage explains its own
        raise explain(error, "the run") from error
    finally:
        prepared.run.unlock()


class Pipeline:
    """One run's stages over one run directory; needs a connection to Ray."""

    def __init__(
        self,
        prepared: Prepared,
        reporter: Reporter,
        begin: str | None = None,
        turns: Turns | None = None,
        cache: ArtifactCache | None = None,
    ) -> None:
        from emloc_ray.stages.jobs import Jobs

        self.prepared, self.config, self.layout = prepared, prepared.config, prepared.layout
        self.directory, self.reporter = prepared.run, reporter
        # Ranks are the beginning of the factorization.
        forced = STEPS[STEPS.index("allocate" if begin == "factorize" else begin) :] if begin else ()
        self.steps = Steps(prepared, reporter, turns or AtOnce(), cache, forced)
        self.inputs = self.steps.inputs
        source = prepared.source
        self._source_dir = source.directory
        # On an object store the run holds the model, for nodes that do not see where it came from.
        self.imported = source.gguf_file is not None or prepared.run.store is not None
        self.jobs = Jobs(prepared, self.directory.path("model") if self.imported else source.directory)
        self.model_options = self.jobs.model_options

    def run(self, until: str = STAGES[-1]) -> None:
        """Every stage up to ``until``, in order."""
        self._tell(
            remarks.over_budget(self.config, self.steps.planned),
            remarks.unread_correction(self.config.correction),
            remarks.left_dense(self.layout),
            remarks.long_images(self.prepared),
        )
        while True:
            try:
                self._run_stages(until)
                break
            except DamagedArtifactError as error:
                self.steps.forget_damaged(error)
            except Dropped as error:
                self.reporter.note(str(error))
        self.steps.write_results()  # once more: a stage may have been committed by a run that was killed right after

    def _content(self) -> dict[str, str]:
        """What tells the original from others whose files look alike: needed where runs share what they make of it."""
        from emloc_ray.modeling.loading import content_of_source

        if self.steps.cache is None:
            return {}
        return {"weights": content_of_source(self.prepared.source, self._source_dir)}

    def _contents(self, artifact: str) -> dict[str, str]:
        """SHA-256 of an artifact's files: another training of the same inputs, as after damage, may give another adapter."""
        return {file.name: sha for file, sha in hashes(self.directory.path(artifact)).items()}

    def _tell(self, *found: str | None) -> None:
        for remark in filter(None, found):
            self.reporter.note(remark)

    def _run_stages(self, until: str) -> None:
        self.import_model()
        self.prepare_data()
        for stage in STAGES[: STAGES.index(until) + 1]:
            getattr(self, stage)()

    def import_model(self) -> None:
        """The original as a safetensors checkpoint: written once from a GGUF file, else where the config says."""
        from emloc_ray.modeling.loading import checkpoint_files, copy_checkpoint, fetch_weights, import_gguf
        from emloc_ray.stages.ray.losses import Losses
        from emloc_ray.stages.ray.tasks import Resources, bounded

        source, source_dir = self.prepared.source, self._source_dir
        if source.hub_id is not None:
            self.reporter.note(f"The weights of {source.hub_id} are taken from the hub, where they are not cached yet.")
            source_dir = self._source_dir = fetch_weights(source)
            if not self.imported:
                from emloc_ray.stages.ray.session import check_visible

                self.jobs = dataclasses.replace(self.jobs, model_dir=source_dir)
                check_visible(self.prepared, source_dir)
        if source.gguf_file is None:
            files = fingerprint_large_files(checkpoint_files(source_dir))
            inputs: dict[str, Any] = {"files": files}
        else:
            file = fingerprint_large_files([source_dir / source.gguf_file])
            inputs = {"file": file, "dtype": self.config.model.dtype}
        if not self.imported:
            self.inputs["import"] = files
            return

        def execute(progress: Progress, granted: Resources) -> dict[str, Any]:
            if source.gguf_file is None:  # by the driver: other nodes need not see the files
                discard_unless(self.jobs.model_dir, inputs)
                copy_checkpoint(source_dir, self.jobs.model_dir, progress)
                return {}
            task = granted.task(import_gguf).options(name="import: the model")
            submit = functools.partial(task.remote, source, self.jobs.model_dir, self.config.model.dtype)
            bounded([("the model", submit)], 1, Losses("import", self.reporter.note))
            return {}

        goes_on, shared = source.gguf_file is None, self._content()
        self.steps.run("import", inputs, [self.jobs.model_dir], execute, Resources(), resumes=goes_on, shared=shared)

    def prepare_data(self) -> None:
        """Rows, split, as token shards; the split's fingerprint is its content."""
        from emloc_ray.stages.ray.tasks import Resources
        from emloc_ray.stages.tokens import content_of_rows, may_change, split_inputs, tokenize_data

        tokens = self.directory.path("data", "tokens")
        inputs = {"model": self.inputs["import"], **split_inputs(self.prepared)}

        def execute(progress: Progress, granted: Resources) -> dict[str, Any]:
            out_dir, tell = self.directory.path("data"), self.reporter.note
            return tokenize_data(self.prepared, self.jobs.model_dir, out_dir, progress, inputs, tell)

        step = functools.partial(self.steps.run, "data", inputs, [tokens], execute, Resources())
        shared = None
        if self.steps.cache is not None and not may_change(self.prepared):
            shared = {**self._content(), "rows": content_of_rows(self.prepared)}
        counts = step(resumes=True, shared=shared)["splits"]
        for split, count in counts.items():
            self.inputs[f"data/{split}"] = fingerprint(self._contents(f"data/tokens/{split}"))
            cut, short = remarks.cut_rows(self.config, split, count), remarks.shortfall(self.config, split, count)
            self._tell(remarks.skipped_rows(split, count), cut, short)

    def _rank_steps(self) -> RankSteps:
        return RankSteps(self.steps, self.jobs, self._content)

    def calibrate(self) -> None:
        """What factors follow from: Grams, and sums of gradients where they are asked for."""
        self.gather_grams()
        self._rank_steps().gradients()

    def gather_grams(self) -> None:
        """One Gram per shared input of the linears that compression targets."""
        if not self.layout.differs:
            self.steps.leave_out("calibrate", "none needed", self.directory.path("calibration"))
            return
        from emloc_ray.stages.calibrate.calibrate import calibrate
        from emloc_ray.stages.calibrate.job import go_on
        from emloc_ray.stages.jobs import resources

        steps, section, out_dir = self.steps, self.config.calibration, self.directory.path("calibration")
        inputs: dict[str, Any] = {
            "model": self.inputs["import"],
            "options": self.model_options,
            "data": self.inputs["data/calibration"],
            "tokens": section.tokens,
            "groups": self.jobs.gram_groups(),
            **({"min_expert_tokens": section.min_expert_tokens} if self.jobs.experts() else {}),
        }

        def execute(progress: Progress, granted: Resources) -> dict[str, Any]:
            job = go_on(self.jobs.calibration(), out_dir, inputs, section.num_workers, section.mode == "auto")
            return calibrate(job, out_dir, granted, progress, self.reporter.note)

        step = functools.partial(steps.run, "calibrate", inputs, [out_dir], execute, resources(section))
        self._tell(remarks.thin_experts(step(resumes=True, shared=self._content())))

    def factorize(self) -> None:
        """The emulator."""
        from emloc_ray.stages.factorize.factorize import build_emulator
        from emloc_ray.stages.jobs import resources

        self._rank_steps().allocate()
        out_dir, calibration_dir = self.directory.path("emulator"), self.directory.path("calibration")

        def execute(progress: Progress, granted: Resources) -> dict[str, Any]:
            if "factorize" in self.steps.forced:  # ranks are found anew, which shards of those before need not have
                discard(out_dir)
            discard_unless(out_dir, ranks.factorize_inputs())
            made = dataclasses.replace(self.prepared, layout=ranks.allocated())
            job = dataclasses.replace(self.jobs, prepared=made).factorization()
            config, tell = self.jobs.base_config(), self.reporter.note
            return {**build_emulator(job, calibration_dir, config, granted, progress, tell), **ranks.found()}

        ranks = self._rank_steps()
        asked = resources(self.config.emulator)
        step = functools.partial(self.steps.run, "factorize", ranks.factorize_inputs(), [out_dir], execute, asked)
        result = step(resumes=True, read=ranks.sums_of_factors(), shared=self._content())
        made = self.layout.as_made(result)
        self._tell(
            remarks.thin_calibration(self.config, result["fewest_tokens"], made),
            remarks.unseen_linears(result.get("unseen", ()), made),
        )

    def heal(self) -> None:
        """The emulator after it was distilled from the original on the task's inputs; none where the config asks for none."""
        from emloc_ray.runs.healing_step import heal_emulator

        made = self.directory.stage("factorize")
        layout = self.layout if made is None else self.layout.as_made(made["result"])
        jobs = dataclasses.replace(self.jobs, prepared=dataclasses.replace(self.prepared, layout=layout))
        heal_emulator(self.steps, jobs, self._content)
        self._tell(remarks.no_healing(self.config))

    def finetune(self) -> None:
        """The adapter as trained on the emulator."""
        from emloc_ray.stages.finetune.finetune import finetune
        from emloc_ray.stages.jobs import resources

        section = self.config.finetune
        inputs = {
            "factorize": self.inputs["heal"],
            "data": self.inputs["data/train"],
            "options": self.model_options,
            "adapter": self.config.adapter.model_dump(mode="json"),
            "finetune": without(section, NOT_LEARNED),
            "steps": self.jobs.num_steps(),
            "seed": self.config.seed,
        }
        if self.prepared.zero_config is not None:
            inputs["deepspeed"] = self.prepared.zero_config

        def execute(progress: Progress, granted: Resources) -> dict[str, Any]:
            job = self.jobs.finetuning(f"finetune-{fingerprint(inputs)}")
            return finetune(job, granted, progress, self.reporter.note)

        self.steps.run("finetune", inputs, [self.directory.path("adapter_emulator")], execute, resources(section))
        discard(self.directory.path("training"))  # what the stage could go on from: not before it is recorded

    def correct(self) -> None:
        """The adapter as corrected for the original."""
        from emloc_ray.stages.correct.correct import correct
        from emloc_ray.stages.jobs import resources

        job = self.jobs.correction()
        inputs = {
            "finetune": self.inputs["finetune"],
            "adapter": self._contents("adapter_emulator"),
            "correction": self.config.correction.model_dump(mode="json"),
            "candidates": [dataclasses.asdict(candidate) for candidate in job.candidates],
            "max_tokens": job.max_tokens,
            "data": self.inputs["data/selection"],
        }

        def execute(progress: Progress, granted: Resources) -> dict[str, Any]:
            return correct(job, granted, progress, self.reporter.note)

        # It scores the original with adapters, as the evaluation does.
        asked = dataclasses.replace(resources(self.config.evaluation), num_workers=1)
        read = () if job.calibration_dir is None else ("calibrate",)
        self.steps.run("correct", inputs, [self.directory.path("adapter")], execute, asked, read=read)
        for stage in SUMS if self.config.calibration.keep == "none" else ():
            self.directory.drop(stage)

    def merge(self) -> None:
        """The original with the corrected adapter folded in; none where the adapter changes no weight."""
        if self.config.adapter.is_prompt:
            key = fingerprint([self.inputs["correct"], self._contents("adapter")])
            self.steps.leave_out("merge", key, self.directory.path("merged"))
            self._tell(remarks.no_merge(self.config))
            return
        from emloc_ray.stages.jobs import resources
        from emloc_ray.stages.merge import merge

        out_dir, size = self.directory.path("merged"), self.config.merge.max_shard_size
        inputs = {
            "correct": self.inputs["correct"],
            "adapter": self._contents("adapter"),
            **({} if size is None else {"max_shard_size": size}),
        }

        def execute(progress: Progress, granted: Resources) -> dict[str, Any]:
            discard_unless(out_dir, inputs)
            return merge(self.jobs.merging(), granted, progress, self.reporter.note)

        self.steps.run("merge", inputs, [out_dir], execute, resources(self.config.merge), resumes=True)

    def evaluate(self) -> None:
        """Every variant on the held-out rows."""
        from emloc_ray.stages.evaluate import evaluate
        from emloc_ray.stages.jobs import resources

        section = self.config.evaluation
        inputs = {
            "merge": self.inputs["merge"],
            "data": self.inputs["data/eval"],
            "evaluation": without(section, {*_PLACEMENT, "upper_bound"}),
        }

        def execute(progress: Progress, granted: Resources) -> dict[str, Any]:
            return evaluate(self.jobs.evaluation(), granted, progress, self.reporter.note)

        result = self.steps.run("evaluate", inputs, [], execute, resources(section))
        self._tell(remarks.other_bound(result["evaluation"], section.upper_bound))
