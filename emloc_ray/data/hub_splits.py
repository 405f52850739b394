"""Which rows ``hf:NAME[@SUBSET][:SPLIT]`` names, before any is fetched.

A split is named as ``datasets`` does (https://huggingface.co/docs/datasets/loading#slice-splits): ``train``,
``train[:80%]``, ``train[100:200]``, ``train+test``.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from emloc_ray.io.runs.fingerprint import fingerprint, fingerprint_large_files
from emloc_ray.io.store.places import files_below

_SLICE = re.compile(r"(?P<name>[^\[(]+)(?:\[(?P<begin>-?\d+%?)?:(?P<end>-?\d+%?)?\])?")


class HubSplit(NamedTuple):
    """A data set, its subset ("" where none is named) and a split of it."""

    dataset: str
    subset: str
    part: str

    @classmethod
    def of(cls, place: str, split: str) -> "HubSplit":
        """The one of ``hf:NAME[@SUBSET][:SPLIT]``; the split is ``test`` for rows to report on where none is named, else
        ``train``."""
        name, _, part = place.removeprefix("hf:").partition(":")
        dataset, _, subset = name.partition("@")
        return cls(os.path.expanduser(dataset), subset, part or ("test" if split == "eval" else "train"))

    def __str__(self) -> str:
        return f"hf:{self.dataset}{f'@{self.subset}' if self.subset else ''}:{self.part}"

    @property
    def folder(self) -> Path | None:
        """The folder of this machine that the data set is, as ``datasets`` takes it; None where it is on the hub."""
        return Path(self.dataset) if Path(self.dataset).is_dir() else None

    def whole(self) -> str:
        """The first split that ``part`` takes rows of, all of it: what can be streamed."""
        return re.split(r"[\[(+]", self.part)[0]

    def num_rows(self, sizes: Mapping[str, int]) -> int | None:
        """Its rows, by the number that each whole split has; None where that does not tell."""
        pieces = [_piece(text) for text in self.part.split("+")]
        counts = [
            _count(piece, sum(sizes.values()) if piece.name == "all" else sizes.get(piece.name)) for piece in pieces
        ]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    def overlaps(self, other: "HubSplit") -> bool:
        """Whether both have rows in common for certain: not where one is counted in rows, the other in per cent or from the
        end."""
        if (self.dataset, self.subset) != (other.dataset, other.subset):
            return False
        return self.part == other.part or any(
            _overlap(_piece(one), _piece(two)) for one in self.part.split("+") for two in other.part.split("+")
        )


def content_of_folders(hub: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Of every split, by its places on the ``hub``, a hash of the files of each folder of this machine among these, by their
    paths in it; splits without one are left out."""
    folders = {name: [HubSplit.of(place, name).folder for place in places] for name, places in hub.items()}
    return {
        name: [_content_of(folder) for folder in every if folder is not None]
        for name, every in folders.items()
        if any(every)
    }


def _content_of(folder: Path) -> str:
    files = sorted(files_below(folder))
    return fingerprint([fingerprint_large_files(files), [file.relative_to(folder) for file in files]])


class _Piece(NamedTuple):
    """Rows ``[begin, end)`` of a split, ``unit``: of 100 (``%``), or counted; no unit where it is all of the split, None where
    it is not known which rows these are."""

    name: str
    unit: str | None = ""
    begin: float = 0
    end: float = float("inf")


def _piece(text: str) -> _Piece:
    match = _SLICE.fullmatch(text.strip())
    if match is None:
        return _Piece(re.split(r"[\[(]", text.strip())[0], None)
    bounds = [bound for bound in match.group("begin", "end") if bound is not None]
    units = {"%" if bound.endswith("%") else "rows" for bound in bounds}
    if not units:
        return _Piece(match["name"])
    numbers = {name: int(match[name].rstrip("%")) for name in ("begin", "end") if match[name] is not None}
    if units == {"%"}:
        numbers = {name: number + 100 if number < 0 else number for name, number in numbers.items()}
    known = len(units) == 1 and min(numbers.values()) >= 0
    return _Piece(match["name"], units.pop() if known else None, **numbers)


def _count(piece: _Piece, size: int | None) -> int | None:
    """The rows of a piece of a split of ``size`` rows."""
    if size is None or piece.unit is None:
        return None
    a_unit = size / 100 if piece.unit == "%" else 1
    begin, end = (round(min(bound * a_unit, size)) for bound in (piece.begin, piece.end))
    return max(0, end - begin)


def _overlap(one: _Piece, other: _Piece) -> bool:
    if one.name != other.name:
        return False
    if "" in (one.unit, other.unit):
        return True
    return one.unit == other.unit is not None and max(one.begin, other.begin) < min(one.end, other.end)
