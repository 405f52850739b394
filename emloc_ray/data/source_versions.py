"""Counted files against what is there now: what identifies their rows, and whether any has changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from emloc_ray.data.reading import SourceFile, changed, each
from emloc_ray.io.runs.fingerprint import fingerprint, fingerprint_large_files, look_of
from emloc_ray.io.store.stored_files import StoredFile


def fingerprint_sources(sources: Sequence[SourceFile]) -> str:
    """A hash of counted files: of local ones as :func:`fingerprint_large_files`, of stored ones by name and version; of
    the images that they name; and of the shares that they are in. Raises DataError naming the first local file that has changed
    since its rows were counted."""
    for source in sources:
        path = Path(source.path)
        if source.looked and (not path.is_file() or look_of(path) != source.looked):
            raise changed(source)
    local = fingerprint_large_files(Path(source.path) for source in sources if not source.is_stored)
    stored = [[PurePosixPath(source.name).name, source.version] for source in sources if source.is_stored]
    images = [source.images for source in sources if source.images]
    shares = [source.part for source in sources]
    others = [stored, images, *([shares] if any(shares) else [])]
    return fingerprint([local, *others]) if any(others) else local


def check_stored(sources: Iterable[SourceFile]) -> None:
    """Asks the store for every stored file. Raises DataError naming the first that has changed since its rows were counted, or
    is gone; ArtifactError where the store does not answer."""
    stored = {source.path: source for source in sources if source.is_stored}
    each(_check_stored, list(stored.values()), stored=bool(stored))


def _check_stored(source: SourceFile) -> None:
    try:
        with StoredFile(source.path) as file:
            version = file.version
    except FileNotFoundError as error:
        raise changed(source) from error
    if version != source.version:
        raise changed(source)
