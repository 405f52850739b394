"""Files of others on an object store, such as a user's data: found by pattern, read by ranges under their own names.

``%`` in a URI escapes what is not to be taken for a part of it, and options follow a ``?``.
"""

import fnmatch
import functools
import re
from collections.abc import Collection, Sequence
from pathlib import PurePosixPath
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from emloc_ray.errors import ConfigError
from emloc_ray.io.store.objects import ObjectFile, Objects
from emloc_ray.io.store.places import is_store_uri

_MAGIC = re.compile(r"[*?[]")
_ESCAPED = re.compile(r"[%?#\x00-\x1f]")


def find_stored(pattern: str, key: str, suffixes: Collection[str]) -> list[str]:
    """The URIs of the file, the files of the glob, or the files below the directory with ``suffixes`` that a URI names.

    A glob is read as ``glob.glob(recursive=True)`` reads it, but for ``?``, which has to be ``%3F``. The order is that of
    sorted :class:`pathlib.Path` s. Raises ConfigError, naming the config's ``key``, where the URI holds credentials or names no
    store, ArtifactError where the store does not answer.
    """
    store, path = _place(pattern, key)
    try:
        files = _matching_files(store, path, suffixes)
    except ValueError as error:  # no name that a store can have
        raise ConfigError(f"{key} {pattern} is no place that obstore can open ({error}): name another.") from error
    return [_uri(store, file) for file in sorted(files, key=lambda file: file.split("/"))]


def is_hidden(parts: Sequence[str]) -> bool:
    """Whether a file's path below a directory holds a name that begins with a dot, which globs do not match either: editors
    and notebooks leave copies there."""
    return any(part.startswith(".") for part in parts)


def _matching_files(store: Objects, path: str, suffixes: Collection[str]) -> list[str]:
    parts = path.split("/")
    plain = next((number for number, part in enumerate(parts) if _MAGIC.search(part)), None)
    if plain is None and store.find(path) is not None:
        return [path]
    if plain is None:
        inside = [file for file in store.files(path) if file.lower().endswith(tuple(suffixes))]
        return [file for file in inside if not is_hidden(PurePosixPath(file).relative_to(path).parts)]
    return [file for file in store.files("/".join(parts[:plain])) if _fits(file.split("/"), parts)]


def shown(place: str) -> str:
    """A path or a URI as people are to read it: a URI without its options."""
    return place.partition("?")[0] if is_store_uri(place) else place


class StoredFile(ObjectFile):
    """A file of a user's, by its URI. Raises FileNotFoundError where there is none, ArtifactError where the store does not
    answer, here or while it is read."""

    def __init__(self, uri: str) -> None:
        store, path = _place(uri, "data")
        stored = store.find(path)
        if stored is None:
            raise FileNotFoundError(f"{shown(uri)} is not there")
        super().__init__(store, stored)

    @property
    def version(self) -> str:
        """What tells its content from another's: its size and ETag or, where the store gives none, its size and time."""
        return f"{self.stored.size} {self.stored.e_tag or self.stored.modified}"


@functools.lru_cache(maxsize=16)
def _store(uri: str, key: str) -> Objects:
    return Objects(uri, key)


def _place(uri: str, key: str) -> tuple[Objects, str]:
    """The store at the URI's root, of which a process opens one, and the path in it."""
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise ConfigError(f"{key} {uri} is no place that obstore can open ({error}): name another.") from error
    root = urlunsplit((parts.scheme, parts.netloc, "", parts.query, ""))
    return _store(root, key), unquote(parts.path).strip("/")


def _uri(store: Objects, path: str) -> str:
    root, mark, options = store.uri.partition("?")
    return f"{root}/{_ESCAPED.sub(lambda match: quote(match[0]), path)}{mark}{options}"


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a glob's parts match a path's: ``**`` any directories, names with a leading dot only such a pattern."""
    if not pattern or not parts:
        return not parts and not pattern
    if pattern[0] == "**" and len(pattern) > 1:
        below = not parts[0].startswith(".") and _fits(parts[1:], pattern)
        return below or _fits(parts, pattern[1:])
    if pattern[0] == "**":
        return not any(part.startswith(".") for part in parts)
    hidden = parts[0].startswith(".") and not pattern[0].startswith(".")
    return not hidden and fnmatch.fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])
