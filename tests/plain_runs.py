"""A run through the stages' plain functions, in this process: what a test of the method needs of one, without Ray."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from plain_stages import stages
from small_runs import FinishedRun, RecordingReporter

from emloc_ray.config.reading import parse_config
from emloc_ray.data.formats import Tokens
from emloc_ray.data.token_shards import TokenShards
from emloc_ray.planning.batches import shrink_batches
from emloc_ray.planning.prepared import prepare
from emloc_ray.stages.context import Context


class PlainRun(FinishedRun):
    """A finished run whose metrics hold the evaluation alone, with its context and the loss of each optimizer step."""

    def __init__(self, context: Context, values: dict[str, Any], step_losses: list[float]) -> None:
        super().__init__(context.path(), values, context.model_dir, RecordingReporter())
        self.context, self.step_losses = context, step_losses

    @property
    def losses(self) -> dict[str, float]:
        """The held-out loss of each variant."""
        return {variant: scores["loss"] for variant, scores in self.metrics["evaluation"].items()}

    def rows(self, split: str) -> list[Tokens]:
        """The rows of a split, in order."""
        shards = TokenShards(self.context.tokens(split))
        return [shards.row(position) for position in range(len(shards))]


def plain_run(
    values: dict[str, Any],
    model_dir: Path,
    during: Callable[[str], AbstractContextManager[None]] = lambda stage: nullcontext(),
    device: str = "cpu",
) -> PlainRun:
    """A run of this config: every artifact at its place. ``during(stage)`` is entered for each stage; ranks, factors and
    correction are computed on ``device``, models where torch has a GPU."""
    prepared = shrink_batches(prepare(parse_config(values)))
    context = Context(prepared, model_dir)
    prepared.run.create(prepared.config.model_dump(mode="json"))
    made = {}
    for stage, work in stages(context, device).items():
        with during(stage):
            made[stage] = work()
    context.path("metrics.json").write_text(json.dumps({"evaluation": made["evaluate"]}))
    return PlainRun(context, values, made["finetune"] + made.get("finish", []))
