"""The manifest of a run or a batch as it is stored: its format, and the times in its entries."""

import json
import math
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from emloc_ray.errors import ArtifactError
from emloc_ray.io.store.places import leads_out

FORMAT = 2
_PARTS: dict[str, Any] = {
    **dict.fromkeys(("stages", "config", "begun", "tries", "adopted"), dict),
    **{"steps": list, "redo": list, "lease": int, "adopting": int | None, "fresh": bool, "outdated": str},
}
_CONFIG: dict[str, Any] = {"model": dict, "data": dict}
_ENTRY: dict[str, Any] = {"finished_at": int | float, "confirmed_at": int | float, "outputs": dict, "result": dict}


def parse_manifest(content: bytes, path: Path) -> dict[str, Any]:
    """The manifest that the file at ``path`` holds; raises ArtifactError where it is none of this format."""
    try:
        manifest: Any = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not JSON: restore it, or remove {path.parent}.") from error
    if not _is_manifest(manifest):
        raise ArtifactError(f"{path} is no manifest of a run: name a new or empty directory.")
    if manifest.get("format") != FORMAT:
        raise ArtifactError(
            f"{path} has format {manifest.get('format')!r}, and this version reads {FORMAT}: use the version of"
            " emloc_ray that wrote it, or name a new directory."
        )
    # A stage that is redone removes the files that are named here, and the manifest may be anybody's.
    named = (name for entry in manifest["stages"].values() for name in entry.get("outputs", ()))
    outside = next(filter(leads_out, named), None)
    if outside is not None:
        raise ArtifactError(f"{path} names {outside!r}, which is outside of its run: name a new or empty directory.")
    return manifest


def _is_manifest(manifest: Any) -> TypeGuard[dict[str, Any]]:
    if not _holds(manifest, _PARTS) or "stages" not in manifest:
        return False
    is_run = manifest.get("kind", "run") == "run"
    entries = manifest["stages"].values()
    return (not is_run or _holds(manifest.get("config", {}), _CONFIG)) and all(
        _holds(entry, _ENTRY) and all(isinstance(file, dict) for file in entry.get("outputs", {}).values())
        for entry in entries
    )


def _holds(value: Any, kinds: Mapping[str, Any]) -> bool:
    """Whether a value is a mapping in which each of these keys that is there has a value of its kind."""
    return isinstance(value, dict) and all(isinstance(value[key], kind) for key, kind in kinds.items() if key in value)


def confirmed_at(entry: Mapping[str, Any]) -> float:
    """When a manifest's entry was last known to be right: when its stage finished, or was confirmed since."""
    known: float = max(entry["finished_at"], entry.get("confirmed_at", 0.0))
    return known


def after_all(manifest: Mapping[str, Any]) -> float:
    """Now, but after all that a manifest's stages say, whatever this machine's clock says: by these times stages are known to
    stand or not."""
    return max([time.time(), *(math.nextafter(confirmed_at(e), math.inf) for e in manifest["stages"].values())])


def ask_to_redo(manifest: dict[str, Any], stages: Sequence[str]) -> None:
    """Notes in a manifest that stages are to be redone, from their begin."""
    redo = [*dict.fromkeys([*manifest.get("redo", ()), *stages])]
    for name in stages:
        end_tries(manifest, name)
    manifest["redo"] = redo


def confirm(manifest: dict[str, Any], name: str, ahead: Collection[str]) -> bool:
    """Notes in a manifest that a finished stage's inputs were seen to be what they were; whether there was need, as a stage
    ``ahead`` was done since, or it was held to be out of date."""
    stages, entry = manifest["stages"], manifest["stages"].get(name)
    newest = max((confirmed_at(stages[stage]) for stage in ahead if stage in stages), default=0.0)
    if entry is None or (confirmed_at(entry) >= newest and manifest.get("outdated") != name):
        return False
    entry["confirmed_at"] = max(time.time(), newest)
    end_tries(manifest, name)
    return True


def end_tries(manifest: dict[str, Any], name: str) -> None:
    """Takes out of a manifest what is noted of a stage that is not finished, or out of date."""
    if manifest.get("outdated") == name:
        del manifest["outdated"]
    for key in ("begun", "tries"):
        manifest.get(key, {}).pop(name, None)
    if name in manifest.get("redo", ()):
        manifest["redo"].remove(name)
