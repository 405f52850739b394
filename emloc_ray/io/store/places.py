"""Places of runs and data: paths, and URIs of object stores."""

import os
from collections.abc import Iterator
from pathlib import Path


def is_store_uri(place: str) -> bool:
    """Whether a run's place is on an object store, not in a file system."""
    return "://" in place and not place.startswith("file://")


def below(place: str, *parts: str) -> str:
    """A place inside another, with "/" between; the query of an object store's URI stays at its end."""
    path, mark, query = place.partition("?") if is_store_uri(place) else (place, "", "")
    return "/".join((path.rstrip("/"), *parts)) + mark + query


def above(place: str, levels: int) -> str:
    """The object store's place that another is so many levels inside of: what :func:`below` was given."""
    path, mark, query = place.partition("?")
    return path.rstrip("/").rsplit("/", levels)[0] + mark + query


def looked_in(place: str) -> str:
    """Where a path was looked for, for errors: a relative one `` in /home/me``, one with a ``~`` as `` (that is /home/me/x)``."""
    path = Path(os.path.expanduser(place))
    if path.is_absolute():
        return f" (that is {path})" if place.startswith("~") else ""
    return f" in {Path.cwd()}"


def leads_out(path: str) -> bool:
    """Whether a path that is to lie inside a run is absolute, or has a ``..`` or ``.`` in it."""
    return not {"", ".", ".."}.isdisjoint(path.split("/"))


def files_below(folder: Path) -> Iterator[Path]:
    """The files in a folder and in all below it, also where links lead, but for those whose path from there on has a name with
    a leading dot. Each folder comes once, however many links lead to it."""
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        below = sorted((Path(place, name).is_symlink(), name) for name in folders if not name.startswith("."))
        folders[:] = [name for _, name in below]
        files = (Path(place, name) for name in names if not name.startswith("."))
        yield from (file for file in files if file.is_file())
