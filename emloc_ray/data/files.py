"""Data files: which a path names, of what kind they are, and their bytes, taken out of compression."""

import glob as globbing
import io
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from emloc_ray.data.text_rows import MAX_LINE_BYTES
from emloc_ray.errors import DataError
from emloc_ray.io.store.places import files_below, is_store_uri, looked_in
from emloc_ray.io.store.stored_files import StoredFile, find_stored, shown

KINDS = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
"""The kinds of tables, by how a file's name ends."""
STORED_HEADER_BYTES = 2**16
_CODECS = {".gz": "gzip", ".zst": "zstd"}
_ALL = {**KINDS, ".txt": "text"}
_PACKED = tuple(f"{ending}{codec}" for ending in _ALL if ending != ".parquet" for codec in _CODECS)
ENDINGS = (*_ALL, *_PACKED)
ROWS = tuple(ending for ending in ENDINGS if ".txt" not in ending)
"""How the files end that are read of a directory; text files, such as a README.txt, only where they are named."""
_KINDS = "a .jsonl, .json, .parquet, .csv, .tsv or .txt file (also .gz, .zst)"
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
_DELIMITERS = ";\t|"


def _lowered(place: Path | str) -> PurePosixPath:
    """A place by whose name its kind is known, whose ending may be in capitals."""
    return PurePosixPath(shown(str(place)).lower())


def codec_of(place: Path | str) -> str | None:
    """The compression of a file, by how its name ends."""
    return _CODECS.get(_lowered(place).suffix)


def kind_of(place: Path | str) -> str:
    """``jsonl``, ``parquet``, ``csv`` or ``text``, by how a file's name ends."""
    path = _lowered(place)
    return _ALL[path.with_suffix("").suffix if path.suffix in _CODECS else path.suffix]


def list_files(patterns: str | Sequence[str], key: str) -> list[Path | str]:
    """The files of a path, a directory or a glob, sorted: paths, and URIs of files on an object store.

    Raises DataError, naming the config ``key``, where there is none or one is of an unknown kind; ConfigError, naming it, where
    a URI holds credentials or cannot be opened; ArtifactError where a store does not answer.
    """
    files: dict[str, Path | str] = {}  # each once; absolute, as workers run in other directories
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        named: Sequence[Path | str] = find_stored(pattern, key, ROWS) if is_store_uri(pattern) else _local(pattern)
        matched = [place for place in named if pattern.endswith(_name(place)) or not _describes(place, named)]
        if not matched:
            saved = f", or hf:{Path(pattern).expanduser().absolute()} for what datasets saved there" if named else ""
            raise DataError(
                f"{key}: {pattern} names no file{_looked_in(pattern)}: give {_KINDS}, a directory or a glob{saved}."
            )
        for place in matched:
            whole = place if isinstance(place, str) else Path(os.path.normpath(place.absolute()))
            files.setdefault(str(whole), whole)
    for place in files.values():
        if not str(_lowered(place)).endswith(ENDINGS):
            ending = PurePosixPath(shown(str(place))).suffix or "nothing"
            saved = ", or hf:FOLDER for a folder that datasets saved" if ending == ".arrow" else ""
            raise DataError(f"{key}: {shown(str(place))} ends in {ending}: give {_KINDS}{saved}.")
    return list(files.values())


def _name(place: Path | str) -> str:
    return PurePosixPath(str(place)).name


def _describes(place: Path | str, beside: Sequence[Path | str]) -> bool:
    """Whether a file holds no rows, but what the library ``datasets`` writes about those in its folder."""
    path = PurePosixPath(str(place))
    return path.name in _DESCRIPTIONS or (
        path.name == "state.json" and str(path.with_name("dataset_info.json")) in map(str, beside)
    )


def _local(pattern: str) -> list[Path]:
    path = Path(os.path.expanduser(pattern.removeprefix("file://")))
    if path.is_dir():
        return sorted(file for file in files_below(path) if file.name.lower().endswith(ROWS))
    if path.is_file():
        return [path]
    named = globbing.glob(str(path), recursive=True)  # noqa: PTH207  Path.glob takes hidden files too, and no absolute pattern
    return sorted(Path(name) for name in named if Path(name).is_file())


def _looked_in(pattern: str) -> str:
    """The directory where a relative path of this machine was looked for, and where a link leads that leads nowhere."""
    if is_store_uri(pattern):
        return ""
    place = pattern.removeprefix("file://")
    path = Path(os.path.expanduser(place))
    leads = f" (it is a link to {path.readlink()}, which is not there)" if path.is_symlink() else ""
    return f"{looked_in(place)}{leads}"


def open_file(path: str, stored_bytes: int) -> io.BufferedReader:
    """A file's bytes, without its compression; those of a store are read ``stored_bytes`` at a time."""
    codec = codec_of(path)
    if codec is not None:
        return io.BufferedReader(_Decompressed(path, codec, stored_bytes), stored_bytes)
    return io.BufferedReader(StoredFile(path), stored_bytes) if is_store_uri(path) else Path(path).open("rb")


class _Decompressed(io.RawIOBase):
    """The bytes in a compressed file. A place is reached by reading all that is before it."""

    def __init__(self, path: str, codec: str, stored_bytes: int) -> None:
        super().__init__()
        self.path, self.codec, self.stored_bytes = path, codec, stored_bytes
        self._begin()

    def _begin(self) -> None:
        raw = StoredFile(self.path) if is_store_uri(self.path) else io.FileIO(self.path)
        self.version = getattr(raw, "version", "")
        file = io.BufferedReader(raw, self.stored_bytes)
        self._stream: Any = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), self.codec)
        self._at = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is, at a cost."""
        return True

    def tell(self) -> int:
        """The number of bytes before the next one."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves to ``offset`` bytes from the beginning, or from here."""
        if whence == io.SEEK_END:
            raise OSError("a compressed file's end is not known before it is read")
        target = offset + (self._at if whence == io.SEEK_CUR else 0)
        if target < self._at:
            self._stream.close()
            self._begin()
        while self._at < target and (skipped := self._stream.read(min(target - self._at, 2**20))):
            self._at += len(skipped)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer as far as there are bytes."""
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)

    def close(self) -> None:
        """Closes the file too."""
        if not self.closed:
            self._stream.close()
        super().close()


def is_array(place: str, stream: io.BufferedReader) -> bool:
    """Whether a JSON file holds one array of rows instead of a row a line; leaves the stream at its beginning. Of a ``.jsonl``
    file one with objects, as a line of it may be a list by mistake."""
    name = str(_lowered(place)).removesuffix(".gz").removesuffix(".zst")
    head = stream.peek(STORED_HEADER_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
    return head.startswith(b"[") and (name.endswith(".json") or head[1:].lstrip().startswith(b"{"))


def delimiter_of(place: str, stream: io.BufferedReader) -> str:
    """What separates a CSV file's values, by its header; leaves the stream at its beginning."""
    if str(_lowered(place)).removesuffix(".gz").removesuffix(".zst").endswith(".tsv"):
        return "\t"
    header = stream.readline(MAX_LINE_BYTES).decode("utf-8", "replace")
    stream.seek(0)
    most = max(_DELIMITERS, key=header.count)
    return most if "," not in header and most in header else ","
