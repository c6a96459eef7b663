"""Rows in Arrow files: the one form in which rows are stored, in the cache and in a run.

A `RowStore` is a folder of Arrow files with some rows each, which any reader of Arrow can open. A row has a position, which
is unique in its store. Rows may be saved in any order, by any number of processes and over several runs. The name of each
file ends with the checksum of its content: a damaged file is found when the store is opened, and counts as missing.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from corral.errors import DataError
from corral.storage import write_atomic

Ints: TypeAlias = NDArray[np.int64]
Column: TypeAlias = Any
"""A numpy array of [rows] or [rows, width], or an Arrow array of [rows]."""
Batch: TypeAlias = Any
"""A `pyarrow.RecordBatch`."""

CHUNK_ROWS = 500
"""Rows that are read, and usually saved, at once."""
_POSITION = "position"
_OPEN_FILES = 8  # a file of tokens is about 1 MB


class RowStore:
    """Columns of rows, by position.

    Attributes:
        folder: of the files; it need not exist before the first `save`.
        positions: of the rows that are stored, ascending. [rows]
        damaged: files whose content is not what was saved.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._checked: set[str] = set()
        self.reload()

    def __len__(self) -> int:
        return len(self.positions)

    def reload(self) -> None:
        """Take in the rows that were saved since, also by other processes."""
        self._open: OrderedDict[int, Batch] = OrderedDict()
        self._files: list[Path] = []
        self.damaged: list[Path] = []
        parts: list[Ints] = []
        for path in sorted(self.folder.glob("*.arrow")):
            if path.name not in self._checked:
                if zlib.crc32(path.read_bytes()) != _checksum_in_name(path):
                    self.damaged.append(path)
                    continue
                self._checked.add(path.name)
            self._files.append(path)
            parts.append(_to_numpy(_read_file(path)[_POSITION]).copy())
        # Two runs at the same time may have saved a row twice; both are the same.
        empty = np.empty(0, np.int64)
        self.positions, first = np.unique(np.concatenate([empty, *parts]), return_index=True)
        lengths = [len(part) for part in parts]
        self._file = np.repeat(np.arange(len(parts), dtype=np.int32), lengths)[first]
        self._offset = np.concatenate([empty, *map(np.arange, lengths)]).astype(np.int32)[first]

    def select_missing(self, positions: Ints) -> Ints:
        """Those of the positions that are not stored."""
        return positions[~np.isin(positions, self.positions)]

    def save(self, positions: Ints, columns: Mapping[str, Column]) -> None:
        """Store rows in a new file; `reload` makes them available. Raises StorageError."""
        import pyarrow as pa

        values: list[Any] = [to_arrow(column) for column in (positions, *columns.values())]
        batch: Any = pa.RecordBatch.from_arrays(values, [_POSITION, *columns])
        sink: Any = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        content: bytes = sink.getvalue().to_pybytes()
        name = hashlib.sha256(positions.astype("<i8").tobytes()).hexdigest()[:16]
        write_atomic(self.folder / f"{name}-{zlib.crc32(content):08x}.arrow", content, flush=False)

    def read(self, positions: Ints) -> Iterator[tuple[Ints, Batch]]:
        """(up to `CHUNK_ROWS` of the positions, their rows in the same order), until all are read.

        Raises DataError if a row is not stored.
        """
        import pyarrow as pa

        for part in split_positions(positions):
            index = self._find(part)
            files, offsets = self._file[index], self._offset[index]
            batches: list[Any] = []
            order: list[NDArray[Any]] = []
            for number in np.unique(files):
                rows = np.flatnonzero(files == number)
                batches.append(_take(self._file_rows(int(number)), offsets[rows]))
                order.append(rows)
            if len(batches) == 1:
                yield part, batches[0]
            else:
                table: Any = pa.Table.from_batches(batches).combine_chunks().to_batches()[0]
                yield part, table.take(pa.array(np.argsort(np.concatenate(order), kind="stable")))

    def column(self, name: str, positions: Ints | None = None) -> NDArray[Any]:
        """One value, or a list of fixed width, for each of the positions, by default of all rows. [positions(, width)]

        Of no positions it has the column's type and width, too, unless the store has no files.
        """
        positions = self.positions if positions is None else positions
        parts = [_to_numpy(batch[name]) for _, batch in self.read(positions)]
        if not parts and self._files:
            parts = [_to_numpy(self._file_rows(0)[name].slice(0, 0))]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def locate(self, position: int) -> tuple[Batch, int]:
        """(the rows of the file that holds this position, its offset among them)."""
        (i,) = self._find(np.array([position]))
        return self._file_rows(int(self._file[i])), int(self._offset[i])

    def _find(self, positions: Ints) -> Ints:
        """Where these positions are among all. Raises DataError if a row is not stored."""
        index = np.searchsorted(self.positions, positions)
        if len(positions) and not (len(self) and (self.positions.take(index, mode="clip") == positions).all()):
            hint = "run again: what is missing is made again"
            raise DataError("stored rows are missing or damaged", where=str(self.folder), hint=hint)
        return index

    def _file_rows(self, number: int) -> Batch:
        batch = self._open.pop(number, None)
        self._open[number] = batch = _read_file(self._files[number]) if batch is None else batch
        if len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)
        return batch


def split_positions(positions: Ints) -> list[Ints]:
    """The positions in pieces of `CHUNK_ROWS`."""
    return [positions[at : at + CHUNK_ROWS] for at in range(0, len(positions), CHUNK_ROWS)]


def list_column(values: Any, bounds: NDArray[Any]) -> Any:
    """An Arrow array of lists, each from one of the bounds in `values` to the next. [len(bounds) - 1]"""
    import pyarrow as pa

    return pa.LargeListArray.from_arrays(pa.array(bounds, pa.int64()), to_arrow(values))


def split_list_column(column: Any) -> tuple[Any, Ints]:
    """(the values of an Arrow array of lists, the bounds of each list in them): the inverse of `list_column`."""
    bounds = np.asarray(column.offsets)
    return column.values.slice(bounds[0], bounds[-1] - bounds[0]), bounds - bounds[0]


def text_column(codes: NDArray[Any], texts: Sequence[str]) -> Any:
    """An Arrow array of `texts[code]` for each code, and null for negative ones."""
    import pyarrow as pa

    indices = pa.array(codes.astype(np.int32), mask=codes < 0)
    return pa.DictionaryArray.from_arrays(indices, pa.array(list(texts), pa.string()))


def _checksum_in_name(path: Path) -> int:
    try:
        return int(path.stem.rpartition("-")[2], 16)
    except ValueError:
        return -1


def _read_file(path: Path) -> Batch:
    import pyarrow as pa

    try:
        reader: Any = pa.ipc.open_file(pa.memory_map(str(path)))
    except OSError as error:
        hint = "if its folder was removed meanwhile, run again"
        raise DataError(f"stored rows cannot be read: {error}", where=str(path), hint=hint) from None
    return reader.get_batch(0)


def _take(batch: Batch, offsets: NDArray[Any]) -> Batch:
    import pyarrow as pa

    if len(offsets) and (np.diff(offsets) == 1).all():
        return batch.slice(int(offsets[0]), len(offsets))  # nothing is copied
    return batch.take(pa.array(offsets))


def to_arrow(values: Column) -> Any:
    """A column as an Arrow array."""
    import pyarrow as pa

    if not isinstance(values, np.ndarray):
        return values
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _to_numpy(column: Any) -> NDArray[Any]:
    import pyarrow as pa

    if pa.types.is_fixed_size_list(column.type):
        return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)
    return column.to_numpy(zero_copy_only=False)
