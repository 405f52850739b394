"""The inputs of each adapted linear in the emulator with its adapter, projected on the adapter's directions."""

import random

from torch import Tensor

from emloc_ray.core.correction import ADAPTED_ROWS, canonical_form
from emloc_ray.data.ahead import batches_by_length
from emloc_ray.data.formats import Tokens
from emloc_ray.data.token_shards import TokenShards
from emloc_ray.io.formats.shards import write_tensors
from emloc_ray.io.store.node_cache import exists
from emloc_ray.modeling.adapter_files import Adapter
from emloc_ray.stages.correct.job import CorrectionJob
from emloc_ray.stages.correct.modules import as_lora_module


def see_adapted_inputs(job: CorrectionJob) -> None:
    """Writes ``Q`` and ``G_A Q`` of every adapted linear that read a token, by one pass of the emulator without its head.
    Raises NumericsError where a linear reads NaN or Inf, naming it."""
    if exists(job.adapted_path):
        return
    # Imports that take seconds, and that correcting itself does without.
    from emloc_ray.modeling.adapter import load_adapter
    from emloc_ray.modeling.gram_hooks import ColumnHooks
    from emloc_ray.modeling.holding import open_model

    adapter, placed = Adapter(job.adapter_dir), {spec.name: spec for spec in job.specs}
    directions = {}
    for name in adapter.names:
        lora, _ = as_lora_module(adapter, placed[name], job.update_tolerance)
        directions[name] = canonical_form(lora.lora_a, lora.lora_b).q
    model = load_adapter(open_model(job.emulator_dir, **job.model_options), job.adapter_dir).eval()
    hooks = ColumnHooks(model.get_base_model(), directions, dict(job.streams))
    for _, batch in batches_by_length(_rows(job), job.batch_size, job.pad_token_id, job.images):
        hooks.forward(batch, job.calibration_tokens)
    hooks.remove()
    hooks.check_finite()
    tensors: dict[str, Tensor] = {}
    for name, columns in hooks.grams.items():
        if columns.num_tokens:
            tensors |= {f"{name}/q": directions[name], f"{name}/gram_q": columns.matrix}
    write_tensors(job.adapted_path, tensors)


def _rows(job: CorrectionJob) -> list[Tokens]:
    shards = TokenShards(job.tokens_dir)
    chosen = random.Random(0).sample(range(len(shards)), min(ADAPTED_ROWS, len(shards)))
    return [shards.row(position) for position in sorted(chosen)]
