"""What a killed run left in a directory, and whether it may be gone on from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from emloc_ray.io.fingerprint import fingerprint

_MARK = ".inputs"


def discard_unless(directory: Path, inputs: Any) -> None:
    """Keeps what is in ``directory`` where it was begun with the same ``inputs``; else empties it, and notes them there."""
    mark = directory / _MARK
    if not mark.is_file() or mark.read_text() != fingerprint(inputs):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        mark.write_text(fingerprint(inputs))
