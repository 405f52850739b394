"""Import: the original as a safetensors checkpoint of the run, where it has to be converted or some node does not see it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from emloc_ray.io.runs.resume import discard_unless
from emloc_ray.io.store.node_cache import discard, sizes
from emloc_ray.modeling.architecture import empty_model
from emloc_ray.modeling.gguf_import import import_gguf, read_header
from emloc_ray.modeling.hub_weights import import_weights, weight_files
from emloc_ray.modeling.loading import copy_checkpoint
from emloc_ray.modeling.source_checks import check_weights
from emloc_ray.planning.costs import StageCost
from emloc_ray.planning.memory import MemoryModel
from emloc_ray.planning.prepared import Prepared
from emloc_ray.stages.context import Context, Inputs, Result
from emloc_ray.stages.stage import Stage, one_worker

if TYPE_CHECKING:
    from emloc_ray.stages.ray.tasks import Progress, Resources


def is_imported(prepared: Prepared) -> bool:
    """Whether the run holds the original: a GGUF file is converted, a model of the hub fetched, and on an object store nodes
    read the run alone."""
    source = prepared.source
    return source.gguf_file is not None or source.hub_id is not None or prepared.run.store is not None


def original_dir(prepared: Prepared) -> Path:
    """Where stages read the original, once it is imported."""
    return prepared.run.path("model") if is_imported(prepared) else prepared.source.directory


def _import(context: Context, inputs: Inputs, granted: Resources, progress: Progress) -> Result:
    from emloc_ray.stages.ray.losses import Losses
    from emloc_ray.stages.ray.tasks import run_tasks

    source, target = context.prepared.source, context.model_dir
    losses = Losses("import", context.note)
    if source.gguf_file is not None:
        discard(target)  # a killed conversion leaves shards that nothing vouches for
        prepared = context.prepared
        header = read_header(source, prepared.model_config)
        work = [("the model", (target, prepared.config.model.dtype, header))]
        run_tasks(import_gguf, source, work, granted, losses, progress)
        return {}
    discard_unless(target, inputs)
    if source.hub_id is None:  # by the driver, as other nodes need not see the files
        copy_checkpoint(source.directory, target, progress)
        return {}
    context.note(f"The weights of {source.hub_id} come from the hub, unless they are cached.")
    copy_checkpoint(source.directory, target, lambda done, total: None, weights=False)
    written = sizes(target)
    files = [(name, (name,)) for name in weight_files(source) if target / name not in written]
    run_tasks(import_weights, (source, target), files, granted, losses, progress)
    trusts = context.prepared.config.model.trust_remote_code
    check_weights(source, empty_model(context.prepared.model_config, trusts), target)
    return {}


def _cost(memory: MemoryModel) -> StageCost:
    if memory.prepared.source.gguf_file is None:  # copied, as it comes
        return StageCost(memory.import_parts(), disk_bytes=memory.weight_files)
    return StageCost(memory.import_parts(), disk_bytes=memory.weight_files, start_seconds=5 + memory.weights / 20e6)


IMPORT = Stage(
    name="import",
    title="Importing the model",
    verb="calibrate",
    wanted=is_imported,
    workers=lambda config: one_worker(config.calibration).model_copy(
        update={"cpus_per_worker": 1, "gpus_per_worker": 0.0}
    ),
    inputs=lambda context: context.model_inputs,
    outputs=("model",),
    run=_import,
    cost=_cost,
    resumes=True,
    redone_by_from=False,
    is_shared=lambda context: True,
)
