"""Images inside a row's messages: named by path, URL or bytes, read as they are encoded and looked at once.

Token shards carry the encoded bytes, not pixels: a photo of some megapixels is about 100 KB as a JPEG, and 1.4 MB as the
336 × 336 float32 pixels that LLaVA reads (12 MB at the million pixels that Qwen-VL may take). Of 10⁷ rows that is 1 TB
against 14 TB (120 TB), and decoding takes some milliseconds where a training step takes hundreds.
"""

from __future__ import annotations

import base64
import binascii
import io
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from emloc_ray.data.reading import Row
from emloc_ray.errors import ArtifactError, ConfigError, DataError
from emloc_ray.io.object_store import is_store_uri
from emloc_ray.io.stored_files import StoredFile

COLUMNS = ("images", "image")
"""Columns whose images the parts ``{"type": "image"}`` that name none take, in their order."""

SOURCES = ("image", "url", "path", "base64", "bytes")
_TIMEOUT_S = 20.0
_WAITS_S = (1.0, 4.0)  # before another try of a URL
_MAX_BYTES = 2**27  # of one encoded image


def image_parts(row: Row) -> Iterator[dict[str, Any]]:
    """The image parts of all the row's messages, in order."""
    for turn in row.get("messages") or ():
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
            f"{where}: {without} image parts name no image, and {beside}: give each a path, a url or an image."
        )


def has_images(row: Row) -> bool:
    """Whether any message shows an image."""
    return next(image_parts(row), None) is not None


def load_images(row: Row, where: str) -> list[bytes]:
    """The encoded bytes of the row's images, in the order of its messages; each was decoded once.

    A relative path is taken from the folder of the row's file, here or on its object store.

    Raises:
        DataError: naming file and row, where one is missing, cannot be fetched, or is no image.
    """
    beside = iter(_column(row))
    found = []
    for number, part in enumerate(image_parts(row)):
        source = _source(part)
        label = f"{where}: image {number + 1}"
        content = _read(next(beside) if source is None else source, getattr(where, "folder", "."), label)
        try:
            decode(content)
        except Exception as error:  # whatever a broken file brings Pillow to raise
            named = f" {source[1]}" if source is not None and source[0] in ("path", "url") else ""
            detail = " ".join(str(error).split())[:120]
            raise DataError(f"{label}{named} cannot be decoded ({detail}): mend or replace it.") from error
        found.append(content)
    return found


def decode(content: bytes) -> Any:
    """An encoded image as transformers opens one: turned upright, RGB."""
    from PIL import Image
    from transformers.image_utils import load_image

    with Image.open(io.BytesIO(content)) as image:
        return load_image(image)


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
        raise DataError(
            f"{label} {value} is not there: mend the path, which is from the data file's folder."
        ) from error
    except binascii.Error as error:
        raise DataError(f"{label} is no base64 ({error}), and no path: mend it.") from error
    except (OSError, ValueError, ArtifactError, ConfigError) as error:
        detail = " ".join(str(getattr(error, "reason", error)).split())[:150]
        raise DataError(f"{label} {value} cannot be read ({detail}): mend the name or the file.") from error


def _read_file(name: str, folder: str) -> bytes:
    if is_store_uri(name):
        uri = name
    elif is_store_uri(folder) and not name.startswith("file://"):
        place, mark, options = folder.partition("?")
        uri = f"{place}/{urllib.parse.quote(name)}{mark}{options}"
    else:
        path = Path(folder) / Path(name.removeprefix("file://")).expanduser()
        return path.read_bytes()
    with io.BufferedReader(StoredFile(uri)) as stream:
        return stream.read()


def _fetch(url: str) -> bytes:
    """A URL's content; asked again where the server is silent or in trouble, not where it says no."""
    for wait in (*_WAITS_S, None):
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "emloc-ray"})
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
                content: bytes = answer.read(_MAX_BYTES + 1)
            if len(content) > _MAX_BYTES:
                raise ValueError(f"it has more than {_MAX_BYTES >> 20} MiB")
            return content
        except urllib.error.HTTPError as error:
            if wait is None or error.code not in (408, 425, 429, 500, 502, 503, 504):
                raise ValueError(f"HTTP {error.code}") from error
        except OSError:
            if wait is None:
                raise
        time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def plain_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages as a processor's chat template takes them: every content a list of parts, images without their source."""
    return [{**turn, "content": _plain(turn["content"])} for turn in messages]


def _plain(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [{"type": "text", "text": part["text"]} if part["type"] == "text" else {"type": "image"} for part in content]
