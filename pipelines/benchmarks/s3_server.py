"""moto's S3 server, made fast for many objects. moto itself reads all keys of a bucket to list a few of them, and searches its
services at each request.

``python s3_server.py PORT`` serves S3 alone, from memory, at 127.0.0.1.
"""

from __future__ import annotations

import bisect
import itertools
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from moto.moto_server.werkzeug_app import create_backend_app
from moto.s3 import models
from werkzeug.serving import run_simple

_KEYS = "_VersionedKeyStore"


class SortedKeys(vars(models)[_KEYS]):  # type: ignore[misc]
    """A bucket's objects, and their names in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def _note(self, name: str) -> None:
        if name not in self:
            bisect.insort(self.names, name)

    def __setitem__(self, name: str, value: Any) -> None:
        self._note(name)
        super().__setitem__(name, value)

    def setlist(self, key: str, list_: Any) -> None:
        """All versions of an object."""
        self._note(key)
        super().setlist(key, list_)

    def pop(self, key: str) -> None:
        """Removes an object with all versions."""
        super().pop(key)
        del self.names[bisect.bisect_left(self.names, key)]

    def below(self, prefix: str) -> dict[str, Any]:
        """The objects whose names begin so."""
        begin = bisect.bisect_left(self.names, prefix)
        names = itertools.takewhile(lambda name: name.startswith(prefix), self.names[begin:])
        return {name: self[name] for name in names if name in self}


def _listing(of_all: Callable[..., Any]) -> Callable[..., Any]:
    """moto's listing, shown only what lies below the prefix."""

    def list_objects(backend: models.S3Backend, bucket: Any, prefix: str | None, *rest: Any, **named: Any) -> Any:
        return of_all(backend, SimpleNamespace(keys=bucket.keys.below(prefix or "")), prefix, *rest, **named)

    return list_objects


def serve(port: int) -> None:
    """Serves until it is stopped."""
    setattr(models, _KEYS, SortedKeys)
    models.S3Backend.list_objects = _listing(models.S3Backend.list_objects)  # type: ignore[method-assign]
    run_simple("127.0.0.1", port, create_backend_app("s3"), threaded=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
