"""What a killed run left in a directory, and whether it may be resumed."""

from pathlib import Path
from typing import Any

from emloc_ray.io.runs.fingerprint import fingerprint
from emloc_ray.io.store.atomic import remove_leftovers, write_text
from emloc_ray.io.store.node_cache import discard, ensure

INPUTS = ".inputs"
"""The name of the file that says what a folder was begun with."""


def discard_unless(directory: Path, inputs: Any) -> None:
    """Keeps what is in ``directory`` where it was begun with the same ``inputs``, but for what killed writers left there; else
    empties it, and notes them there."""
    remove_leftovers(directory)
    if not begun_with(directory, inputs):
        discard(directory)
        directory.mkdir(parents=True)
        write_text(directory / INPUTS, fingerprint(inputs))


def discard_both_unless(scratch: Path, output: Path, inputs: Any) -> None:
    """Keeps what a killed try left in a scratch folder and in its output where the scratch was begun with the same ``inputs``.
    Else empties both: an output may be of another try of the same inputs, whose scratch folder is gone."""
    if not begun_with(scratch, inputs):
        discard(output)
    for path in (scratch, output):
        discard_unless(path, inputs)


def begun_with(directory: Path, inputs: Any) -> bool:
    """Whether what is in ``directory`` was begun with these inputs."""
    mark = directory / INPUTS
    ensure(mark)
    return mark.is_file() and mark.read_text() == fingerprint(inputs)
