"""Images inside a row's messages: named by path, URL or bytes, read as they are encoded and looked at once.

Token shards carry the encoded bytes, not pixels: a photo of some megapixels is about 100 KB as a JPEG, and 1.4 MB as the
336 × 336 float32 pixels that LLaVA reads (12 MB at the million pixels that Qwen-VL may take). Of 10⁷ rows that is 1 TB
against 14 TB (120 TB), and decoding takes some milliseconds where a training step takes hundreds.
"""

from __future__ import annotations

import base64
import http.client
import io
import posixpath
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from emloc_ray.data.reading import Row
from emloc_ray.errors import ArtifactError, ConfigError, DataError
from emloc_ray.io.store.object_store import is_store_uri
from emloc_ray.io.store.stored_files import StoredFile

COLUMNS = ("images", "image")
"""Columns whose images the parts ``{"type": "image"}`` that name none take, in their order."""

Content = TypeVar("Content", bytes, bytearray)
SOURCES = ("image", "url", "path", "base64", "bytes")
_TIMEOUT_S = 20.0  # of a server's silence
_LONGEST_S = 60.0  # of one try of a URL
_WAITS_S = (1.0, 4.0)  # before another try
_MAX_BYTES = 2**27  # of one encoded image
_REMOTE_BYTES = 100_000
_CHUNK_BYTES = 2**16
_OF_URLS = ":/?#[]@!$&'()*+,;=%~"  # what a URL may hold beside letters and digits


def image_parts(row: Row) -> Iterator[dict[str, Any]]:
    """The image parts of all the row's messages, in order; none where the messages are of no known form."""
    turns = row.get("messages")
    for turn in turns if isinstance(turns, list) else ():
        content = turn.get("content") if isinstance(turn, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and part.get("type") in ("image", "image_url"):
                yield part


def check_parts(row: Row, where: str) -> None:
    """Raises DataError where a message's content has parts that are neither text nor an image, or lacks an image's source."""
    for turn in row["messages"]:
        for part in turn["content"] if isinstance(turn["content"], list) else ():
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind == "text" and not isinstance(part.get("text"), str):
                raise DataError(f"{where}: a part of type text has no text: give {{type: text, text: …}}.")
            if kind not in ("text", "image", "image_url"):
                raise DataError(f"{where}: content has a part of type {kind!r}: only text and image are known.")
    given = _column(row)
    without = sum(_source(part) is None for part in image_parts(row))
    if without != len(given):
        beside = f"columns {' and '.join(COLUMNS)} hold {len(given)}"
        raise DataError(
            f"{where}: {without} image parts name no image, and {beside}: give each part a path, a url or an image, and each"
            " image of a column a part {type: image}."
        )


def has_images(row: Row) -> bool:
    """Whether any message shows an image."""
    return next(image_parts(row), None) is not None


def sources(row: Row) -> Iterator[tuple[str, Any]]:
    """Of what kind each of the row's images is, and what names or holds it, in order; those of columns are the parts'
    that name none."""
    beside = iter(_column(row))
    for part in image_parts(row):
        source = _source(part) or next(beside, None)
        if source is not None:
            yield source


def is_remote(name: str, folder: str) -> bool:
    """Whether a server has to be asked for an image of that name, in a row of a file in ``folder``."""
    return is_store_uri(name) or (is_store_uri(folder) and not name.startswith("file://"))


def local_path(name: str, folder: str) -> Path:
    """Where an image is that is not remote; a relative path is taken from the row's file."""
    return Path(folder) / Path(name.removeprefix("file://")).expanduser()


def look(row: Row, where: str) -> list[Any]:
    """What can be seen of a checked row's images that are no part of it, unopened: names, sizes and times.

    Raises:
        DataError: naming file and row, where one is to be a file here and is not.
    """
    folder = getattr(where, "folder", ".")
    seen: list[Any] = []
    for number, (kind, name) in enumerate(sources(row)):
        if kind not in ("path", "url") or not isinstance(name, str) or name.startswith("data:"):
            continue
        if is_remote(name, folder):
            seen.append(name)
            continue
        try:
            status = local_path(name, folder).stat()
        except (OSError, ValueError) as error:
            raise _not_there(f"{where}: image {number + 1} {_shown(name)}") from error
        seen.append([name, status.st_size, status.st_mtime_ns])
    return seen


def encoded_bytes(row: Row, folder: str) -> int:
    """About how many bytes the row's images are as encoded, unopened; a remote one is taken for 100 KB."""
    size = 0
    for kind, value in sources(row):
        if isinstance(value, str) and (kind == "base64" or value.startswith("data:")):
            size += len(value) * 3 // 4
        elif isinstance(value, str):
            path = None if is_remote(value, folder) else local_path(value, folder)
            size += _REMOTE_BYTES if path is None else path.stat().st_size if path.is_file() else 0
        elif isinstance(value, bytes):
            size += len(value)
    return size


def _not_there(label: str) -> DataError:
    return DataError(f"{label} is not there: mend the path, which is from the data file's folder.")


def load_images(row: Row, where: str) -> list[bytes]:
    """The encoded bytes of the row's images, in the order of its messages; each was decoded once.

    A relative path is taken from the folder of the row's file, here or on its object store.

    Raises:
        DataError: naming file and row, where one is missing, cannot be fetched, or is no image.
    """
    found = []
    for number, source in enumerate(sources(row)):
        label = f"{where}: image {number + 1}"
        if isinstance(source[1], str) and (source[0] != "base64" or len(source[1]) < 100):
            label = f"{label} {_shown(source[1])}"
        content = _read(source, getattr(where, "folder", "."), label)
        try:
            decode(content)
        except Exception as error:  # whatever a broken file brings Pillow to raise
            detail = " ".join(str(error).split())[:120]
            raise DataError(f"{label} cannot be decoded ({detail}): mend or replace it.") from error
        found.append(content)
    return found


def decode(content: bytes | memoryview) -> Any:
    """An encoded image as transformers opens one: turned upright, RGB; of 16 bits a pixel the upper 8.

    Raises:
        ValueError: where pixels are numbers of no known range; and what Pillow raises of a file that is none of its.
    """
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(content)) as image:
        return _in_bytes(ImageOps.exif_transpose(image)).convert("RGB")


def _in_bytes(image: Any) -> Any:
    """Pillow itself cuts values of 16 bits off at 255, so that most of such an image would be white."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("its pixels are floats of no known range")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() >= 2**16:
        raise ValueError("its pixels have more than 16 bits")
    return Image.fromarray((values >> 8).astype(np.uint8))


def _shown(name: str) -> str:
    """A name as errors say it: a URL without what signs it or logs in, and nothing at length."""
    scheme, mark, rest = name.partition("://")
    if mark:
        host, slash, path = re.split(r"[?#]", rest)[0].partition("/")
        name = f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
    return name if len(name) <= 200 else f"{name[:200]}…"


def _column(row: Row) -> list[tuple[str, Any]]:
    for name in COLUMNS:
        value = row.get(name)
        if value is not None:
            return [_named(item) for item in (value if isinstance(value, list) else [value])]
    return []


def _source(part: dict[str, Any]) -> tuple[str, Any] | None:
    """Of what kind a part's image is, and the image; None where it names none."""
    given = part.get("image_url")
    if given is not None:
        return "url", given.get("url") if isinstance(given, dict) else given
    for key in SOURCES:
        if part.get(key) is not None:
            return _named(part[key]) if key == "image" else (key, part[key])
    return None


def _named(value: Any) -> tuple[str, Any]:
    """What ``image`` holds: bytes, a path, a URL, base64, or the ``{bytes, path}`` that data sets' image columns have."""
    if isinstance(value, dict):
        return ("bytes", value["bytes"]) if value.get("bytes") is not None else ("path", value.get("path"))
    if not isinstance(value, str):
        return "bytes", value
    if value.startswith(("http://", "https://")):
        return "url", value
    is_path = len(value) < 4096 and (is_store_uri(value) or value.startswith("file://") or "." in value[-6:])
    return ("path" if is_path and not value.startswith("data:") else "base64"), value


def _read(source: tuple[str, Any], folder: str, label: str) -> bytes:
    kind, value = source
    if kind == "bytes" and isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if not isinstance(value, str):
        raise DataError(f"{label} is {type(value).__name__}: give a path, a URL or the encoded file's bytes.")
    try:
        if value.startswith(("http://", "https://")):
            return _fetch(value)
        if kind == "base64" or value.startswith("data:"):
            return base64.b64decode(value.partition(",")[2] if value.startswith("data:") else value, validate=True)
        return _read_file(value, folder)
    except FileNotFoundError as error:
        raise _not_there(label) from error
    except (OSError, ValueError, http.client.HTTPException, ArtifactError, ConfigError) as error:
        if kind == "base64":  # a path is told by its ending
            raise DataError(
                f"{label} is no base64 ({_detail(error, value)}), and no path: mend it, or give it as path."
            ) from error
        raise DataError(f"{label} cannot be read ({_detail(error, value)}): mend the name or the file.") from error


def _detail(error: Exception, name: str) -> str:
    said = str(getattr(error, "reason", None) or getattr(error, "strerror", None) or error)
    return " ".join(said.replace(name, _shown(name)).split())[:150]


def _read_file(name: str, folder: str) -> bytes:
    if not is_remote(name, folder):
        path = local_path(name, folder)
        if path.exists() and not path.is_file():  # a device or a pipe may have no end
            raise OSError("it is no file")
        with path.open("rb") as file:
            return _bounded(file.read(_MAX_BYTES + 1))
    uri = name
    if not is_store_uri(name):
        place, mark, options = folder.partition("?")
        scheme, separator, rest = place.partition("://")
        uri = f"{scheme}{separator}{posixpath.normpath(f'{rest}/{urllib.parse.quote(name)}')}{mark}{options}"
    with io.BufferedReader(StoredFile(uri)) as stream:
        return _bounded(stream.read(_MAX_BYTES + 1))


def _bounded(content: Content) -> Content:
    if len(content) > _MAX_BYTES:
        raise ValueError(f"it has more than {_MAX_BYTES >> 20} MiB")
    return content


def _fetch(url: str) -> bytes:
    """A URL's content; asked again where the server is silent or in trouble, not where it says no."""
    request = urllib.request.Request(urllib.parse.quote(url, safe=_OF_URLS), headers={"User-Agent": "emloc-ray"})
    for wait in (*_WAITS_S, None):
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
                return _whole(answer)
        except urllib.error.HTTPError as error:
            if wait is None or error.code not in (408, 425, 429, 500, 502, 503, 504):
                raise ValueError(f"HTTP {error.code}") from error
        except (OSError, http.client.HTTPException):
            if wait is None:
                raise
        time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _whole(answer: Any) -> bytes:
    """An answer's body, as long as it said, within the time and size that an image may take."""
    content, ends = bytearray(), time.monotonic() + _LONGEST_S
    while chunk := answer.read1(_CHUNK_BYTES):
        content += chunk
        _bounded(content)
        if time.monotonic() > ends:
            raise TimeoutError(f"it took more than {_LONGEST_S:g} s")
    if answer.length:
        raise ConnectionError(f"it ended {answer.length} bytes early")
    return bytes(content)


def plain_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages as a processor's chat template takes them: every content a list of parts, images without their source."""
    return [{**turn, "content": _plain(turn["content"])} for turn in messages]


def text_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages that show no image as a tokenizer's chat template takes them: every content a text."""
    return [{**turn, "content": _text(turn["content"])} for turn in messages]


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _plain(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [{"type": "text", "text": part["text"]} if part["type"] == "text" else {"type": "image"} for part in content]
