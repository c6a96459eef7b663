"""`.csv` and `.tsv` files: a header, then a row of text for each record. The ending alone says what stands between cells.

Every value is text, as it stands: no number, date or missing value is guessed. A cell in double quotes may hold line breaks
and doubled quotes; quoting that breaks off, and a row with more or fewer cells than the header, are faults of that row. An
unnamed column (pandas writes its index so) is called `column N`. This module does not know what a column means.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import TYPE_CHECKING

from corral.data.sources.files import LONGEST, File
from corral.data.sources.lines import Fault, lines
from corral.data.sources.raw import RawRow, faulty
from corral.errors import DataError

if TYPE_CHECKING:
    from _csv import Reader

DELIMITERS = {".csv": ",", ".tsv": "\t"}
_OTHERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def read_table(file: File) -> Iterator[RawRow]:
    """The rows of a `.csv` or `.tsv` file, numbered from 1 behind the header.

    Raises:
        DataError: the header cannot be used; the file is UTF-16, or no text at all.
        OSError, EOFError, zlib.error: it cannot be read to its end.
    """
    # Python's limit is 128 KiB for the whole process; a long document is no fault.
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST))
    feed = _Feed(file)
    reader = csv.reader(feed, delimiter=DELIMITERS[file.kind], strict=True)
    cells: list[str] | None = []
    while not cells:
        cells, reason = _record(reader, feed)
        if cells is None:
            return
        if reason is not None:
            raise DataError(f"the header cannot be read: {reason}", where=file.where, hint="mend the first line")
    names = _header(cells, file)
    number = 0
    while True:
        begins = feed.number + 1
        cells, reason = _record(reader, feed)
        if cells is None:
            return
        if not cells and reason is None:
            continue
        number += 1
        place = f"row {number} (line {begins})"
        if reason is None and len(cells) != len(names):
            more = "fewer" if len(cells) < len(names) else "more"
            reason = f"the row has {more} cells than the header, which has {len(names)}"
        if reason is not None:
            yield faulty(number, place, reason, feed.detail)
        else:
            yield RawRow(number, dict(zip(names, cells, strict=True)), place=place)


def _record(reader: Reader, feed: _Feed) -> tuple[list[str] | None, str | None]:
    """(the next record's cells, or None at the end; what is wrong with it)."""
    feed.fault = None
    try:
        cells = next(reader)
    except StopIteration:
        return None, None
    except csv.Error as error:
        return [], feed.reason or _explain(str(error))
    return cells, feed.reason


def _explain(message: str) -> str:
    if "unexpected end of data" in message:
        return "a quoted cell is not closed before the file's end: the rows behind it are lost in it"
    if "expected after" in message:
        return "a quoted cell goes on behind its closing quote (a quote within it is written twice)"
    if "field limit" in message:
        return f"a cell is longer than {LONGEST // 2**20} MiB: perhaps a quote is not closed"
    return f"not valid as a row of cells: {message}"


def _header(names: list[str], file: File) -> list[str]:
    """The names of the columns. Raises: DataError (the same one twice; the cells are separated by something else)."""
    names = [name.strip() or f"column {i}" for i, name in enumerate(names, start=1)]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise DataError(
            f"two columns are called {twice!r}",
            where=file.where,
            hint="the first line holds the columns' names: rename one",
        )
    delimiter = DELIMITERS[file.kind]
    other = next((mark for mark in _OTHERS if len(names) == 1 and mark != delimiter and mark in names[0]), None)
    if other is not None:
        raise DataError(
            f"the header holds {_OTHERS[other]}, where a {file.kind} file has {_OTHERS[delimiter]}",
            where=file.where,
            hint="save it with commas as .csv, or with tabs as .tsv",
        )
    return names


class _Feed:
    """The lines of a file for the csv reader, which keeps what was wrong with those of the present record."""

    def __init__(self, file: File) -> None:
        self.number = 0
        self.fault: Fault | None = None
        self._lines = lines(file)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.number, text, fault = next(self._lines)
        self.fault = self.fault or fault
        return text

    @property
    def reason(self) -> str | None:
        return self.fault[0] if self.fault else None

    @property
    def detail(self) -> str:
        return self.fault[1] if self.fault else ""
