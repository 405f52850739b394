"""report.html: one self-contained page per run, without a script, made from its manifest, metrics and log."""

import contextlib
import functools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2

from emloc_ray.config.adapter import PROMPT_METHODS
from emloc_ray.config.steps import STEP_NAMES, served_variant
from emloc_ray.errors import ArtifactError
from emloc_ray.io.formats.yaml_text import write_yaml
from emloc_ray.io.runs.directory import SPECTRA, RunDirectory
from emloc_ray.io.runs.secret_values import without_secrets
from emloc_ray.io.store.atomic import write_bytes
from emloc_ray.io.store.node_cache import ensure, exists
from emloc_ray.runs.log import read_events
from emloc_ray.runs.reporter import Reporter
from emloc_ray.runs.status import asked_steps, begun_stage, current_stages, newest_try, older_stages
from emloc_ray.runs.trace import TRACE
from emloc_ray.stages.order import STEPS as STAGES
from emloc_ray.text import (
    counted,
    describe_choice,
    described_bits,
    duration,
    listed,
    signed,
    size,
    visible,
    whole_percent,
)
from emloc_ray.ui.cards import METHOD_NAMES, describe_task, write_cards
from emloc_ray.ui.drawing import bar, before_after, block_errors, loss_curve, share, validation_curve
from emloc_ray.ui.layer_grids import column_tops, grids, heat_cells, shortfall_cells, total_shortfall
from emloc_ray.ui.terminal import evaluation_rows
from emloc_ray.ui.timeline import COLOURS, draw, run_lines

_TEMPLATE = "report.html.j2"


def write_report(directory: RunDirectory) -> Path:
    """Writes ``report.html`` into the run directory; leaves out what the run has not reached yet."""
    records = directory.manifest(), directory.metrics(), read_events(directory), _read_spectra(directory)
    return write_page(directory, render(directory.name, *records, has_trace=exists(directory.path(TRACE))))


def write_page(directory: RunDirectory, html: str) -> Path:
    """Writes ``report.html`` into a run's or a batch's directory, whole; returns its path."""
    path = directory.path("report.html")
    write_bytes(path, html.encode(errors="replace"))
    return path


class PageReporter(Reporter):
    """Keeps a run's ``report.html`` and its results' cards at what the run has reached."""

    def changed(self, run: RunDirectory) -> None:
        """Writes them again."""
        write_report(run)
        write_cards(run)


def _read_spectra(directory: RunDirectory) -> dict[str, Any]:
    path = directory.path("emulator", SPECTRA)
    with contextlib.suppress(ArtifactError, OSError, ValueError):  # of an older version, or on its way to be redone
        ensure(path)
        return json.loads(path.read_bytes())
    return {}


def render(
    name: str,
    manifest: dict[str, Any],
    metrics: dict[str, Any],
    events: Sequence[Mapping[str, Any]] = (),
    spectra: Mapping[str, Any] | None = None,
    has_trace: bool = False,
) -> str:
    """The page's HTML, from the contents of a run's ``manifest.json``, ``metrics.json``, ``log.jsonl`` and the emulator's
    sampled spectra; ``has_trace``: whether there is a ``trace.json`` beside it."""
    view = page_view(name, manifest, metrics, events, spectra)
    return render_page(_TEMPLATE, {**view, "has_trace": has_trace})


def render_page(template: str, view: dict[str, Any]) -> str:
    """A page's HTML; ``template`` is the name of a file in ``templates/``."""
    return _environment(STEP_NAMES).get_template(template).render(view)


@functools.cache  # to compile a template takes longer than to fill it
def _environment(step_names: tuple[str, ...]) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        function.__name__: function for function in (size, signed, duration, counted, visible, whole_percent)
    }
    environment.filters |= {"choice": describe_choice, "headings": headings}
    functions = (bar, before_after, share, grids, column_tops, served_variant)
    environment.globals |= {
        "STEP_NAMES": step_names,
        "COLOURS": COLOURS,
        **{function.__name__: function for function in functions},
    }
    return environment


def last_minute(moments: Sequence[float]) -> str | None:
    """The last of some moments in seconds since 1970, as a page shows it; None of none."""
    if not moments:
        return None
    return datetime.fromtimestamp(max(moments), timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def page_view(
    name: str,
    manifest: dict[str, Any],
    metrics: dict[str, Any],
    events: Sequence[Mapping[str, Any]] = (),
    spectra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All that the template shows; a section that the run has not reached is missing or empty."""
    done: dict[str, Any] = manifest.get("stages", {})
    results = {
        key: (metrics.get(key) or {}) if stage.name in done else {} for stage in STAGES for key in stage.metrics_keys
    }
    config = manifest.get("config") or {}
    emulator, method = config.get("emulator") or {}, (config.get("adapter") or {}).get("method", "lora")
    current, newest = current_stages(manifest), newest_try(events)
    usages = metrics.get("stages") or {}
    stages = [(stage, usages[stage]) for stage in STEP_NAMES if stage in usages and stage in done]
    return {
        "name": name,
        "results": results,
        "task": describe_task(config.get("data") or {}),
        "model": (config.get("model") or {}).get("source"),
        "method": METHOD_NAMES.get(method, method),
        "merges": method not in PROMPT_METHODS,
        "ratio": emulator.get("compression_ratio"),
        "budget": emulator.get("budget"),
        "bits": described_bits(emulator.get("quantization", "none")),
        "progress": [(stage, stage in current) for stage in asked_steps(manifest)],
        "begun": begun_stage(newest)[0],
        "ending": _ending(newest),
        "updated": last_minute([entry["finished_at"] for entry in done.values() if "finished_at" in entry]),
        "older": older_stages(manifest),
        "evaluation": evaluation_rows(results["evaluation"]),
        "candidates": candidate_rows(results["correction"]),
        "shortfall": total_shortfall(results["correction"].get("modules", {}).values()),
        "shortfalls": shortfall_cells(results["correction"].get("modules", {})),
        "cells": heat_cells(results["emulator"].get("layers") or {}, spectra or {}),
        "curve": loss_curve(results["finetune"]),
        "validation_curve": validation_curve(results["finetune"]),
        "block_errors": block_errors(results["refinement"]),
        "healing_curve": loss_curve(results["healing"]),
        "finishing_curve": loss_curve(results["finishing"]),
        "stages": stages,
        "own": [(stage, usage) for stage, usage in stages if "taken_from" not in usage],
        "timeline": draw(run_lines(manifest), "the stages of the run"),
        **_memory_view(metrics, stages),
        "disk": metrics.get("disk_bytes") or {},
        "base_model": metrics.get("base_model"),
        "auto_class": metrics.get("auto_class", "AutoModelForCausalLM"),
        "hardware": describe_hardware(metrics.get("hardware") or {}),
        "versions": metrics.get("versions") or {},
        "config": write_yaml(without_secrets(config)) if config else "",
    }


def _ending(newest: Sequence[Mapping[str, Any]]) -> str | None:
    """How a run's newest try failed or was stopped: its last word, where it is one of these."""
    last = newest[-1] if newest else {"event": "run_started"}
    ends = {"run_failed": "Failed", "run_stopped": "Stopped"}
    if last["event"] not in ends:
        return None
    where = f"{ends[last['event']]}{f' in {stage}' if (stage := last.get('stage')) else ''}"
    return f"{where}, {last_minute([datetime.fromisoformat(last['time']).timestamp()])}: {last['message']}"


def _memory_view(metrics: Mapping[str, Any], stages: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """What a worker of each stage was planned to take and took, of a GPU where it had one; a run of an older version, which does
    not tell what was planned of a GPU, has no plan beside that."""
    imports = metrics.get("planned_imports_bytes", 0)  # which runs of older versions do not tell apart
    planned = {stage: bytes_planned - imports for stage, bytes_planned in (metrics.get("planned_memory") or {}).items()}
    key = "peak_above_imports_bytes" if imports else "peak_rss_bytes"
    on_gpus = {stage: usage["peak_gpu_bytes"] for stage, usage in stages if "peak_gpu_bytes" in usage}
    held = {**{stage: usage[key] for stage, usage in stages if key in usage}, **on_gpus}
    planned = {stage: held for stage, held in planned.items() if stage not in on_gpus} | {
        stage: held for stage, held in (metrics.get("planned_gpu_bytes") or {}).items() if stage in on_gpus
    }
    most = max([*held.values(), *planned.values()], default=0)
    return {"planned": planned, "held": held, "on_gpus": on_gpus, "above_imports": bool(imports), "most_memory": most}


def describe_hardware(hardware: Mapping[str, Any]) -> str | None:
    """Ray's nodes, CPUs and GPUs in a line: ``2 nodes, 32 CPUs, 4 GPUs (H100)``; None where they are not known."""
    if not hardware:
        return None
    gpus, names = round(hardware["gpus"]), listed(hardware["accelerators"])
    parts = [counted(hardware["nodes"], "node"), counted(round(hardware["cpus"]), "CPU")]
    parts.append(counted(gpus, "GPU") + (f" ({names})" if names else "") if gpus else "no GPU")
    return ", ".join(parts)


def headings(html: str) -> list[tuple[str, str]]:
    """The id and the heading of each section of a page, for its contents."""
    return re.findall(r'<section id="([\w-]+)">\s*<h2>(.*?)</h2>', html)


def candidate_rows(correction: dict[str, Any]) -> list[dict[str, Any]]:
    """The correction's candidates, each with its gain over ``none`` on the selection rows, that gain's standard error and
    how sure it is where these are known, and whether it was chosen."""
    candidates = correction.get("candidates", [])
    keys = ("method", "clamp", "strength")
    plain = next((c["loss"] for c in candidates if c["method"] == "none"), None)
    return [
        {
            "standard_error": None,
            "certainty": None,
            "interpolated": False,
            **candidate,
            "gain": None if plain is None or candidate["loss"] is None else plain - candidate["loss"],
            "chosen": all(candidate[key] == correction[key] for key in keys),
        }
        for candidate in candidates
    ]
