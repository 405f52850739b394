"""What an Arrow or Parquet file says that it holds, checked before any value is looked at: no code comes from data.

An extension type is read by whatever code a library has registered for it; Ray Data unpickles the values of its
``ray.data.arrow_pickled_object``. One that is not registered here may be in a worker, and readers told to leave extensions out
return the registered ones: so all are refused, by type and by name.
"""

import base64
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from emloc_ray.errors import DamagedArtifactError, DataError
from emloc_ray.text import one_line

_EXTENSION_NAME = b"ARROW:extension:name"


def check_no_extensions(schema: pa.Schema, file: str) -> None:
    """Raises DataError, naming ``file`` and column, where any part of a column has an extension type, registered or not."""
    for field in schema:
        for column, kind in _extensions(field, field.name):
            raise DataError(
                f"{file}: column {column!r} has the extension type {kind!r}, whose values may run code where they are read:"
                " write it as text, numbers, bytes, lists or structs."
            )


def open_parquet(place: Any, name: str, **options: Any) -> pq.ParquetFile:
    """Opens a Parquet file once :func:`check_no_extensions` has passed what is read, and the Arrow schema that is stored in it,
    which alone names nested types that are not registered. Raises DataError also where the code that is registered for a type
    fails, and what pyarrow raises for a file that is not Parquet."""
    try:
        with contextlib.ExitStack() as opened:
            # Without Parquet's own logical types: UUIDs come as plain bytes.
            file = opened.enter_context(pq.ParquetFile(place, arrow_extensions_enabled=False, **options))
            stored = (file.metadata.metadata or {}).get(b"ARROW:schema")
            if stored is not None:
                check_no_extensions(pa.ipc.read_schema(pa.py_buffer(base64.b64decode(stored))), name)
            check_no_extensions(file.schema_arrow, name)
            opened.pop_all()  # it stays open where it is good
    except (TypeError, AttributeError, LookupError) as error:
        detail = one_line(f"{type(error).__name__}: {error}", 120)
        raise DataError(
            f"{name}: a column has an extension type that cannot be read ({detail}): write it as text, numbers, bytes, lists"
            " or structs."
        ) from error
    return file


def check_as_written(schema: pa.Schema, written: Sequence[pa.Schema], file: Path) -> None:
    """Raises DamagedArtifactError, naming ``file`` and column, where ``schema`` is none of those that are ``written``."""
    if any(schema.equals(known, check_metadata=True) for known in written):
        return
    known = [field for one in written for field in one]
    odd = next((field for field in schema if not any(field.equals(one, check_metadata=True) for one in known)), None)
    what = "its columns are others" if odd is None else f"column {odd.name!r} is another, {odd.type}"
    raise DamagedArtifactError(
        f"{file} is not as the data stage writes it ({what}): delete it, and the cache's entry that it came from if there"
        " is one, and run the same command again."
    )


def _extensions(field: pa.Field, path: str) -> Iterator[tuple[str, str]]:
    """The places in a column that have an extension type, as ``column.child``, each with the type's name."""
    kind: pa.DataType = field.type
    named = (field.metadata or {}).get(_EXTENSION_NAME)
    if isinstance(kind, pa.BaseExtensionType):
        yield path, kind.extension_name
    elif named is not None:
        yield path, named.decode(errors="replace")
    children = [kind.field(number) for number in range(kind.num_fields)]
    if pa.types.is_dictionary(kind):
        children.append(pa.field("values", kind.value_type))
    for child in children:
        yield from _extensions(child, f"{path}.{child.name}")
