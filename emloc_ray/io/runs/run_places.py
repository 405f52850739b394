"""Whether a folder, or a run's place on an object store, can be written, and holds nothing of others."""

import tempfile
import uuid
from collections.abc import Iterable
from pathlib import Path

from emloc_ray.errors import ArtifactError, ConfigError
from emloc_ray.io.store.lease import KEY as LEASE
from emloc_ray.io.store.lock_file import NAME as LOCK
from emloc_ray.io.store.object_store import MANIFEST, ObjectStore


def check_folder(root: Path, what: str) -> None:
    """Raises ConfigError where the folder of ``what`` cannot be made or written; leaves no trace."""
    existing = root
    try:
        while not existing.exists():
            existing = existing.parent
    except (OSError, ValueError) as error:
        raise ConfigError(f"{what} {root} is no usable path ({error}): name another.") from error
    if not existing.is_dir():
        raise ConfigError(f"{what} {root}: {existing} is a file, not a directory: name another place.")
    try:  # asked of the file system itself: access rights alone do not tell
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ConfigError(f"{what} {root} cannot be written ({error.strerror}): name another place.") from error


def check_store(store: ObjectStore) -> None:
    """Raises ConfigError where an object store cannot be written, or keeps no two processes from one run."""
    if not store.prefix:
        raise ConfigError(f"run_dir {store.uri} is a whole bucket: name a folder in it.")
    try:
        store.check_conditions(f"{LEASE}.{uuid.uuid4().hex}")
    except (ArtifactError, ConfigError) as error:
        raise ConfigError(f"run_dir: {error}") from error


def check_empty(place: str, names: Iterable[str]) -> None:
    """Raises ConfigError where a place without a manifest holds more than a run that was killed while it wrote its first one."""
    others = [
        name for name in names if name not in (LOCK, LEASE) and not name.startswith((f"{LEASE}.", f".{MANIFEST}."))
    ]
    if others:
        raise ConfigError(
            f"run_dir {place} holds files of something else ({', '.join(sorted(others)[:3])}) and no {MANIFEST}: name a new or"
            " empty directory."
        )


def check_holds_no_run(place: str, root: Path | ObjectStore) -> None:
    """Raises ConfigError where a folder of a run holds another run: who empties the one removes the other."""
    if isinstance(root, Path):
        files = [file.relative_to(root).as_posix() for file in root.rglob(MANIFEST)]
    else:
        files = root.files("")
    inside = sorted(file for file in files if file.endswith(f"/{MANIFEST}"))
    if inside:
        raise ConfigError(
            f"run_dir {place} holds another run ({inside[0]}), which --fresh would remove: move that out, or remove it yourself."
        )
