"""`.csv` and `.tsv` files: a header, then a row of text for each record. The ending says what stands between cells, or a first
line `sep=;` as spreadsheets write it.

Every value is text, as it stands: no number, date or missing value is guessed. A cell in double quotes may hold line breaks
and doubled quotes. Where quoting breaks off, or a record of several lines has another number of cells than the header or
holds what look like rows, its first line is a fault and reading goes on at the next: one stray quote costs one row. An
unnamed column (pandas writes its index so) is called `column N`. This module does not know what a column means.
"""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeAlias

from corral.data.sources.files import MAX_ROW_BYTES, SourceFile
from corral.data.sources.jsonl_and_text import Fault, read_lines
from corral.data.sources.raw_row import RawRow, faulty_row
from corral.errors import DataError

if TYPE_CHECKING:
    from _csv import Reader

DELIMITERS = {".csv": ",", ".tsv": "\t"}
_OTHERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_SEPARATOR = re.compile(r'"?sep=([,;|\t])"?\s*', re.IGNORECASE)
_BEHIND = "the lines behind it are read by themselves"

Line: TypeAlias = tuple[int, str, Fault | None]
"""(number from 1, text, what is wrong with it)."""


def read_csv(file: SourceFile) -> Iterator[RawRow]:
    """The rows of a `.csv` or `.tsv` file, numbered from 1 behind the header.

    Raises:
        DataError: the header cannot be used; the file is UTF-16, or no text at all.
        OSError, EOFError, zlib.error: it cannot be read to its end.
    """
    # Python's limit is 128 KiB for the whole process; a long document is no fault.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    feed = _Feed(file)
    delimiter = feed.separator() or DELIMITERS[file.kind]
    reader = csv.reader(feed, delimiter=delimiter, strict=True)
    cells: list[str] | None = []
    while not cells:
        cells, reason = _record(reader, feed)
        if cells is None:
            return
        if reason is not None:
            raise DataError(f"the header cannot be read: {reason}", where=file.where, hint="mend the first line")
    names = _header(cells, file, delimiter)
    spaced = any(f"{delimiter} " in text for _, text, _ in feed.record)
    number = 0
    while True:
        cells, reason = _record(reader, feed)
        if cells is None:
            return
        if not cells and reason is None:
            continue
        number += 1
        line, _, fault = feed.record[0]
        if fault is None and cells:
            reason = _misread(cells, len(names), feed, delimiter, spaced=spaced) or reason
        place = f"row {number} (line {line})"
        if reason is not None:
            yield faulty_row(number, place, reason, feed.detail)
        else:
            yield RawRow(number, dict(zip(names, cells, strict=True)), location=place)


def _record(reader: Reader, feed: _Feed) -> tuple[list[str] | None, str | None]:
    """(the next record's cells, or None at the end; what is wrong with it). Of a broken one only the first line is used up."""
    feed.record.clear()
    try:
        cells = next(reader)
    except StopIteration:
        return None, None
    except csv.Error as error:
        several, ended = len(feed.record) > 1, "unexpected end" in str(error)
        feed.push_back(doubt=not ended)
        feed.broken = not several
        if feed.fault is None and several and not ended:
            return [], f"a quote opens a cell, and is not closed as it should be; {_BEHIND}"
        return [], feed.fault[0] if feed.fault else _explain(str(error))
    return cells, feed.fault[0] if feed.fault else None


def _misread(cells: list[str], width: int, feed: _Feed, delimiter: str, *, spaced: bool) -> str | None:
    """Why a record is not the row it seems to be, if so; then of several lines only the first is used up.

    Args:
        cells: of the record.
        width: cells of the header.
        feed: which holds the record's lines.
        delimiter: what stands between cells.
        spaced: whether the file puts a space behind it.
    """
    several = len(feed.record) > 1
    if len(cells) != width:
        more = "fewer" if len(cells) < width else "more"
        reason = f"the row has {more} cells than the header, which has {width}"
        if several:
            reason += f": perhaps a quote too many; {_BEHIND}"
            feed.push_back()
        return reason
    if len(feed.record) > 3 and _holds_rows(feed.record, width, delimiter, spaced=spaced):
        feed.push_back()
        return f"a cell in quotes holds lines that look like rows: perhaps a quote is not closed; {_BEHIND}"
    line, text, _ = feed.record[0]
    if (line <= feed.doubtful or feed.broken) and not spaced and any(cell.startswith(" ") for cell in cells[1:]):
        if several:
            feed.push_back()
        feed.broken = feed.broken and '"' not in text
        return "the line may be a part of the broken cell before it"
    feed.broken = False
    return None


def _explain(message: str) -> str:
    """What the csv module has against a line."""
    if "unexpected end of data" in message:
        return "a quote opens a cell, and is not closed"
    if "expected after" in message:
        return "a quoted cell goes on behind its closing quote (a quote within it is written twice)"
    if "field limit" in message:
        return f"a cell is longer than {MAX_ROW_BYTES // 2**20} MiB: perhaps a quote is not closed"
    if "new-line character" in message:
        return "a carriage return stands alone between cells"
    return "the line cannot be taken apart into cells"


def _holds_rows(record: list[Line], width: int, delimiter: str, *, spaced: bool) -> bool:
    """Whether most lines between the first and the last of a record look like rows of the table.

    A line of prose has a space behind each comma, and a number none on either side; a row seldom has either.
    """
    if width < 2:
        return False
    number = re.compile(rf"\d{re.escape(delimiter)}\d")
    inner = [text.rstrip("\r\n") for _, text, _ in record[1:-1] if text.strip()]
    found = 0
    for line in inner:
        prose = (f"{delimiter} " in line and not spaced) or (width == 2 and number.search(line))
        if line.count(delimiter) >= width - 1 and not prose:
            try:
                found += len(next(csv.reader([line], delimiter=delimiter, strict=True))) == width
            except csv.Error:
                continue
    return found > 1 and 2 * found > len(inner)


def _header(names: list[str], file: SourceFile, delimiter: str) -> list[str]:
    """The names of the columns. Raises: DataError (the same one twice; the cells are separated by something else)."""
    names = [name.strip() or f"column {i}" for i, name in enumerate(names, start=1)]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise DataError(
            f"two columns are called {twice!r}",
            where=file.where,
            hint="the first line holds the columns' names: rename one",
        )
    other = next((mark for mark in _OTHERS if len(names) == 1 and mark != delimiter and mark in names[0]), None)
    if other is not None:
        raise DataError(
            f"the header holds {_OTHERS[other]}, where a {file.kind} file has {_OTHERS[DELIMITERS[file.kind]]}",
            where=file.where,
            hint=f"save it with commas as .csv, or with tabs as .tsv, or put a line sep={other} before the header",
        )
    return names


class _Feed:
    """The lines of a file for the csv reader. It keeps those of the present record, which can be pushed back.

    A file whose lines end in carriage returns alone is one line for `lines`; it is taken apart here.
    """

    def __init__(self, file: SourceFile) -> None:
        self.record: list[Line] = []
        self.doubtful = 0
        """The last line that was within a broken cell."""
        self.broken = False
        """Whether the last record was a broken cell that may go on: until a line with a quote, or one that is a row."""
        self._next: deque[Line] = deque()
        self._lines = read_lines(file)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._next.popleft() if self._next else self._read()
        self.record.append(line)
        return line[1]

    def _read(self) -> Line:
        number, text, fault = next(self._lines)
        if number == 1 and fault is None and not text.endswith("\n") and "\r" in text:
            self._next.extend((i, f"{part}\n", None) for i, part in enumerate(text.split("\r"), 1))
            return self._next.popleft()
        # A file converted twice has two returns at each line's end.
        return number, text.rstrip("\r\n") + "\r\n" if text.endswith("\r\r\n") else text, fault

    def separator(self) -> str | None:
        """What the first line says stands between cells, if it says just that; then it is used up."""
        try:
            first = self._read()
        except StopIteration:
            return None
        if found := _SEPARATOR.fullmatch(first[1]):
            return found[1]
        self._next.appendleft(first)
        return None

    def push_back(self, *, doubt: bool = True) -> None:
        """Leaves only the first line to the present record: the others are read again, as lines that may be no rows."""
        if doubt:
            self.doubtful = max(self.doubtful, self.record[-1][0])
        self._next.extendleft(reversed(self.record[1:]))
        del self.record[1:]

    @property
    def fault(self) -> Fault | None:
        """What is wrong with the lines of the present record."""
        return next((fault for _, _, fault in self.record if fault), None)

    @property
    def detail(self) -> str:
        return self.fault[1] if self.fault else ""
