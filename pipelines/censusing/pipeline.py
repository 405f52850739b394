"""The stages' plain functions on one model, in this process and without Ray, each with its outcome."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from plain_stages import gather, stages
from transformers import AutoConfig

from censusing.baseline import logits
from emloc_ray.config.reading import parse_config
from emloc_ray.data.processors import example
from emloc_ray.io.formats.grams import GramStore
from emloc_ray.modeling.architecture import auto_class, load_config
from emloc_ray.modeling.block_flow import block_flow
from emloc_ray.planning.machine import Speeds
from emloc_ray.planning.plan import make_plan
from emloc_ray.planning.prepared import prepare
from emloc_ray.stages.calibrate.job import BLOCKS
from emloc_ray.stages.calibrate.stage import calibration_job
from emloc_ray.stages.context import Context
from emloc_ray.stages.order import STEPS

STAGES = ("validate", "calibrate", "offloaded", "by_blocks", "factorize", "finetune", "correct", "merge", "parity")
_TOLERANCE = 1e-3
_SPEEDS = Speeds(1e9, 1e9)


def run_stages(model_dir: Path, run_dir: Path, ids: torch.Tensor, done: dict[str, float]) -> None:
    """Every stage in turn; ``done`` gets the seconds that each took.

    Raises:
        Exception: whatever a stage raises, :class:`AssertionError` where its numbers are wrong.
    """
    data = run_dir.parent / "rows.jsonl"
    rows = [{"prompt": f"add {i} and {i % 7}: ", "completion": f"the sum is {i + i % 7}"} for i in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        begin = time.monotonic()
        result = work()
        done[stage] = round(time.monotonic() - begin, 2)
        return result

    context = timed("validate", lambda: _context(run_dir, model_dir, data))
    works = stages(context)
    works["data"]()
    job = calibration_job(context)
    whole = dataclasses.replace(job, hold="resident", waves=None)
    grams = timed("calibrate", lambda: gather(whole, context.path("calibration")))
    offloaded = dataclasses.replace(whole, hold="offloaded")
    timed("offloaded", lambda: _same(gather(offloaded, run_dir / "other"), grams))
    flow = block_flow(load_config(model_dir), False, example(model_dir, False))
    if not flow.shares:  # else the plan holds it offloaded
        blocks = dataclasses.replace(job, hold=BLOCKS)
        timed("by_blocks", lambda: _same(gather(blocks, run_dir / "blocks"), grams))
    for stage in ("factorize", "finetune", "correct", "merge"):
        timed(stage, works[stage])
    timed("parity", lambda: _check_parity(context, ids))


def _context(run_dir: Path, model_dir: Path, data: Path) -> Context:
    values = {
        "run_dir": str(run_dir),
        "model": {"source": str(model_dir)},
        "data": {"train": {"path": str(data)}, "format": "prompt_completion", "max_seq_length": 64},
        "calibration": {"num_calibration_samples": 8, "rows_per_shard": 4},
        "emulator": {"compression_ratio": 0.5},
        "finetune": {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "disable_tqdm": True},
        "correction": {"num_selection_samples": 4, "max_share": None},
        "evaluation": {"num_samples": 4},
    }
    prepared = prepare(parse_config(values))
    make_plan(STEPS, prepared, _SPEEDS)
    prepared.run.create(prepared.config.model_dump(mode="json"))
    return Context(prepared, model_dir)


def _same(grams: GramStore, expected: GramStore) -> None:
    for name in expected.index["groups"]:
        right = expected.read(name)
        scale = float(right.diagonal().max())
        counted = grams.num_tokens(name)
        assert counted == expected.num_tokens(name), f"{name} counts {counted} tokens"
        assert float((grams.read(name) - right).abs().max()) <= _TOLERANCE * scale, f"the Gram of {name} differs"


def _check_parity(context: Context, ids: torch.Tensor) -> None:
    """The merged model predicts what the adapter on the original does, both opened by transformers and PEFT alone."""
    original, merged = (_opened(path) for path in (context.model_dir, context.path("merged")))
    before, after = logits(original, ids), logits(merged, ids)
    adapted = logits(PeftModel.from_pretrained(original, context.path("adapter")).eval(), ids)
    scale = float(adapted.abs().max())
    difference, change = (float((other - adapted).abs().max()) / scale for other in (after, before))
    assert difference <= _TOLERANCE, f"merged and adapted differ by {difference:.1e} of the largest logit"
    assert change > _TOLERANCE, f"the adapter moves the logits by {change:.1e} of the largest"


def _opened(directory: Path) -> Any:
    model, report = auto_class(AutoConfig.from_pretrained(directory)).from_pretrained(
        directory, output_loading_info=True
    )
    assert not report["missing_keys"], f"{sorted(report['missing_keys'])[0]} is not in {directory.name}/"
    return model.eval()
