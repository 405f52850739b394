"""Runs an ablation: its data sets, its pruned models, all cells as one batch, then the measurements of their adapters.

Each of these is skipped where it was done with the same inputs, so that the same command goes on after a kill. A cell that
is done is a file in ``cells/``, named by all that its figures follow from: it is not looked at again, and another ablation
that shares the directory and asks for the same run takes its figures.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ablations.cell_figures import Cells, figures
from ablations.cells import Ablation, Cell
from ablations.datasets import data_section, made, make_dataset, stand_in
from emloc_ray.config.schema import ModelConfig, RunConfig
from emloc_ray.errors import ConfigError, EmlocError
from emloc_ray.io.runs.cache import ArtifactCache
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.io.runs.fingerprint import fingerprint
from emloc_ray.io.store.node_cache import discard
from emloc_ray.modeling.loading import read_model_config, resolve_source
from emloc_ray.planning.prepared import Prepared, prepare
from emloc_ray.runs import run as pipeline
from emloc_ray.runs.batch.driver import Show, Tell, prepare_batch, run_batch
from emloc_ray.runs.batch.state import BatchState
from emloc_ray.runs.batch.summary import write_summary
from emloc_ray.runs.batch.tasks import Batch, Task
from emloc_ray.stages.importing import original_dir
from emloc_ray.ui.batch_page import write_batch_report
from emloc_ray.ui.page import PageReporter

_POLL_S = 1.0


@dataclass(frozen=True)
class Pruned:
    """A pruned model, and the parts that it kept."""

    model_dir: Path

    @property
    def kept(self) -> Path:
        """Which parts."""
        return self.model_dir / "kept.json"

    @property
    def parameters_kept(self) -> float:
        """The share of the blocks' linears that it has."""
        counts = json.loads(self.kept.read_text())
        return float(counts["kept_parameters"] / counts["parameters"])


def check(ablation: Ablation, progress: Callable[[int, int], None]) -> float:
    """Checks every cell against its model, and stand-ins for its data; nothing is started, nothing written.

    Returns the seconds that the cells are planned to take one after another if nothing is shared.

    Raises:
        ConfigError: with every error at once; those of pruning and tokenizers before all others.
    """
    _check_pruning(ablation)
    _check_tokenizers(ablation)
    with tempfile.TemporaryDirectory() as folder:
        for dataset in ablation.config.datasets:
            stand_in(dataset, Path(folder) / dataset, ablation.config.calibrations, ablation.config.healing_rows)
        tasks = []
        for cell in ablation.cells:
            data = data_section(cell.dataset, Path(folder) / cell.dataset, cell.calibration, cell.heal_on)
            whole = {} if cell.prune is None else {"emulator": {"compression_ratio": 1.0}}
            tasks.append(_changed(cell.task, data=data, **whole))
        prepared = prepare_batch(Batch(ablation.batch, tuple(tasks), ablation.ray), progress)
        return sum(prepared.work.planned(task).seconds for task in tasks)


def _check_pruning(ablation: Ablation) -> None:
    from ablations.pruning import checked_shape

    lines = []
    for cell in ablation.cells:
        if cell.prune is None:
            continue
        model = cell.config.model
        try:
            config = read_model_config(
                resolve_source(model.source, model.revision, model.trust_remote_code), model.trust_remote_code
            )
            checked_shape(config, cell.prune, cell.config.emulator.compression_ratio)
        except ConfigError as error:
            lines.append(f"{cell.name}: {error}")
    if lines:
        raise ConfigError("\n".join(lines))


def _check_tokenizers(ablation: Ablation) -> None:
    """Raises ConfigError where a smaller model has another vocabulary than the original: losses are means over tokens, and
    those of other tokens tell nothing about each other."""
    vocabularies: dict[str, dict[str, int]] = {}
    others = [cell for cell in ablation.cells if not ablation.has_the_original(cell)]
    for cell in (ablation.bound, *others) if others else ():
        model = cell.config.model
        if model.source not in vocabularies:
            vocabularies[model.source] = _vocabulary(model)
            if vocabularies[model.source] != vocabularies[ablation.bound.config.model.source]:
                raise ConfigError(
                    f"method {cell.method}: {model.source} has other tokens than the original, and losses are means over"
                    " tokens: take a model of the same family."
                )


def _vocabulary(model: ModelConfig) -> dict[str, int]:
    from transformers import AutoTokenizer

    source = resolve_source(model.source, model.revision, model.trust_remote_code)
    options = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(source.directory, trust_remote_code=model.trust_remote_code, **options)
    return tokenizer.get_vocab()


def make_data(ablation: Ablation, tell: Tell) -> Cells:
    """Makes the data sets that are not there yet."""
    run = RunDirectory(ablation.root)
    run.check("batch")
    # Ablations that share data sets make them one after another.
    with contextlib.ExitStack() as held:
        run.lock()
        held.callback(run.unlock)
        run.create(ablation.batch.model_dump(mode="json"), kind="batch")  # before the shared cache, which may be in it
        shared = RunDirectory(ablation.shared / "data")
        _wait_for(shared, tell)
        held.callback(shared.unlock)
        contents: dict[tuple[str, int], dict[str, str]] = {}
        for dataset in ablation.config.datasets:
            for seed in ablation.config.seeds:
                tell(f"Data set {dataset}, seed {seed}")
                folder = ablation.data_dir(dataset, seed)
                config = ablation.config
                contents[dataset, seed] = make_dataset(
                    dataset, folder, seed, config.rows, config.calibrations, config.healing_rows
                )
    return Cells(ablation, contents)


def _wait_for(place: RunDirectory, tell: Tell) -> None:
    is_announced = False
    while True:
        try:
            return place.lock()
        except ConfigError as error:
            if place.holder() is None:
                raise
            if not is_announced:
                tell(f"Another ablation makes its data sets: {error} This one waits.")
        is_announced = True
        time.sleep(_POLL_S)


def unrounded(ablation: Ablation, tell: Tell) -> Ablation:
    """The same on the model that ``unrounded`` asks for, which is made where it is not there yet."""
    if not ablation.config.unrounded:
        return ablation
    from ablations.unrounding import make_unrounded

    source = ablation.bound.config.model.source
    digest, name = fingerprint([source, version("emloc-ray")])[:16], source.rsplit("/", 1)[-1]
    model_dir = ablation.shared / "unrounded" / digest / name
    if not model_dir.is_dir():
        tell(f"{source} as it may have been before it was rounded")
        make_unrounded(source, model_dir)
    own = {"model": {"source": str(model_dir)}}
    return replace(ablation, cells=tuple(replace(cell, task=_changed(cell.task, **own)) for cell in ablation.cells))


def known_data(ablation: Ablation) -> Cells:
    """What an earlier call made."""
    contents: dict[tuple[str, int], dict[str, str]] = {}
    for dataset in ablation.config.datasets:
        for seed in ablation.config.seeds:
            content = made(ablation.data_dir(dataset, seed))
            if content is not None:
                contents[dataset, seed] = content
    return Cells(ablation, contents)


def run(ablation: Ablation, cells: Cells, show: Show, tell: Tell) -> dict[str, str]:
    """All that is not done yet; returns why cells failed, by their names."""
    # Cells that differ only in what is measured afterwards have one run.
    pending = list({cells.path(cell): cell for cell in ablation.cells if cells.read(cell) is None}.values())
    if not pending and not any(map(cells.is_to_be_measured, ablation.cells)):
        return {}
    _check_tokenizers(ablation)
    from emloc_ray.stages.ray.session import connection

    with connection(ablation.ray.address, **ablation.ray.init_options):
        failed: dict[str, str] = {}
        asked = [cell for cell in ablation.cells if cell in pending or cells.is_to_be_measured(cell)]
        pruned = dict(pruned_models(ablation, cells, [cell for cell in asked if cell.prune], failed, tell))
        if pending:
            failed |= _run_batch(ablation, cells, pending, pruned, failed, show, tell)
        return failed | measure_all(ablation, cells, pruned, tell)


def _run_batch(
    ablation: Ablation,
    cells: Cells,
    pending: Sequence[Cell],
    pruned: dict[str, Pruned],
    failed: dict[str, str],
    show: Show,
    tell: Tell,
) -> dict[str, str]:
    runnable = {cell.name: cell for cell in pending if cell.name not in failed}
    tasks = tuple(task_of(cell, pruned.get(cell.name)) for cell in runnable.values())
    if not tasks:
        return {}

    def look(state: BatchState) -> None:
        show(state)
        for task in state.tasks:
            if task.status == "done" and task.name in runnable:
                cell = runnable.pop(task.name)
                place = RunDirectory(ablation.batch.task_dir(task.name))
                measured = figures(place.metrics())
                if cell.name in pruned:
                    kept = pruned[cell.name].parameters_kept
                    measured |= {"parameters_kept": kept, "bits_per_weight": kept * measured["bits_per_weight"]}
                cells.write(cell, measured)
                discard(place.path("merged"))  # of the size of the original each, and evaluated by now

    prepared = prepare_batch(Batch(ablation.batch, tasks, ablation.ray), reporter=PageReporter())
    state = run_batch(prepared, look, tell, accept_changes=True)
    write_summary(prepared.run, state)
    write_batch_report(prepared.run, state)
    look(state)
    return {task.name: task.reason or task.status for task in state.tasks if task.status != "done"}


def _changed(task: Task, **sections: dict[str, Any]) -> Task:
    """A task with other keys in some sections of its config."""
    values = task.config.model_dump(exclude_unset=True)
    for section, keys in sections.items():
        values[section] = {**values.get(section, {}), **keys}
    return replace(task, config=RunConfig.model_validate(values))


def task_of(cell: Cell, pruned: Pruned | None) -> Task:
    """A cell's task, on its pruned model where it has one."""
    if pruned is None:
        return cell.task
    return _changed(cell.task, model={"source": str(pruned.model_dir)}, emulator={"compression_ratio": 1.0})


def pruned_models(
    ablation: Ablation, cells: Cells, asked: Sequence[Cell], failed: dict[str, str], tell: Tell
) -> Iterator[tuple[str, Pruned]]:
    """By the names of cells; each is made once, where the digest of what it follows from says, and never changes there."""
    from ablations.aligning import align
    from ablations.pruning import prune

    cache = ArtifactCache(ablation.batch.cache.path, ablation.batch.cache.max_size)
    for cell in asked:
        try:
            pruned = Pruned(ablation.root / "pruned" / f"{cell.prune}-{cells.pruned_digest(cell)[:16]}")
            if not pruned.kept.is_file():
                ratio, by_grams = cell.config.emulator.compression_ratio, cell.prune == "structured"
                tell(f"Pruned model for {cell.name}")
                prepared = _prepared_original(ablation, cell)
                pipeline.run(prepared.config, until="calibrate", prepared=prepared, cache=cache, accept_changes=True)
                grams = prepared.run.path("calibration") if by_grams else None
                assert cell.prune is not None
                prune(original_dir(prepared), pruned.model_dir, cell.prune, ratio, cell.seed, grams)
            if cell.align:
                source, data_dir = pruned.model_dir, ablation.data_dir(cell.dataset, cell.seed)
                pruned = Pruned(source.with_name(f"{source.name}-aligned-{cells.aligned_digest(cell)[:16]}"))
                if not pruned.kept.is_file():
                    tell(f"Aligned model for {cell.name}")
                    rows = data_dir / f"healing-{cell.align}.jsonl"
                    align(source, rows, pruned.model_dir, cell.config.data.max_seq_length)
            yield cell.name, pruned
        except EmlocError as error:
            failed[cell.name] = " ".join(str(error).split("\n"))


def _prepared_original(ablation: Ablation, cell: Cell) -> Prepared:
    """A run of the original that goes no further than a cell's Grams, where it is pruned by these, else than its import."""
    by_grams = cell.prune == "structured"
    own = cell.config if by_grams else ablation.bound.config
    name = f"{cell.dataset}-{cell.seed}-{cell.calibration}" if by_grams else "original"
    return prepare(own.model_copy(update={"run_dir": str(ablation.root / "originals" / name)}))


def measure_all(ablation: Ablation, cells: Cells, pruned: dict[str, Pruned], tell: Tell) -> dict[str, str]:
    """Measures adapters on the original, as many cells at once as the cluster has workers of an evaluation for."""
    import ray

    todo = [cell for cell in ablation.cells if cells.is_to_be_measured(cell)]
    todo = [cell for cell in todo if cell.prune is None or cell.name in pruned]
    if not todo:
        return {}
    each = max(cell.config.evaluation.cpus_per_worker for cell in todo)
    at_once = max(1, int(ray.cluster_resources().get("CPU", 1) / max(each, 1)))
    failed = {}

    def measure(cell: Cell) -> None:
        run = cells.run_of(cell)
        place = RunDirectory(run.run_dir)
        try:
            place.lock()  # so that no process trains another adapter there
        except EmlocError as error:
            failed[cell.name] = str(error)
            return
        try:
            if not cells.is_to_be_measured(cell):
                raise ConfigError(f"{run.run_dir} has another adapter by now: run the ablation again.")
            measured = _started if cell.start is not None else _recovered if cell.prune is not None else _corrected
            cells.write_measured(cell, measured(ablation, cell, run, pruned.get(cell.name), tell))
        except EmlocError as error:
            failed[cell.name] = str(error)
        finally:
            place.unlock()

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(measure, todo))
    return failed


def _recovered(ablation: Ablation, cell: Cell, run: RunConfig, pruned: Pruned | None, tell: Tell) -> dict[str, float]:
    """The original alone and with the adapter that was trained on a pruned model, scattered to its shapes."""
    from ablations.pruning import recover_adapter
    from ablations.starts import losses_of
    from emloc_ray.stages.context import Context
    from emloc_ray.stages.evaluate.stage import evaluation_job

    assert pruned is not None
    tell(f"{cell.name}: its adapter on the original")
    place = RunDirectory(run.run_dir)
    adapter = place.path("adapter_recovered")
    recover_adapter(place.path("adapter"), pruned.kept, adapter)
    prepared = _prepared_original(ablation, cell)
    own = prepare(task_of(cell, pruned).config.model_copy(update={"run_dir": run.run_dir}))
    job = replace(
        evaluation_job(Context(own, pruned.model_dir)),
        model_dir=original_dir(prepared),
        trained_adapter_dir=adapter,
        variants=("original", "uncorrected"),
    )
    losses = losses_of(job, own, tell)
    return {"original": losses["original"], "recovered": losses["uncorrected"]}


def _started(ablation: Ablation, cell: Cell, run: RunConfig, pruned: Pruned | None, tell: Tell) -> dict[str, float]:
    """Losses of emulator and original with an adapter that did not begin at zero, and the seconds of its training."""
    from ablations.starts import trained_from

    assert cell.start is not None
    tell(f"{cell.name}: trained from its start")
    return trained_from(cell.start, run, tell)


def _corrected(ablation: Ablation, cell: Cell, run: RunConfig, pruned: Pruned | None, tell: Tell) -> dict[str, float]:
    """Held-out losses of several corrections of a trained adapter; nothing is chosen by them."""
    from emloc_ray.core.correction import Candidate
    from emloc_ray.runs.steps import resources_of
    from emloc_ray.stages.context import Context
    from emloc_ray.stages.correct.correct import correct
    from emloc_ray.stages.correct.stage import CORRECT, correction_job

    tell(f"{cell.name}: corrections of its adapter")
    prepared = prepare(run)
    model_dir = original_dir(prepared)
    context = Context(prepared, model_dir)
    asked = {name: Candidate(c.method, c.clamp, c.strength) for name, c in ablation.config.corrections.items()}
    distinct = tuple(dict.fromkeys((Candidate("none"), *asked.values())))
    if len(distinct) == 1:
        distinct = (*distinct, Candidate("projection"))  # one alone is not scored
    with tempfile.TemporaryDirectory(dir=run.run_dir) as folder:
        job = replace(
            correction_job(context),
            candidates=distinct,
            max_tokens=None,
            selection_dir=context.tokens("eval"),
            out_dir=Path(folder) / "adapter",
        )
        result = correct(job, resources_of(CORRECT, prepared), tell=tell)
    measured = [candidate["loss"] for candidate in result["candidates"] if not candidate["interpolated"]]
    losses = dict(zip(distinct, measured, strict=True))
    return {name: losses[candidate] for name, candidate in asked.items()}
