"""Checks a split's files before anything starts: counts their rows, and reads the first ones."""

import contextlib
import dataclasses
import functools
import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from emloc_ray.config.schema import DataConfig, RunConfig, SplitConfig
from emloc_ray.data.files import list_files
from emloc_ray.data.formats import check_row
from emloc_ray.data.hub_splits import HubSplit
from emloc_ray.data.image_places import ImagePlaces
from emloc_ray.data.images import NO_PROCESSOR, has_images, look
from emloc_ray.data.reading import BadRow, Place, Row, SourceFile, each, read_rows, scan, value_errors
from emloc_ray.data.row_formats import columns_of, converted, recognized, unknown_format
from emloc_ray.data.splits import SPLITS, counts_in_shares
from emloc_ray.errors import ArtifactError, ConfigError, DataError
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.io.runs.fingerprint import fingerprint, look_of
from emloc_ray.io.store.shared import Shared
from emloc_ray.io.store.stored_files import StoredFile, shown
from emloc_ray.text import counted, listed, one_line

CHECKED_ROWS = 1000  # of a file
MAX_CHECKED_ROWS = 16_000  # of a split, but for one of each file


Looks = tuple[tuple[Path | str, Any], ...]
"""Files, each with what tells its content from another's."""


def places_here(config: RunConfig, name: str) -> tuple[str, ...]:
    """The places of a split but for those of the hub; none where the run makes the split."""
    split: SplitConfig | None = getattr(config.data, name)
    is_made = config.data.generate is not None and name in SPLITS
    return () if split is None or is_made else tuple(place for place in split.places if place not in split.hub)


def look_at_files(places: Sequence[str], key: str) -> Looks:
    """The files at places, local ones as :func:`~emloc_ray.io.runs.fingerprint.look_of` sees them, stored ones with their
    version. Raises what :func:`emloc_ray.data.files.list_files` raises."""
    files = list_files(places, key)
    stored = any(isinstance(file, str) for file in files)
    return tuple(zip(files, each(_look, files, stored), strict=True))


def _look(file: Path | str) -> Any:
    with contextlib.suppress(OSError):  # whoever reads it says why it cannot be read
        if isinstance(file, str):
            with StoredFile(file) as stored:
                return stored.version
        return look_of(file)
    return object()  # like no other


def check_split(
    config: RunConfig, name: str, reads_images: bool, look: Callable[[], Looks] | None = None
) -> tuple[SourceFile, ...]:
    """The files of a split, with counted rows and checked first rows; none where the run makes or downloads the split.

    ``reads_images``: whether the model has a processor that takes them; ``look``: :func:`look_at_files` of its places. Raises
    ConfigError where a store does not answer, or train has no more rows than are held out; DataError, naming file and row,
    where a file is unreadable or a row bad.
    """
    split: SplitConfig | None = getattr(config.data, name)
    files = places_here(config, name)
    if split is None:
        return ()
    if split.hub and importlib.util.find_spec("datasets") is None:
        raise ConfigError(f"{split.hub[0]} needs the datasets package: pip install 'emloc-ray[hub]'.")
    if not files:
        return ()
    key = f"data.{name}.path"
    try:
        looks = look_at_files(files, key) if look is None else look()
        sources = _in_parts(_checked_sources(looks, config.data, reads_images), split, key)
    except ArtifactError as error:  # a store that does not answer
        raise ConfigError(f"data.{name}.path: {error}") from error
    held_out = ("selection", "eval", *(["validation"] if config.finetune.validates else []))
    others = [f"data.{other}" for other in held_out if getattr(config.data, other) is None]  # taken out of train
    rows = rows_taken(split, sources)
    if name == "train" and rows <= len(others) and not split.hub:
        raise ConfigError(
            f"data.train has {counted(rows, 'row')}, of which {listed(others)} {'take' if len(others) > 1 else 'takes'}"
            f" {len(others)}: give more, or {'paths of their own' if len(others) > 1 else 'a path of its own'} to"
            f" {listed(others)}."
        )
    return sources


def rows_taken(split: SplitConfig | None, sources: Sequence[SourceFile]) -> int:
    """Rows that a split takes of its files, by its shares and its ``num_samples``; 0 where none are known."""
    taken = sum(rows_of_parts(split, sources).values())
    return min(taken, (split and split.num_samples) or taken)


def rows_of_parts(split: SplitConfig | None, sources: Sequence[SourceFile]) -> dict[int, int]:
    """Rows that a split takes of the files of each of its places, by its shares, before any are sampled."""
    rows = Counter[int]()
    for source in sources:
        rows[source.part] += source.num_rows
    weights = (split and split.weights) or ()
    return counts_in_shares(rows, weights) if rows and len(weights) == len(rows) else rows


def _in_parts(sources: tuple[SourceFile, ...], split: SplitConfig, key: str) -> tuple[SourceFile, ...]:
    """Each file with the number of the place that names it, where places have shares. Raises ConfigError where two name it, or
    a place has no rows to share."""
    if split.weights is None:
        return sources
    parts: dict[str, int] = {}
    for number, place in enumerate(split.places):
        for file in map(str, list_files(place, key) if place not in split.hub else ()):
            if parts.setdefault(file, number) != number:
                both = f"{shown(split.places[parts[file]])} and {shown(place)}"
                raise ConfigError(f"{key}: both {both} name {shown(file)}: give each file one share.")
    with_rows = {parts[source.path] for source in sources}
    for number, place in enumerate(split.places):
        if place not in split.hub and number not in with_rows:
            raise ConfigError(f"{key}: every file of {shown(place)} is empty: give files with rows, or take it out.")
    return tuple(dataclasses.replace(source, part=parts[source.path]) for source in sources)


def _checked_sources(looks: Looks, data: DataConfig, reads_images: bool) -> tuple[SourceFile, ...]:
    columns = tuple(data.columns.items())
    options = (data.format, columns, data.on_error, data.packing, reads_images, tuple(data.image_roots))

    def check() -> tuple[SourceFile, ...]:
        return _read_sources([place for place, _ in looks], data, reads_images)

    # Image files may change by themselves.
    return _CHECKED.get((looks, *options), check, keeps=lambda sources: not any(source.images for source in sources))


# Many of a batch's tasks read the same files: these are counted once, and held once.
_CHECKED = Shared[tuple[SourceFile, ...]](64)


def _read_sources(places: Sequence[Path | str], data: DataConfig, reads_images: bool) -> tuple[SourceFile, ...]:
    stored = any(isinstance(place, str) for place in places)
    counted_files = each(functools.partial(scan, keep_bad=data.on_error == "skip"), places, stored)
    sources = [source for source in counted_files if source.num_rows]
    if not sources:
        raise DataError(f"{counted_files[0].name} is empty: give a file with rows.")
    checked = max(1, min(CHECKED_ROWS, MAX_CHECKED_ROWS // len(sources)))

    def check(source: SourceFile) -> SourceFile:
        source = with_format(source, data)
        skips, numbers = data.on_error == "skip", range(min(source.num_rows, checked))
        images: list[Any] = []
        reasons: list[str] = []
        columns = dict.fromkeys(source.columns)
        for number, row in read_rows(source, numbers, *columns_of(source.format, data.columns), keep_bad=skips):
            columns |= dict.fromkeys(map(str, row)) if data.columns else {}
            try:
                images += _checked_row(row, Place.of(source, number), data, reads_images)
            except DataError as error:
                if not skips:
                    raise
                reasons.append(str(error).rstrip("."))
        if len(reasons) == source.num_rows:
            raise _nothing_left(source, reasons)
        return dataclasses.replace(source, images=fingerprint(images) if images else "", columns=tuple(columns))

    return tuple(each(check, sources, stored))


def _checked_row(row: Row, where: Place, data: DataConfig, reads_images: bool) -> list[Any]:
    """The names, sizes and times of the images that a row names; raises DataError where the row is bad."""
    if isinstance(row, BadRow):
        raise row.error
    places = ImagePlaces.of(data.image_hosts, data.image_roots)
    with value_errors(where):
        row, kind = converted(row, where.row_format, data.columns, where)
        check_row(row, kind, where, data.packing)
        if kind != "messages":
            return []
        if has_images(row) and not reads_images:
            raise DataError(f"{where}: it shows an image, and {NO_PROCESSOR}.")
        return look(row, where, places)


def _nothing_left(source: SourceFile, reasons: Sequence[str]) -> DataError:
    return DataError(f"{source.name}: no row is left: {'; '.join(reasons[:3])}.".replace(f"{source.name}, row", "row"))


def with_format(source: SourceFile, data: DataConfig) -> SourceFile:
    """A file with the format of its rows: the config's, or for ``auto`` that of the first row that has one. Raises DataError,
    naming the first row where it has none, or three where none has."""
    if data.row_format != "auto":
        return dataclasses.replace(source, format=data.row_format)
    reasons: list[str] = []
    for number, row in read_rows(source, range(min(source.num_rows, CHECKED_ROWS)), keep_bad=True):
        error = row.error if isinstance(row, BadRow) else None
        if error is None and (name := recognized(row, data.columns)) is not None:
            return dataclasses.replace(source, format=name)
        error = error or unknown_format(row, data.columns, Place.of(source, number))
        if data.on_error != "skip":
            raise error
        reasons.append(str(error).rstrip("."))
    raise _nothing_left(source, reasons)


def check_held_out(config: RunConfig, files: Mapping[str, tuple[SourceFile, ...] | None]) -> None:
    """Raises ConfigError where rows to report or to choose on are also trained on."""
    paths = {name: {_place(source) for source in sources or ()} for name, sources in files.items()}
    sections = {name: section for name in files if (section := getattr(config.data, name)) is not None}
    hub = {name: [HubSplit.of(place, name) for place in section.hub] for name, section in sections.items()}

    def read_by_both(one: str, other: str) -> list[str]:
        same = paths.get(one, set()) & paths.get(other, set())
        pairs = ((a, b) for a in hub.get(one, ()) for b in hub.get(other, ()) if a.overlaps(b))
        return sorted(same) + [str(a) if a == b else f"{a} (rows of {b})" for a, b in pairs]

    disjoint = {
        "eval": ("train", "selection", "healing", "validation"),
        "selection": ("train", "healing"),
        "validation": ("train", "healing"),
    }
    kept = [name for name in disjoint if name in files and name not in sections]
    if kept and (both := read_by_both("train", "healing")):
        raise ConfigError(
            f"data.healing and data.train both read {listed(both, 1)}, some of whose rows are kept for {listed(kept)}:"
            " healing must not train on these; leave data.healing out to heal on the rows that are left of train, or name"
            f" {listed([f'data.{name}' for name in kept])}."
        )
    for held_out, others in disjoint.items():
        for other in others:
            if both := read_by_both(held_out, other):
                raise ConfigError(
                    f"data.{held_out} and data.{other} both read {listed(both, 1)}: held-out rows must not be trained on;"
                    f" leave data.{held_out} out to have rows of train kept for it, or name other files."
                )


def check_apart(run: RunDirectory, model: Path | None, files: Mapping[str, tuple[SourceFile, ...] | None]) -> None:
    """Raises ConfigError where the model or rows lie in the run's directory: stages write there, and remove what is theirs."""
    root = os.path.realpath(run.root) if run.store is None else run.place.partition("?")[0].rstrip("/")
    places = {} if model is None else {os.path.realpath(model): "model.source"}
    places |= {_place(source): f"data.{name}.path" for name, sources in files.items() for source in sources or ()}
    for place, key in places.items():
        if f"{place}/".startswith(f"{root}/"):
            raise ConfigError(
                f"{key}: {place} lies in run_dir {run.place}, where stages write and remove: move it out."
            )


def check_columns(data: DataConfig, files: Mapping[str, tuple[SourceFile, ...] | None]) -> None:
    """Raises ConfigError where ``data.columns`` names a column that no first row of any file has, whose rows are all known."""
    sections = [getattr(data, name) for name in files]
    if None in files.values() or any(section is not None and section.hub for section in sections):
        return
    columns = {name for sources in files.values() for source in sources or () for name in source.columns}
    for ours, theirs in data.columns.items():
        if columns and theirs not in columns:
            near = sorted(sorted(columns), key=lambda name: -SequenceMatcher(None, name, theirs).ratio())
            raise ConfigError(
                f"data.columns.{ours} names {theirs!r}, a column that none of the first rows has: name one that they have"
                f" ({listed([one_line(name, 80) for name in near], 8)}), or take {ours} out."
            )


def _place(source: SourceFile) -> str:
    """A file's identity, however it was named."""
    return source.name if source.is_stored else os.path.realpath(source.path)
