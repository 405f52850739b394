"""metrics.json: written with the digest of its content, and read only where it is what was written."""

import hashlib
import json
from pathlib import Path
from typing import Any

from emloc_ray.errors import ArtifactError
from emloc_ray.io.store.atomic import json_bytes, write_json

METRICS = "metrics.json"
_DIGEST = "sha256"  # of the other keys, as :func:`json_bytes` writes them


def write_metrics(path: Path, metrics: dict[str, Any]) -> None:
    """Writes the file whole, with its digest."""
    write_json(path, {**metrics, _DIGEST: _digest(metrics)})


def read_metrics(path: Path) -> dict[str, Any]:
    """The content without its digest; empty where there is no file. Raises ArtifactError where it is not JSON, no mapping, or not
    what was written. A file without a digest, as the first versions wrote it, is taken as it is."""
    try:
        metrics: Any = json.loads(path.read_bytes()) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "is not JSON") from error
    if not isinstance(metrics, dict):
        raise _damaged(path, "holds no mapping")
    written = metrics.pop(_DIGEST, None)
    if written is not None and written != _digest(metrics):
        raise _damaged(path, "was changed after it was written")
    return metrics


def _digest(metrics: dict[str, Any]) -> str:
    """The SHA-256; empty for what is nested more deeply than can have been written."""
    try:
        return hashlib.sha256(json_bytes(metrics)).hexdigest()
    except RecursionError:
        return ""


def _damaged(path: Path, what: str) -> ArtifactError:
    return ArtifactError(f"{path} {what}: remove it, and give the run's command again, which writes it anew.")
