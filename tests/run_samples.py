"""What the tests of a run's page share: a manifest, metrics and a log as runs leave them."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from emloc_ray.config.steps import STEP_NAMES

BEGIN = 1.8e9
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
NAMES = [f"model.layers.{block}.{kind}" for block in (0, 1, 10, 2) for kind in LINEARS]
STAGES = ("data", "calibrate", "factorize", "finetune", "correct", "merge", "evaluate")
EVIL = '</pre><script>alert("1")</script> if a[k] < b & c:\x00\x1b\r\n\ud800'


def manifest(*stages: str) -> dict[str, Any]:
    config = {
        "model": {"source": "org/model-1b"},
        "data": {"generate": None, "train": {"path": "/data/tickets.jsonl"}},
        "emulator": {"compression_ratio": 0.25},
        "finetune": {"hub_token": "hf_hush", "max_steps": 3},
        "ray": {"runtime_env": {"env_vars": {"WANDB_KEY": "hush"}}},
    }
    asked = [stage for stage in STEP_NAMES if stage in {*STAGES, *stages}]
    done = {stage: {"finished_at": BEGIN + number, "result": {}} for number, stage in enumerate(stages)}
    return {"format": 2, "name": "run", "config": config, "stages": done, "steps": asked}


def usage(number: int) -> dict[str, Any]:
    return {
        "wall_s": 10.5 + number,
        "peak_pss_bytes": (number + 1) * 2**30,
        "peak_rss_bytes": 300 * 2**20,
        "num_workers": 2,
    }


def measures(loss: float) -> dict[str, float | int]:
    return {"loss": loss, "token_accuracy": 0.512, "num_tokens": 12345}


def finished_metrics() -> dict[str, Any]:
    losses = {"original": 4.5, "emulator": 6.75, "emulator_adapter": 4.4, "uncorrected": 4.3, "corrected": 4.21}
    candidates: list[dict[str, Any]] = [
        {"method": "none", "clamp": 3.0, "strength": 1.0, "loss": 4.34567},
        {"method": "projection", "clamp": None, "strength": 1.0, "loss": 4.35},
        {"method": "covariance", "clamp": 3.0, "strength": 0.5, "loss": 4.32109},
    ]
    counts = {"rows": 360, "tokens": 6212, "truncated_rows": 7, "truncated_tokens": 91, "dropped_rows": 4}
    layers = {
        name: {"rank": 21 + number, "relative_error": number / 50, "solver": "exact"}
        for number, name in enumerate(NAMES)
    }
    return {
        "versions": {"python": "3.12.1", "ray": "2.60.0"},
        "auto_class": "AutoModelForCausalLM",
        "hardware": {"nodes": 2, "cpus": 32.0, "gpus": 4.0, "accelerators": ["H100"]},
        "stages": {stage: usage(number) for number, stage in enumerate(STAGES)},
        "disk_bytes": {"data": 1536, "merged": 3 * 2**30},
        "data": {"train": counts, "eval": {**counts, "rows": 61}},
        "calibration": {"num_tokens": 2220, "num_shards": 8},
        "emulator": {
            "compression_ratio": 0.25,
            "parameters_kept": 0.2487,
            "parameters": 600_123,
            "original_parameters": 1_000_000,
            "mean_relative_error": 0.1636,
            "layers": layers,
        },
        "finetune": {
            "steps": 20,
            "train_loss": 5.1667,
            "history": [{"step": 10, "loss": 5.39}, {"step": 20, "loss": 5.05}],
            "trainable_parameters": 2_441_216,
            "tokens_per_second": 1725.6,
        },
        "correction": {
            **{key: candidates[2][key] for key in ("method", "clamp", "strength")},
            "selection_tokens": 694,
            "candidates": candidates,
            "modules": {name: {"before": 2.0, "after": 1.5} for name in NAMES},
        },
        "evaluation": {**{name: measures(loss) for name, loss in losses.items()}, "merged": measures(4.2105)},
        "exact_match": {"original": 0.0312, "merged": 0.4567, "num_prompts": 32},
        "gap_closed": {
            "upper_bound": "runs/bound",
            "upper_bound_loss": 4.1,
            "uncorrected": 0.5,
            "corrected": 0.725,
            "merged": 0.7238,
        },
        "generations": [{"prompt": EVIL, "reference": "fine", "original": EVIL, "merged": "fine"}],
    }


def healing_metrics() -> dict[str, Any]:
    """What ``metrics.json`` has under ``healing`` where a run heals its emulator."""
    return {
        "steps": 30,
        "train_loss": 1.25,
        "history": [{"step": 10, "loss": 2.5}, {"step": 30, "loss": 0.75}],
        "healed_layers": 14,
        "teacher_rows": 1234,
        "teacher_bytes": 3 * 2**20,
    }


def metric_keys(metrics: Any) -> set[str]:
    """The dotted keys of nested metrics; the names of layers, which every run has of its own, as ``*``."""
    if isinstance(metrics, list):
        return {key for entry in metrics for key in metric_keys(entry)}
    if not isinstance(metrics, dict):
        return set()
    found = set(metrics)
    for name, inner in metrics.items():
        rows = list(inner.values()) if name in ("layers", "modules") else inner
        found |= {f"{name}.{key}" for key in metric_keys(rows)}
    return found


def spectra() -> dict[str, list[tuple[int, float]]]:
    return {name: [(number, 0.5**number) for number in (1, 2, 5, 12, 30)] for name in NAMES}


def event(kind: str, second: float, **fields: Any) -> dict[str, Any]:
    when = datetime.fromtimestamp(BEGIN + second, timezone.utc).isoformat()
    return {"time": when, "event": kind, "message": "Something.", **fields}


def events() -> list[dict[str, Any]]:
    """Of a run that was killed in its factorization."""
    return [
        event("run_started", -40),
        event("started", -30, stage="calibrate"),
        event("finished", 1, stage="calibrate"),
        event("started", 2, stage="factorize"),
        event("progress", 12, stage="factorize", done=2, total=9),
    ]
