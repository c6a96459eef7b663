"""Reads `.parquet` and `.arrow` files in parts, so that memory depends on their row groups or batches and not on the file.

Lists, structs and maps become lists and objects. NULL and NaN become None; infinity is a fault of its row. Dates and times
become ISO 8601 text, decimals and durations their text. Bytes become UTF-8 text, or are a fault.
"""

from __future__ import annotations

import datetime
import decimal
import math
import uuid
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from corral.data.sources.files import BrokenFileError, Say, SourceFile
from corral.data.sources.raw_row import RawRow, faulty_row
from corral.errors import DataError

_BATCH = 512
_BUFFER = 2**18
_ARROW_FILE = b"ARROW1"


def read_parquet_or_arrow(file: SourceFile, _: Say) -> Iterator[RawRow]:
    """The rows of a `.parquet` or `.arrow` file, numbered from 1.

    Raises:
        DataError: it has two columns of one name, or is a Git LFS pointer.
        BrokenFileError: it is not such a file, or is damaged.
        OSError: its compressed bytes cannot be read to their end.
    """
    import pyarrow

    number = 0
    with file.local_copy() as path:
        try:
            # By path: pyarrow's threads may still hold a Python file object when the interpreter exits, and abort it.
            with (_open_parquet if file.kind == ".parquet" else _open_arrow)(path) as (schema, batches):
                names: list[str] = list(schema.names)
                if twice := next((name for name, count in Counter(names).items() if count > 1), None):
                    raise DataError(
                        f"two columns are called {twice!r}", where=file.where, hint="write it with one of them"
                    )
                plain = all(_is_plain(schema.field(i).type) for i in range(len(names)))
                for batch in batches:
                    for values in _rows(batch):
                        number += 1
                        yield _row(number, values, plain)
        # A damaged file raises any of pyarrow's errors, and OSError, ValueError or OverflowError.
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            message = (str(error) or type(error).__name__).splitlines()[0]
            raise BrokenFileError(f"not a {file.kind} file, or damaged: {message}") from None


@contextmanager
def _open_parquet(path: Path) -> Generator[tuple[Any, Iterator[Any]]]:
    """(schema, batches) of a parquet file."""
    import pyarrow.parquet as pq

    # Unbuffered: pyarrow keeps what it reads ahead, up to the whole file.
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER) as opened:
        yield opened.schema_arrow, opened.iter_batches(batch_size=_BATCH, use_threads=False)


@contextmanager
def _open_arrow(path: Path) -> Generator[tuple[Any, Iterator[Any]]]:
    """(schema, batches) of an Arrow file: of the stream format, which `datasets` writes, or of the file format."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as content:
        is_file = content.read(len(_ARROW_FILE)) == _ARROW_FILE
        content.seek(0)
        with pyarrow.ipc.open_file(content) if is_file else pyarrow.ipc.open_stream(content) as opened:
            whole = (opened.get_batch(i) for i in range(opened.num_record_batches)) if is_file else opened
            yield opened.schema, (part for batch in whole for part in _slices(batch))


def _slices(batch: Any) -> Iterator[Any]:
    batch.validate(full=True)  # reading a damaged one would read beyond the mapped file
    return (batch.slice(start, _BATCH) for start in range(0, batch.num_rows, _BATCH))


def _rows(batch: Any) -> Iterator[dict[str, Any] | Exception]:
    """Each row of a batch as Python values, or the error of its conversion."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):
        # Text that is not UTF-8, or a date beyond Python's years, is a fault of its row alone.
        for i in range(batch.num_rows):
            try:
                yield batch.slice(i, 1).to_pylist()[0]
            except (ValueError, OverflowError) as error:
                yield error


def _row(number: int, values: dict[str, Any] | Exception, plain: bool) -> RawRow:
    location = f"row {number}"
    if isinstance(values, Exception):
        what = "not UTF-8 text" if isinstance(values, UnicodeDecodeError) else "a value that Python cannot hold"
        return faulty_row(number, location, f"{what} in a column")
    if plain:
        return RawRow(number, values, location=location)
    try:
        return RawRow(number, {name: _as_json(value, name) for name, value in values.items()}, location=location)
    except _UnsupportedValueError as fault:
        return faulty_row(number, location, str(fault))


class _UnsupportedValueError(Exception):
    """A value has no counterpart in JSON. The message names the value's kind and the column."""


def _as_json(value: Any, column: str) -> Any:
    match value:
        case None | str() | bool() | int():
            return value
        case float():
            if math.isinf(value):
                raise _UnsupportedValueError(f"infinity in column {column!r}")
            return None if math.isnan(value) else value
        case dict():
            return {str(key): _as_json(part, column) for key, part in cast("dict[Any, Any]", value).items()}
        case list():
            return [_as_json(part, column) for part in cast("list[Any]", value)]
        case tuple():  # an entry of a map
            return [_as_json(part, column) for part in cast("tuple[Any, ...]", value)]
        case datetime.datetime() | datetime.date() | datetime.time():
            return value.isoformat()
        case decimal.Decimal() | datetime.timedelta() | uuid.UUID():
            return str(value)
        case bytes():
            try:
                return value.decode()
            except UnicodeDecodeError:
                raise _UnsupportedValueError(f"bytes in column {column!r}, which are no UTF-8 text") from None
        case _:
            raise _UnsupportedValueError(
                f"a {type(value).__name__} in column {column!r}, which is no text, number, list or object"
            )


def _is_plain(kind: Any) -> bool:
    """Whether all Python values of an Arrow type are JSON values."""
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind):
        return _is_plain(kind.value_type)
    if types.is_struct(kind):
        return all(_is_plain(kind.field(i).type) for i in range(kind.num_fields))
    if types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    return any(
        test(kind)
        for test in (types.is_string, types.is_large_string, types.is_boolean, types.is_integer, types.is_null)
    )
