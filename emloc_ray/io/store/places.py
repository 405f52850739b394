"""Places of runs and data: paths, and URIs of object stores."""

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


def looked_in(path: Path) -> str:
    """The directory in which a relative path was looked for, for errors: `` in /home/me``."""
    return "" if path.is_absolute() else f" in {Path.cwd()}"


def leads_out(path: str) -> bool:
    """Whether a path that is to lie inside a run is absolute, or has a ``..`` or ``.`` in it."""
    return not {"", ".", ".."}.isdisjoint(path.split("/"))
