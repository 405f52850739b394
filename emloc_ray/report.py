"""report.html: one self-contained page per run, made from its manifest and metrics alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from emloc_ray.io.atomic import atomic_file
from emloc_ray.io.run_directory import RunDirectory

_TEMPLATE = "report.html.j2"


def write_report(directory: RunDirectory) -> Path:
    """Writes ``report.html`` into the run directory; what the run has not reached yet is left out."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template(_TEMPLATE).render(
        name=directory.name, metrics=directory.metrics(), config=directory.manifest().get("config", {}), gib=_gib
    )
    path = directory.path("report.html")
    with atomic_file(path) as file:
        file.write(page.encode())
    return path


def _gib(size: Any) -> str:
    return f"{float(size) / 2**30:.2f} GiB"
