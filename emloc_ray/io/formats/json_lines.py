"""Files with a JSON object a line, to which processes add that may be killed, or find the disk full, within a line."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from emloc_ray.io.store.atomic import write_text
from emloc_ray.io.store.lock_file import check_lock


def end_last_line(path: Path) -> None:
    """Ends a line that was left unfinished: what follows it stays readable."""
    if path.is_file() and _is_unfinished(path):
        check_lock(path)
        with path.open("a") as file:
            file.write("\n")


def append_object(path: Path, value: dict[str, Any]) -> None:
    """Adds a line to a file of this machine, whose folder is made. Raises TakenOver where that lies in a run that another process
    has taken."""
    check_lock(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    append_line(path, json.dumps(value))


def append_line(path: Path, line: str) -> None:
    """Adds a line to a file; what a full disk left of the one before is ended first."""
    with path.open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n" if _is_unfinished(path) else f"{line}\n")


def _is_unfinished(path: Path) -> bool:
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def keep_objects(path: Path, stays: Callable[[dict[str, Any]], bool]) -> None:
    """Writes a file anew, atomically, with those of its objects that stay, where others are among them. Raises TakenOver as
    :func:`append_object` does."""
    objects = read_objects(path.read_bytes()) if path.is_file() else []
    kept = [value for value in objects if stays(value)]
    if len(kept) < len(objects):
        write_text(path, "".join(f"{json.dumps(value)}\n" for value in kept))


def read_objects(content: bytes) -> list[dict[str, Any]]:
    """The objects of a file's lines, but for lines that hold none, such as one that was left unfinished."""
    objects = []
    for line in content.split(b"\n"):
        try:
            value = json.loads(line.decode(errors="replace"))
        except ValueError:
            continue
        if isinstance(value, dict):
            objects.append(value)
    return objects
