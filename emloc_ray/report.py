"""report.html: one self-contained page per run, made from its manifest and metrics alone."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from emloc_ray.console import describe_choice, duration
from emloc_ray.io.atomic import atomic_file
from emloc_ray.io.run_directory import RunDirectory
from emloc_ray.io.secret_values import without_secrets
from emloc_ray.io.stored_files import shown

_TEMPLATE = "report.html.j2"
_STAGES = (
    "import",
    "data",
    "calibrate",
    "gradients",
    "allocate",
    "factorize",
    "heal",
    "finetune",
    "correct",
    "merge",
    "evaluate",
)
_OPTIONAL = {"import", "gradients", "allocate", "heal"}
# What of metrics.json each stage makes: not shown where the manifest lacks the stage, as it is to be redone.
_SECTIONS = {
    "data": ["data"],
    "calibrate": ["calibration"],
    "factorize": ["emulator"],
    "heal": ["healing"],
    "finetune": ["finetune"],
    "correct": ["correction"],
    "evaluate": ["evaluation", "exact_match", "generations", "gap_closed"],
}
_VARIANTS = {
    "original": "original",
    "emulator": "emulator",
    "emulator_adapter": "emulator + adapter",
    "uncorrected": "original + adapter, uncorrected",
    "corrected": "original + adapter, corrected",
    "merged": "merged",
}

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
    """Writes ``report.html`` into the run directory; what the run has not reached yet is left out."""
    page = render(directory.name, directory.manifest(), directory.metrics())
    path = directory.path("report.html")
    with atomic_file(path) as file:
        file.write(page.encode(errors="replace"))
    return path


def render(name: str, manifest: dict[str, Any], metrics: dict[str, Any]) -> str:
    """The page's HTML."""
    return render_page(_TEMPLATE, page_view(name, manifest, metrics))


def render_page(template: str, view: dict[str, Any]) -> str:
    """A page's HTML; ``template`` by its path inside this package."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.lstrip_blocks = True
    environment.filters |= {"size": size_text, "signed": signed, "choice": describe_choice, "duration": duration}
    environment.filters["visible"] = visible
    environment.globals |= {"bar": bar, "before_after": before_after, "share": share}
    environment.globals |= {"grids": grids, "column_tops": column_tops}
    return environment.get_template(template).render(view)


def page_view(name: str, manifest: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    """All that the template shows; a section that the run has not reached is missing or empty."""
    done: dict[str, Any] = manifest.get("stages", {})
    found = {
        key: (metrics.get(key) or {}) if stage in done else {} for stage, keys in _SECTIONS.items() for key in keys
    }
    emulator = (manifest.get("config") or {}).get("emulator") or {}
    quantized = emulator.get("quantization", "none") != "none"
    dense = emulator.get("compression_ratio") == 1 and not quantized
    method = (manifest.get("config", {}).get("adapter") or {}).get("method", "lora")
    unmerged = {"merge"} if method in ("prefix_tuning", "prompt_tuning") else set()
    heals = bool(emulator.get("healing")) and emulator.get("compression_ratio") != 1
    optional = (_OPTIONAL - {"heal"} if heals else _OPTIONAL) | unmerged
    older = older_stages(done, {*optional, "calibrate"} if dense else optional)
    usages = metrics.get("stages") or {}
    stages = [(stage, usages[stage]) for stage in sorted(usages, key=_stage_order) if stage in done]
    config = manifest.get("config") or {}
    times = [entry["finished_at"] for entry in done.values() if "finished_at" in entry]
    return {
        "name": name,
        "found": found,
        "task": describe_task(config.get("data") or {}),
        "model": (config.get("model") or {}).get("source"),
        "method": METHOD_NAMES.get(method, method),
        "ratio": emulator.get("compression_ratio"),
        "quantized": quantized,
        "progress": [
            (stage, stage in done and stage not in older) for stage in _STAGES if stage in done or stage not in optional
        ],
        "updated": datetime.fromtimestamp(max(times), timezone.utc).strftime("%Y-%m-%d %H:%M UTC") if times else None,
        "older": older,
        "evaluation": evaluation_rows(found["evaluation"]),
        "candidates": candidate_rows(found["correction"]),
        "shortfall": total_shortfall(found["correction"].get("modules", {})),
        "curve": loss_curve(found["finetune"]),
        "healing_curve": loss_curve(found["healing"]),
        "stages": stages,
        "planned": metrics.get("planned_memory") or {},
        "processes": process_rows([usage for _, usage in stages]),
        "disk": metrics.get("disk_bytes") or {},
        "versions": metrics.get("versions") or {},
        "config": yaml.safe_dump(without_secrets(config), sort_keys=False, allow_unicode=True) if config else "",
    }


def _stage_order(stage: str) -> int:
    return _STAGES.index(stage) if stage in _STAGES else len(_STAGES)


def describe_task(data: dict[str, Any]) -> str | None:
    """What the run trains on, in a word or two: the generator's or the training file's name."""
    if data.get("generate"):
        return f"generated {data['generate']}"
    paths = (data.get("train") or {}).get("path")
    if not paths:
        return None
    paths = [paths] if isinstance(paths, str) else paths
    names = [path if path.startswith("hf:") else Path(shown(path)).name for path in paths]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def older_stages(done: dict[str, Any], optional: Collection[str] = _OPTIONAL) -> list[str]:
    """Stages that finished before one ahead of them was redone, or that one ahead of them is missing for."""
    older, latest = [], 0.0
    for stage in [*_STAGES, *sorted(set(done) - set(_STAGES))]:
        if stage not in done:
            latest = latest if stage in optional else math.inf
            continue
        finished = done[stage].get("finished_at", latest)
        if finished < latest:
            older.append(stage)
        latest = max(latest, finished)
    return older


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
        for variant, label in _VARIANTS.items()
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


@dataclass(frozen=True)
class Grid:
    """Linears of one stack of blocks: a row a block, a column a kind; a cell is the layer's name, or None."""

    prefix: str
    kinds: list[str]
    rows: list[tuple[int | None, list[str | None]]]


def grids(names: Iterable[str]) -> list[Grid]:
    """Sorts layers such as ``model.layers.3.self_attn.q_proj`` into one grid a stack: the first integer is the block."""
    stacks: dict[str, dict[tuple[int | None, str], str]] = {}
    for name in names:
        parts = name.split(".")
        at = next((position for position, part in enumerate(parts) if part.isdecimal()), None)
        if at is None:
            stacks.setdefault("", {})[None, name] = name
        else:
            stacks.setdefault(".".join(parts[:at]), {})[int(parts[at]), ".".join(parts[at + 1 :])] = name
    found = []
    for prefix, cells in stacks.items():
        kinds = list(dict.fromkeys(kind for _, kind in cells))
        blocks = sorted({block for block, _ in cells}, key=lambda block: -1 if block is None else block)
        rows = [(block, [cells.get((block, kind)) for kind in kinds]) for block in blocks]
        found.append(Grid(prefix, shortest_suffixes(kinds), rows))
    return found


def column_tops(grid: Grid, modules: dict[str, dict[str, float]]) -> dict[str, float]:
    """For each module of a grid, the largest number that its column holds."""
    tops: dict[str, float] = {}
    for column in zip(*(names for _, names in grid.rows), strict=True):
        present = [name for name in column if name is not None]
        tops |= dict.fromkeys(present, max(max(modules[name].values()) for name in present))
    return tops


def shortest_suffixes(names: Sequence[str]) -> list[str]:
    """Every dotted name's shortest ending that no other one shares: ``q_proj`` for ``self_attn.q_proj``."""
    endings = {name: [".".join(name.split(".")[at:]) for at in range(name.count("."), -1, -1)] for name in names}
    counts = Counter(ending for options in endings.values() for ending in options)
    return [next((ending for ending in endings[name] if counts[ending] == 1), name) for name in names]


def share(value: float, top: float) -> float:
    """``value`` of ``top``, kept within 0 and 1; 0 where that makes no sense."""
    return min(max(value / top, 0.0), 1.0) if top > 0 and math.isfinite(value / top) else 0.0


def bar(value: float, top: float, mark: float | None = None, kind: str = "") -> Markup:
    """A horizontal bar from zero; ``mark`` draws a line to compare with. Stretches to the width that it is given."""
    x = 100 * share(mark or 0, top)
    line = f'<path class="mark" d="M{x:.2f} 0V10" vector-effect="non-scaling-stroke"/>' if mark is not None else ""
    return Markup(
        f'<svg class="bar {Markup.escape(kind)}" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="fill" y="1" width="{100 * share(value, top):.2f}" height="8"/>{line}</svg>'
    )


def before_after(before: float, after: float, top: float) -> Markup:
    """Two thin bars, one above the other."""
    rects = "".join(
        f'<rect class="{name}" y="{y}" width="{100 * share(value, top):.2f}" height="4"/>'
        for name, y, value in (("before", 0, before), ("after", 5, after))
    )
    return Markup(f'<svg class="pair" viewBox="0 0 100 9" preserveAspectRatio="none" aria-hidden="true">{rects}</svg>')


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers, evenly spaced, that enclose ``low`` and ``high``; at most ``most`` steps."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if span / (power * factor) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def loss_curve(training: dict[str, Any]) -> dict[str, Any] | None:
    """The curve of a training's logged losses."""
    return curve([(float(entry["step"]), entry["loss"]) for entry in training.get("history", []) if "loss" in entry])


def curve(points: Sequence[tuple[float, float]]) -> dict[str, Any] | None:
    """A line through the points as SVG that stretches, and where its labels go, in per cent of its height and width."""
    points = [point for point in points if math.isfinite(point[1])]
    if not points:
        return None
    ticks = nice_ticks(min(y for _, y in points), max(y for _, y in points))
    low, high, first, last = ticks[0], ticks[-1], points[0][0], points[-1][0]
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    heights = [100 - 100 * (tick - low) / (high - low) for tick in ticks]
    placed = [(100 * (x - first) / ((last - first) or 1), 100 - 100 * (y - low) / (high - low)) for x, y in points]
    fixed = 'vector-effect="non-scaling-stroke"'
    lines = "".join(f'<path class="rule" d="M0 {y:.2f}H100" {fixed}/>' for y in heights)
    route = "L".join(f"{x:.2f} {y:.2f}" for x, y in placed)
    dots = "".join(
        f'<path class="dot" d="M{px:.2f} {py:.2f}h.01" {fixed}><title>step {x:g}: {y:.4f}</title></path>'
        for (px, py), (x, y) in zip(placed, points, strict=True)
    )
    svg = Markup(
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img"'
        f' aria-label="training loss, {points[0][1]:.3f} at step {first:g} to {points[-1][1]:.3f} at step {last:g}">'
        f'{lines}<path class="line" d="M{route}" {fixed}/>{dots if len(points) <= 80 else ""}</svg>'
    )
    labels = [(f"{tick:.{digits}f}", f"{y:.2f}") for tick, y in zip(ticks, heights, strict=True)]
    return {"svg": svg, "ticks": labels, "first": f"{first:g}", "last": f"{last:g}"}


def size_text(size: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power:
            number = size / 2**power
            return f"{number:.0f} {unit}" if number >= 100 else f"{number:.{2 if number < 10 else 1}f} {unit}"
    return f"{size:.0f} B"


def signed(value: float, digits: int = 4) -> str:
    """A number with its sign, a true minus among them; what rounds to nothing has none."""
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text if re.search("[1-9n]", text) else text[1:]


def visible(text: str) -> str:
    """A text as models write it, with control characters made visible (␀): HTML has no place for them."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda found: chr(0x2400 + ord(found[0])), text)
    return re.sub(r"[\x7f-\x9f\ud800-\udfff]", "\ufffd", text)
