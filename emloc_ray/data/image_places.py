"""The places that rows' images may be read from: the data file's folder or bucket, public URLs, and those of the config."""

from __future__ import annotations

import io
import os
import posixpath
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emloc_ray.data.downloads import MAX_BYTES, NotAllowed, bounded, download
from emloc_ray.io.store.places import is_store_uri
from emloc_ray.io.store.stored_files import StoredFile

_KEY_BYTES = 1024  # https://docs.aws.amazon.com/AmazonS3/latest/userguide/object-keys.html
_ASK = "add its folder to data.image_roots if rows may read from it"


@dataclass(frozen=True)
class ImagePlaces:
    """Further places that rows may read: ``hosts`` with private addresses, and ``roots``, folders or URIs."""

    hosts: tuple[str, ...] = ()
    roots: tuple[str, ...] = ()

    @classmethod
    def of(cls, hosts: Sequence[str], roots: Sequence[str]) -> ImagePlaces:
        """From a config's values; its folders begin at the working directory."""
        local = (root.removeprefix("file://") for root in roots if not is_store_uri(root))
        return cls(
            tuple(host.lower() for host in hosts),
            (*(str(Path(os.path.expanduser(root)).absolute()) for root in local), *filter(is_store_uri, roots)),
        )

    def local(self, name: str, folder: str) -> Path:
        """The local file of a name, with all links followed; it may be missing. Raises NotAllowed where it is neither below
        ``folder``, the data file's, nor below a root."""
        path = os.path.realpath(local_path(name, folder))
        roots = [root for root in (folder, *self.roots) if not is_store_uri(root)]
        if not any(Path(path).is_relative_to(os.path.realpath(root)) for root in roots):
            raise NotAllowed(f"{path} is not below the data file's folder: {_ASK}")
        return Path(path)

    def stored(self, name: str, folder: str) -> str:
        """The URI of a stored file, with the options of the place that allows it: the data file's bucket, or a root. Raises
        NotAllowed where it is in neither, ValueError where its name is longer than a store's may be."""
        uri = name
        if not is_store_uri(name):
            place, mark, options = folder.partition("?")
            scheme, separator, rest = place.partition("://")
            uri = f"{scheme}{separator}{posixpath.normpath(f'{rest}/{urllib.parse.quote(name)}')}{mark}{options}"
        asked = urllib.parse.urlsplit(uri)
        if len(urllib.parse.unquote_to_bytes(asked.path)) > _KEY_BYTES + 1:
            raise ValueError(f"its name has more than {_KEY_BYTES} bytes")
        roots = [urllib.parse.urlsplit(root) for root in self.roots if is_store_uri(root)]
        if is_store_uri(folder):
            roots.insert(0, urllib.parse.urlsplit(folder)._replace(path="/"))
        for root in roots:
            if _holds(root, asked):
                return urllib.parse.urlunsplit((asked.scheme, asked.netloc, asked.path, root.query, ""))
        raise NotAllowed(f"{asked.scheme}://{asked.netloc.rpartition('@')[2]} is not the data file's bucket: {_ASK}")

    def read(self, name: str, folder: str) -> bytes:
        """The content of the URL, path or URI that a row of a file in ``folder`` names.

        Raises NotAllowed where rows may not read from there, ValueError where it has more than :data:`MAX_BYTES`,
        FileNotFoundError where it is missing, and OSError or HTTPException where it cannot be read; ArtifactError where a store
        does not answer, ConfigError where a root cannot be opened.
        """
        if name.startswith(("http://", "https://")):
            return download(name, self.hosts)
        if is_remote(name, folder):
            with io.BufferedReader(StoredFile(self.stored(name, folder))) as stream:
                return bounded(stream.read(MAX_BYTES + 1))
        path = self.local(name, folder)
        if path.exists() and not path.is_file():  # a device or a pipe may have no end
            raise OSError("it is no file")
        with path.open("rb") as file:
            return bounded(file.read(MAX_BYTES + 1))


NOWHERE_ELSE = ImagePlaces()


def is_remote(name: str, folder: str) -> bool:
    """Whether an image of this name, in a row of a file in ``folder``, is on a server."""
    return is_store_uri(name) or (is_store_uri(folder) and not name.startswith("file://"))


def local_path(name: str, folder: str) -> Path:
    """The path of a local image; a relative one begins at the row's file."""
    return Path(folder) / os.path.expanduser(name.removeprefix("file://"))


def _holds(root: urllib.parse.SplitResult, asked: urllib.parse.SplitResult) -> bool:
    """Whether a URI is below a root, on the same server."""
    parts = urllib.parse.unquote(asked.path).strip("/").split("/")
    above = [part for part in urllib.parse.unquote(root.path).split("/") if part]
    same = (root.scheme, root.netloc) == (asked.scheme, asked.netloc) and asked.query in ("", root.query)
    return same and ".." not in parts and parts[: len(above)] == above
