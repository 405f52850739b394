"""Images inside a row's messages: named by path, URL or bytes, read encoded, decoded once to check them.

Token shards carry the encoded bytes: a photo is about 100 KB as a JPEG, 1.4 MB as the 336 × 336 float32 pixels that LLaVA reads
(Qwen-VL: up to 12 MB), and decoding takes some milliseconds where a training step takes hundreds.
"""

import base64
import contextlib
import http.client
import io
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emloc_ray.data.downloads import NotAllowed
from emloc_ray.data.image_places import NOWHERE_ELSE, ImagePlaces, is_remote, local_path
from emloc_ray.data.text_rows import Row
from emloc_ray.errors import DataError
from emloc_ray.io.store.places import is_store_uri
from emloc_ray.text import one_line

COLUMNS = ("images", "image")
"""Columns with the images of parts ``{"type": "image"}`` that name no image, in their order."""

SOURCES = ("image", "url", "path", "base64", "bytes")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
"""What Pillow may open of rows' images: each further decoder is one more that a row can attack."""
MAX_PIXELS = 2**27  # of one image: 400 MB as RGB
NO_PROCESSOR = "the model has no processor that makes an image's inputs without the text beside it: choose one that has"
_REMOTE_BYTES = 100_000


def image_parts(row: Row) -> Iterator[dict[str, Any]]:
    """The image parts of all the row's messages, in order; none where messages have no known form."""
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
    """The kind of each of the row's images, and what names or holds it, in order; parts that name no image take the
    columns'."""
    beside = iter(_column(row))
    for part in image_parts(row):
        source = _source(part) or next(beside, None)
        if source is not None:
            yield source


def look(row: Row, where: str, places: ImagePlaces = NOWHERE_ELSE) -> list[Any]:
    """Names, and of local files sizes and times, of the images outside a checked row; opens none. Raises DataError, naming file
    and row, where a local file is missing, or a place is one that rows may not read."""
    folder = getattr(where, "folder", ".")
    seen: list[Any] = []
    for number, (kind, name) in enumerate(sources(row)):
        if kind not in ("path", "url") or not isinstance(name, str) or name.startswith("data:"):
            continue
        label = f"{where}: image {number + 1} {_shown(name)}"
        try:
            if is_remote(name, folder):
                if not name.startswith(("http://", "https://")):
                    places.stored(name, folder)
                seen.append(name)
                continue
            status = places.local(name, folder).stat()
        except NotAllowed as error:
            raise _not_allowed(label, error) from error
        except (OSError, ValueError) as error:
            raise _not_there(label) from error
        seen.append([name, status.st_size, status.st_mtime_ns])
    return seen


def encoded_bytes(row: Row, folder: str) -> int:
    """About how many bytes the row's encoded images have; opens none, and takes a remote one for 100 KB."""
    size = 0
    for kind, value in sources(row):
        if isinstance(value, str) and (kind == "base64" or value.startswith("data:")):
            size += len(value) * 3 // 4
        elif isinstance(value, str):
            size += _REMOTE_BYTES if is_remote(value, folder) else _file_bytes(local_path(value, folder))
        elif isinstance(value, bytes):
            size += len(value)
    return size


def _file_bytes(path: Path) -> int:
    with contextlib.suppress(OSError, ValueError):  # a name may be too long, or hold a NUL
        return path.stat().st_size
    return 0


def _not_allowed(label: str, error: NotAllowed) -> DataError:
    return DataError(f"{label} is not read: {error}.")


def _not_there(label: str) -> DataError:
    return DataError(f"{label} is not there: fix the path, which is from the data file's folder.")


def load_images(row: Row, where: str, places: ImagePlaces = NOWHERE_ELSE) -> list[bytes]:
    """The encoded bytes of the row's images, in the order of its messages; each is decoded once to check it.

    A relative path begins at the folder of the row's file, here or on its object store. Raises DataError, naming file and row,
    where an image is missing, may not or cannot be fetched, is none of :data:`FORMATS`, or is too large; ArtifactError where a
    store does not answer: that is no fault of the row.
    """
    contents = []
    for number, source in enumerate(sources(row)):
        label = f"{where}: image {number + 1}"
        if isinstance(source[1], str) and (source[0] != "base64" or len(source[1]) < 100):
            label = f"{label} {_shown(source[1])}"
        content = _read(source, getattr(where, "folder", "."), label, places)
        try:
            decode(content)
        except Exception as error:  # whatever a broken file brings Pillow to raise
            raise DataError(f"{label} cannot be decoded ({one_line(error, 120)}): replace it.") from error
        contents.append(content)
    return contents


def decode(content: bytes | memoryview) -> Any:
    """An encoded image as transformers opens one: upright, RGB; of 16 bits a pixel the upper 8. Raises ValueError where it is
    none of :data:`FORMATS`, or has too many pixels; Pillow raises others for a broken file."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError("it is no JPEG, PNG, WebP or GIF") from error
    with image:
        if math.prod(image.size) > MAX_PIXELS:  # before any is decoded
            raise ValueError(f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # Pillow cuts 16 bits off at 255, which makes most of such an image white
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        return upright.convert("RGB")


def _shown(name: str) -> str:
    """A name for errors: a URL without signature and login, and at most 200 characters."""
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
    """The kind of a part's image, and what names or holds it; None where the part names none."""
    given = part.get("image_url")
    if given is not None:
        return "url", given.get("url") if isinstance(given, dict) else given
    for key in SOURCES:
        if part.get(key) is not None:
            return _named(part[key]) if key == "image" else (key, part[key])
    return None


def _named(value: Any) -> tuple[str, Any]:
    """The kind of a value of ``image``: bytes, a path, a URL, base64, or the ``{bytes, path}`` of data sets' image columns."""
    if isinstance(value, dict):
        return ("bytes", value["bytes"]) if value.get("bytes") is not None else ("path", value.get("path"))
    if not isinstance(value, str):
        return "bytes", value
    if value.startswith(("http://", "https://")):
        return "url", value
    is_path = len(value) < 4096 and (is_store_uri(value) or value.startswith("file://") or "." in value[-6:])
    return ("path" if is_path and not value.startswith("data:") else "base64"), value


def _read(source: tuple[str, Any], folder: str, label: str, places: ImagePlaces) -> bytes:
    kind, value = source
    if kind == "bytes" and isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if not isinstance(value, str):
        raise DataError(f"{label} is {type(value).__name__}: give a path, a URL or the encoded file's bytes.")
    try:
        if kind == "base64" or value.startswith("data:"):
            return base64.b64decode(value.partition(",")[2] if value.startswith("data:") else value, validate=True)
        return places.read(value, folder)
    except NotAllowed as error:
        raise _not_allowed(label, error) from error
    except FileNotFoundError as error:
        raise _not_there(label) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        if kind == "base64":  # a path is recognized by its ending
            raise DataError(
                f"{label} is no base64 ({_detail(error, value)}), and no path: fix it, or give it as path."
            ) from error
        raise DataError(f"{label} cannot be read ({_detail(error, value)}): fix the name or the file.") from error


def _detail(error: Exception, name: str) -> str:
    said = str(getattr(error, "reason", None) or getattr(error, "strerror", None) or error)
    return one_line(said.replace(name, _shown(name)), 150)


def plain_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages as a processor's chat template takes them: every content a list of parts, images without their source."""

    def parts(content: Any) -> list[dict[str, Any]]:
        named = [{"type": "text", "text": content}] if isinstance(content, str) else content
        return [
            {"type": "text", "text": part["text"]} if part["type"] == "text" else {"type": "image"} for part in named
        ]

    return [{**turn, "content": parts(turn["content"])} for turn in messages]


def text_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages without images as a tokenizer's chat template takes them: every content a text."""

    def text(content: Any) -> str:
        return content if isinstance(content, str) else "".join(part["text"] for part in content)

    return [{**turn, "content": text(turn["content"])} for turn in messages]
