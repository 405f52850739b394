"""The manifest of a run or a batch as it is stored: its format, and the times in its entries."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emloc_ray.errors import ArtifactError
from emloc_ray.io.store.places import leads_out

FORMAT = 2


def parse_manifest(content: bytes, path: Path) -> dict[str, Any]:
    """The manifest that the file at ``path`` holds; raises ArtifactError where it is none of this format."""
    try:
        manifest: Any = json.loads(content)
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON: restore it, or remove {path.parent}.") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("stages"), dict):
        raise ArtifactError(f"{path} is no manifest of a run: name a new or empty directory.")
    if manifest.get("format") != FORMAT:
        raise ArtifactError(
            f"{path} has format {manifest.get('format')!r}, and this version reads {FORMAT}: use the version of"
            " emloc_ray that wrote it, or name a new directory."
        )
    # What is redone is removed, whoever wrote the manifest.
    named = (name for entry in manifest["stages"].values() for name in entry.get("outputs", ()))
    outside = next(filter(leads_out, named), None)
    if outside is not None:
        raise ArtifactError(f"{path} names {outside!r}, which is outside of its run: name a new or empty directory.")
    return manifest


def confirmed_at(entry: Mapping[str, Any]) -> float:
    """When a manifest's entry was last known to be right: when its stage finished, or was confirmed since."""
    known: float = max(entry["finished_at"], entry.get("confirmed_at", 0.0))
    return known
