"""report.html: one self-contained page per run, without a script, made from its manifest, metrics and log."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2

from emloc_ray.config.schema import PROMPT_METHODS
from emloc_ray.config.steps import STEPS
from emloc_ray.errors import ArtifactError
from emloc_ray.io.formats.yaml_text import write_yaml
from emloc_ray.io.runs.directory import SPECTRA, RunDirectory
from emloc_ray.io.runs.secret_values import without_secrets
from emloc_ray.io.store.atomic import atomic_file
from emloc_ray.io.store.node_cache import ensure, exists
from emloc_ray.io.store.stored_files import shown
from emloc_ray.runs.log import read_events
from emloc_ray.runs.reporter import Reporter
from emloc_ray.runs.status import asked_steps, older_stages
from emloc_ray.runs.trace import TRACE
from emloc_ray.stages.order import STEPS as STAGES
from emloc_ray.text import counted, describe_choice, duration, listed, signed, size, visible
from emloc_ray.ui.drawing import bar, before_after, loss_curve, share
from emloc_ray.ui.layer_grids import column_tops, grids, heat_cells, shortfall_cells
from emloc_ray.ui.terminal import VARIANTS
from emloc_ray.ui.timeline import draw, run_lines

_TEMPLATE = "report.html.j2"

METHOD_NAMES = {
    "lora": "LoRA",
    "rslora": "rsLoRA",
    "dora": "DoRA",
    "loha": "LoHa",
    "lokr": "LoKr",
    "vera": "VeRA",
    "ia3": "IA³",
    "prefix_tuning": "prefix tuning",
    "prompt_tuning": "prompt tuning",
}


def write_report(directory: RunDirectory) -> Path:
    """Writes ``report.html`` into the run directory; leaves out what the run has not reached yet."""
    found = directory.manifest(), directory.metrics(), read_events(directory), _read_spectra(directory)
    html = render(directory.name, *found, has_trace=exists(directory.path(TRACE)))
    path = directory.path("report.html")
    with atomic_file(path) as file:
        file.write(html.encode(errors="replace"))
    return path


class PageReporter(Reporter):
    """Keeps a run's ``report.html`` at what the run has reached."""

    def changed(self, run: RunDirectory) -> None:
        """Writes the page anew."""
        write_report(run)


def _read_spectra(directory: RunDirectory) -> dict[str, Any]:
    path = directory.path("emulator", SPECTRA)
    with contextlib.suppress(ArtifactError, OSError, ValueError):  # of an older version, or on its way to be redone
        ensure(path)
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    return {}


def render(
    name: str,
    manifest: dict[str, Any],
    metrics: dict[str, Any],
    events: Sequence[Mapping[str, Any]] = (),
    spectra: Mapping[str, Any] | None = None,
    has_trace: bool = False,
) -> str:
    """The page's HTML, of what a run's ``manifest.json``, ``metrics.json``, ``log.jsonl`` and the emulator's samples of
    spectra hold; ``has_trace``: beside it lies ``trace.json``."""
    view = page_view(name, manifest, metrics, events, spectra)
    return render_page(_TEMPLATE, {**view, "has_trace": has_trace})


def render_page(template: str, view: dict[str, Any]) -> str:
    """A page's HTML; ``template`` by its name in ``templates/``."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.lstrip_blocks = True
    environment.filters |= {
        "size": size,
        "signed": signed,
        "duration": duration,
        "counted": counted,
        "visible": visible,
    }
    environment.filters["choice"] = describe_choice
    environment.globals |= {"bar": bar, "before_after": before_after, "share": share}
    environment.globals |= {"grids": grids, "column_tops": column_tops}
    return environment.get_template(template).render(view)


def page_view(
    name: str,
    manifest: dict[str, Any],
    metrics: dict[str, Any],
    events: Sequence[Mapping[str, Any]] = (),
    spectra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All that the template shows; a section that the run has not reached is missing or empty."""
    done: dict[str, Any] = manifest.get("stages", {})
    found = {key: (metrics.get(key) or {}) if stage.name in done else {} for stage in STAGES for key in stage.keys}
    config = manifest.get("config") or {}
    emulator, method = config.get("emulator") or {}, (config.get("adapter") or {}).get("method", "lora")
    optional = set(STEPS) - set(asked_steps(manifest))
    older = older_stages(manifest)
    usages = metrics.get("stages") or {}
    stages = [(stage, usages[stage]) for stage in sorted(usages, key=_stage_order) if stage in done]
    planned = metrics.get("planned_memory") or {}
    times = [entry["finished_at"] for entry in done.values() if "finished_at" in entry]
    return {
        "name": name,
        "found": found,
        "task": describe_task(config.get("data") or {}),
        "model": (config.get("model") or {}).get("source"),
        "method": METHOD_NAMES.get(method, method),
        "merges": method not in PROMPT_METHODS,
        "ratio": emulator.get("compression_ratio"),
        "quantized": emulator.get("quantization", "none") != "none",
        "progress": [
            (stage, stage in done and stage not in older) for stage in STEPS if stage in done or stage not in optional
        ],
        "updated": datetime.fromtimestamp(max(times), timezone.utc).strftime("%Y-%m-%d %H:%M UTC") if times else None,
        "older": older,
        "evaluation": evaluation_rows(found["evaluation"]),
        "candidates": candidate_rows(found["correction"]),
        "shortfall": total_shortfall(found["correction"].get("modules", {})),
        "shortfalls": shortfall_cells(found["correction"].get("modules", {})),
        "cells": heat_cells(found["emulator"].get("layers") or {}, spectra or {}),
        "curve": loss_curve(found["finetune"]),
        "healing_curve": loss_curve(found["healing"]),
        "stages": stages,
        "timeline": draw(run_lines(manifest, events), "the stages of the run"),
        "planned": planned,
        "most_memory": max([*(usage["peak_rss_bytes"] for _, usage in stages), *planned.values()], default=0),
        "processes": process_rows([usage for _, usage in stages]),
        "disk": metrics.get("disk_bytes") or {},
        "versions": metrics.get("versions") or {},
        "config": write_yaml(without_secrets(config)) if config else "",
    }


def _stage_order(stage: str) -> int:
    return STEPS.index(stage) if stage in STEPS else len(STEPS)


def describe_task(data: dict[str, Any]) -> str | None:
    """What the run trains on, in a word or two: the generator's or the training file's name."""
    if data.get("generate"):
        return f"generated {data['generate']}"
    paths = (data.get("train") or {}).get("path")
    if not paths:
        return None
    paths = [paths] if isinstance(paths, str) else paths
    names = [path if path.startswith("hf:") else Path(shown(path)).name for path in paths]
    return listed(names)


def evaluation_rows(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """The variants in order, each with its label, its measures and its gain against the original."""
    original = evaluation.get("original", {}).get("loss")
    return [
        {
            "label": label,
            "variant": variant,
            "gain": None if original is None or variant == "original" else original - evaluation[variant]["loss"],
            **evaluation[variant],
        }
        for variant, label in VARIANTS.items()
        if variant in evaluation
    ]


def candidate_rows(correction: dict[str, Any]) -> list[dict[str, Any]]:
    """The correction's candidates, each with its gain against ``none`` on the selection rows, and that gain's standard
    error where it is known; one is the chosen."""
    candidates = correction.get("candidates", [])
    keys = ("method", "clamp", "strength")
    plain = next((c["loss"] for c in candidates if c["method"] == "none"), None)
    return [
        {
            "standard_error": None,
            **candidate,
            "gain": None if plain is None or candidate["loss"] is None else plain - candidate["loss"],
            "chosen": all(candidate[key] == correction[key] for key in keys),
        }
        for candidate in candidates
    ]


def total_shortfall(modules: dict[str, dict[str, float]]) -> dict[str, float] | None:
    """All modules' shortfalls together (the root of their sum of squares), before and after."""
    if not modules:
        return None
    return {key: math.hypot(*(module[key] for module in modules.values())) for key in ("before", "after")}


def process_rows(usages: Sequence[dict[str, Any]]) -> list[tuple[str, list[int | None]]]:
    """The peak of each kind of process in each stage, the largest kind first."""
    peaks = [usage.get("processes", {}) for usage in usages]
    largest = {name: max(stage.get(name, 0) for stage in peaks) for stage in peaks for name in stage}
    return [(name, [stage.get(name) for stage in peaks]) for name in sorted(largest, key=lambda name: -largest[name])]
