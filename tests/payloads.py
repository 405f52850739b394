"""A pickle that shows whether anybody opened it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Leaves:
    """Unpickled, it leaves an empty file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.mark), "w")
