"""Import: the original as a safetensors checkpoint of the run, where it has to be converted or cannot be seen by all nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emloc_ray.io.runs.resume import discard_unless
from emloc_ray.io.store.node_cache import discard
from emloc_ray.modeling.loading import copy_checkpoint, import_gguf
from emloc_ray.planning.prepared import Prepared
from emloc_ray.stages.context import Context, Inputs, Result
from emloc_ray.stages.stage import Stage, by_weights, one_worker

if TYPE_CHECKING:
    from emloc_ray.stages.ray.tasks import Progress, Resources


def is_imported(prepared: Prepared) -> bool:
    """Whether the run holds the original: a GGUF file is converted, and on an object store nodes read the run alone."""
    return prepared.source.gguf_file is not None or prepared.run.store is not None


def _import(context: Context, inputs: Inputs, granted: Resources, progress: Progress) -> Result:
    from emloc_ray.stages.ray.losses import Losses
    from emloc_ray.stages.ray.tasks import run_tasks

    source, target = context.prepared.source, context.model_dir
    if source.gguf_file is None:  # by the driver: other nodes need not see the files
        discard_unless(target, inputs)
        copy_checkpoint(context.source_dir or source.directory, target, progress)
        return {}
    discard(target)  # a killed conversion leaves shards that nothing vouches for
    work = [("the model", (target, context.prepared.config.model.dtype))]
    run_tasks(import_gguf, source, work, granted, Losses("import", context.note))
    return {}


IMPORT = Stage(
    name="import",
    title="Importing the model",
    verb="calibrate",
    wanted=is_imported,
    asks=lambda config: one_worker(config.calibration).model_copy(
        update={"cpus_per_worker": 1, "gpus_per_worker": 0.0}
    ),
    inputs=lambda context: context.model_inputs,
    outputs=("model",),
    run=_import,
    resumes=True,
    shares=by_weights,
)
