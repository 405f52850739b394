"""Whole stages and runs: Ray against the same functions in one process, calibration, a step, growth, the quickstart."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from plain_stages import stages
from transformers import AutoConfig

import emloc_ray
from benchmarks.figures import (
    QUICKSTART,
    THREADS,
    Figures,
    calibrated,
    emulated,
    figure,
    interleaved,
    paper_config,
    write_result,
)
from emloc_ray.config.schema import RunConfig
from emloc_ray.data.ahead import batches_by_length
from emloc_ray.data.token_shards import TokenShards, collate
from emloc_ray.io.formats.grams import GramStore
from emloc_ray.modeling.adapter import attach_adapter
from emloc_ray.modeling.adapter_methods import adapter_config
from emloc_ray.modeling.architecture import block_linears, empty_model
from emloc_ray.modeling.gram_hooks import GramHooks
from emloc_ray.modeling.loading import load_model
from emloc_ray.modeling.loss import token_loss
from emloc_ray.planning.prepared import prepare
from emloc_ray.stages.context import Context
from emloc_ray.stages.evaluate.stage import gap_closed

DEPTH, ROWS, REPEATS = 6, 64, 3
TIMES = (2, 4)
SIZES = {"small": (8, 2, 8), "large": (96, 24, 64)}  # calibration rows, steps, held-out rows


def ray_overhead(out: Path) -> Figures:
    """The stages from calibrate to evaluate, of the quickstart's model, at two sizes of work.

    What starting Ray and its workers takes is the same at both: the ratio compares what the added work adds to each side.
    """
    seconds: dict[str, list[float]] = {"ray": [], "plain": []}
    for size in SIZES:
        config = _sized(out, size)
        emloc_ray.run(config, until="calibrate", fresh=True)  # imports the model, makes the tokens
        for side, action in (("ray", _run_on_ray), ("plain", _run_plain)):
            begin = time.perf_counter()
            action(config)
            seconds[side].append(time.perf_counter() - begin)
            print(f"{size} {side}: {seconds[side][-1]:.1f} s", file=sys.stderr, flush=True)
        shutil.rmtree(config.run_dir)
    added = {side: large - small for side, (small, large) in seconds.items()}
    (small_ray, _), (small_plain, _) = seconds["ray"], seconds["plain"]
    start = small_ray - added["ray"] / added["plain"] * small_plain
    return {
        "the stages' work on Ray": figure(
            added["ray"], added["plain"], "s (baseline: the same functions in one process)"
        ),
        "starting Ray and six stages' workers": figure(
            start, small_plain, "s (baseline: the work of eight rows and two steps)"
        ),
    }


def _sized(out: Path, size: str) -> RunConfig:
    samples, steps, held_out = SIZES[size]
    return paper_config(
        out / f"overhead-{size}",
        f"calibration.num_calibration_samples={samples}",
        *(f"{section}.num_workers=1" for section in ("calibration", "emulator", "evaluation")),
        *(f"{section}.cpus_per_worker={THREADS}" for section in ("calibration", "emulator", "evaluation")),
        f"finetune.max_steps={steps}",
        f"evaluation.num_samples={held_out}",
        f"ray.num_cpus={THREADS}",
        "correction.method=projection",
        "evaluation.num_exact_match=0",
        "evaluation.num_generations=0",
    )


def _run_on_ray(config: RunConfig) -> None:
    emloc_ray.run(config, begin="calibrate", accept_changes=True)


def _run_plain(config: RunConfig) -> None:
    """The stages' own functions from the tokens on, one after the other, no Ray."""
    torch.set_num_threads(THREADS)
    run, plain = Path(config.run_dir), Path(f"{config.run_dir}-plain")
    prepared = prepare(config.model_copy(update={"run_dir": str(plain)}))
    prepared.run.create(prepared.config.model_dump(mode="json"))
    shutil.copytree(run / "data", plain / "data")
    for stage, work in stages(Context(prepared, run / "model")).items():
        if stage != "data":
            work()
    shutil.rmtree(plain)


def training_step(out: Path) -> Figures:
    """Steps of LoRA on every linear of the quickstart's emulator, and of the original: 8 rows, no checkpointing."""
    _, run = calibrated(out)
    shards = TokenShards(run / "data" / "tokens" / "calibration")
    batch = collate([shards.row(position) for position in range(8)], 0)
    actions = []
    for directory in (emulated(run, out), run / "model"):
        targets = [spec.name for spec in block_linears(empty_model(AutoConfig.from_pretrained(run / "model")))]
        model = attach_adapter(
            load_model(directory), adapter_config(target_modules=targets, r=8, lora_alpha=16)
        ).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        actions.append(functools.partial(_step, model, optimizer, batch))
    seconds = interleaved(actions, repeats=9)
    return {"a training step on the emulator": figure(seconds[0], seconds[1], "s (baseline: on the original)")}


def _step(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> None:
    result = token_loss(model, batch, "completion")
    (result.loss_sum / result.num_tokens).backward()
    optimizer.step()
    optimizer.zero_grad()


def growth(out: Path) -> Figures:
    """Calibrating and factorizing random models of 1, 2 and 4 times a depth, and one over 1, 2 and 4 times the rows.

    The ratio is the smallest, times how much more there was, over the larger: 1 is linear, more is better; of the peak
    memory that rows take, 1 is flat.
    """
    figures: Figures = {}
    measured = {times: _grown(out, times * DEPTH, ROWS) for times in (1, *TIMES)}
    measured_rows = {times: _grown(out, DEPTH, times * ROWS) for times in TIMES}
    for what in ("seconds", "peak"):
        unit, scale = ("s", 1.0) if what == "seconds" else ("MiB", 2.0**20)
        base = measured[1][what] / scale
        for times in TIMES:
            ours = measured[times][what] / scale
            figures[f"calibrating and factorizing {times} × the depth, {what}"] = figure(
                ours, times * base, f"{unit} (baseline: {times} × that of one)"
            )
        for times in TIMES:
            one, ours = (rows[f"calibrate_{what}"] / scale for rows in (measured[1], measured_rows[times]))
            expected, said = (one, "of one") if what == "peak" else (times * one, f"{times} × that of one")
            figures[f"calibrating {times} × the rows, {what}"] = figure(ours, expected, f"{unit} (baseline: {said})")
    return figures


def _grown(out: Path, depth: int, rows: int) -> dict[str, float]:
    """A calibration and factorization in a process of its own, the least of some."""
    command = [
        sys.executable,
        str(Path(__file__).with_name("growth_probe.py")),
        str(out / f"growth-{depth}"),
        str(depth),
        str(rows),
    ]
    outputs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(REPEATS)]
    measured: list[dict[str, float]] = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {key: min(each[key] for each in measured) for key in measured[0]}


def calibration(out: Path) -> Figures:
    """Passes with Gram hooks against the same headless passes without."""
    config, run = calibrated(out)
    shards = TokenShards(run / "data" / "tokens" / "calibration")
    rows = [shards.row(position) for position in range(min(64, len(shards)))]
    batches = [batch for _, batch in batches_by_length(rows, config.calibration.batch_size, 0)]
    groups = list(GramStore(run / "calibration").index["groups"].values())

    plain = GramHooks(load_model(run / "model"), [])
    hooked = GramHooks(load_model(run / "model"), groups)

    def passes(hooks: GramHooks) -> Callable[[], None]:
        def forward() -> None:
            for batch in batches:
                hooks.forward(batch)

        return forward

    seconds = interleaved([passes(hooked), passes(plain)], repeats=5)
    return {"calibration passes": figure(seconds[0], seconds[1], "s (baseline: forward passes without hooks)")}


def _against_lora(metrics: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """Held-out losses of a run, and of LoRA on the original at as many steps, each with its share of what that gains."""
    losses = {name: values["loss"] for name, values in metrics["evaluation"].items()}
    before, after, bound = (
        run.get("exact_match", {}).get(model)
        for run, model in ((metrics, "original"), (metrics, "merged"), (upper, "merged"))
    )
    named = {
        "original": (losses["original"], before),
        "adapter from the emulator, uncorrected": (losses["uncorrected"], None),
        f"adapter from the emulator, corrected ({metrics['correction']['method']})": (losses["corrected"], None),
        "the same, finished on the original" if "finished" in losses else "merged": (losses["merged"], after),
        "LoRA on the original": (upper["evaluation"]["merged"]["loss"], bound),
    }
    gap = losses["original"] - named["LoRA on the original"][0]
    rows = [
        {"what": what, "loss": loss, "gap_closed": (losses["original"] - loss) / gap, "exact_match": match}
        for what, (loss, match) in named.items()
    ]
    return {"num_tokens": metrics["evaluation"]["original"]["num_tokens"], "rows": rows}


def quickstart(out: Path) -> Figures:
    """The quickstart from nothing, timed as a whole, and LoRA on the original, held whole, at as many steps in all."""
    given = emloc_ray.load_config(QUICKSTART)
    steps = given.finetune.max_steps + given.finetune.exact_steps
    steps += given.emulator.healing.steps if given.emulator.healing else 0
    alone = [
        "emulator.compression_ratio=1.0",
        "emulator.quantization=none",
        f"finetune.max_steps={steps}",
        "finetune.exact_steps=0",
        "memory_budget=null",
    ]
    bound = emloc_ray.load_config(QUICKSTART, [f"run_dir={out / 'ratio-1.0'}", *alone])
    upper = emloc_ray.run(bound, fresh=True)  # rows that follow from installed packages may have changed
    config = emloc_ray.load_config(
        QUICKSTART, [f"run_dir={out / 'quickstart'}", f"evaluation.upper_bound={bound.run_dir}"]
    )
    begin = time.perf_counter()
    metrics = emloc_ray.run(config, fresh=True)
    wall = time.perf_counter() - begin
    losses = {name: values["loss"] for name, values in metrics["evaluation"].items()}
    peak = max(stage["peak_pss_bytes"] for stage in metrics["stages"].values()) / 2**30
    closed = gap_closed(metrics["evaluation"], Path(bound.run_dir))
    if closed is None:
        raise SystemExit(
            "LoRA on the original gained nothing, or was measured on other rows: there is no gap to close."
        )
    trained = sum(
        metrics["stages"][name]["wall_s"] for name in ("heal", "finetune", "finish") if name in metrics["stages"]
    )
    write_result(out / "quickstart.json", "whole_run", "quickstart", **_against_lora(metrics, upper))
    return {
        "quickstart wall time": figure(wall, 300, "s (baseline: the limit)"),
        "quickstart peak memory": figure(peak, 12, "GiB (baseline: the limit)"),
        "quickstart held-out loss": figure(losses["merged"], losses["original"], "nats/token"),
        **{
            f"gap closed, {name}": {
                **figure(1.0, 1.0, "share (baseline: LoRA on the original)"),
                "ours": closed[name],
                "ratio": closed[name],
            }
            for name in ("uncorrected", "corrected")
        },
        "healing, fine-tuning and finishing": figure(
            trained, upper["stages"]["finetune"]["wall_s"], "s (baseline: LoRA on the original)"
        ),
    }
