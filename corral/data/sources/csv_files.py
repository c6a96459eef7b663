"""Reads `.csv` and `.tsv` files: a header, then a row of text per record.

The extension gives the delimiter, or a first line `sep=;` as spreadsheets write it. Every value is text as it stands:
numbers, dates and missing values are not guessed. A cell in double quotes may hold line breaks and doubled quotes. If a
quoted cell is broken, or a record of several lines has the wrong number of cells or holds what look like rows, its first
line is a fault and reading continues at the next line, so that a stray quote costs one row. An unnamed column (pandas writes
its index so) is called `column N`.
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
_DELIMITER_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_SEPARATOR_LINE = re.compile(r'"?sep=([,;|\t])"?\s*', re.IGNORECASE)
_LINES_AFTER = "the lines behind it are read by themselves"

Line: TypeAlias = tuple[int, str, Fault | None]
"""(number from 1, text, fault)."""


def read_csv(file: SourceFile) -> Iterator[RawRow]:
    """The rows of a `.csv` or `.tsv` file, numbered from 1 after the header.

    Raises:
        DataError: the header cannot be used, or the file is UTF-16 or not text at all.
        OSError, EOFError, zlib.error: it cannot be read to its end.
    """
    # Python's default limit is 128 KiB; longer documents are valid.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    feed = _LineFeed(file)
    delimiter = feed.separator() or DELIMITERS[file.kind]
    reader = csv.reader(feed, delimiter=delimiter, strict=True)
    cells: list[str] | None = []
    while not cells:
        cells, reason = _next_record(reader, feed)
        if cells is None:
            return
        if reason is not None:
            raise DataError(f"the header cannot be read: {reason}", where=file.where, hint="fix the first line")
    names = _check_header(cells, file, delimiter)
    spaced = any(f"{delimiter} " in text for _, text, _ in feed.record)
    number = 0
    while True:
        cells, reason = _next_record(reader, feed)
        if cells is None:
            return
        if not cells and reason is None:
            continue
        number += 1
        line, _, fault = feed.record[0]
        if fault is None and cells:
            reason = _explain_misread(cells, len(names), feed, delimiter, spaced=spaced) or reason
        location = f"row {number} (line {line})"
        if reason is not None:
            yield faulty_row(number, location, reason, feed.detail)
        else:
            yield RawRow(number, dict(zip(names, cells, strict=True)), location=location)


def _next_record(reader: Reader, feed: _LineFeed) -> tuple[list[str] | None, str | None]:
    """(the next record's cells, or None at the end; the reason against it). A broken one consumes only its first line."""
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
            return [], f"a quote opens a cell, and is not closed as it should be; {_LINES_AFTER}"
        return [], feed.fault[0] if feed.fault else _explain_error(str(error))
    return cells, feed.fault[0] if feed.fault else None


def _explain_misread(cells: list[str], width: int, feed: _LineFeed, delimiter: str, *, spaced: bool) -> str | None:
    """The reason why a record is not a row, if it is not. Then only its first line is consumed.

    Args:
        cells: of the record.
        width: cells of the header.
        feed: holds the record's lines.
        delimiter: between cells.
        spaced: whether the file writes a space after the delimiter.
    """
    several = len(feed.record) > 1
    if len(cells) != width:
        more = "fewer" if len(cells) < width else "more"
        reason = f"the row has {more} cells than the header, which has {width}"
        if several:
            reason += f": perhaps a quote too many; {_LINES_AFTER}"
            feed.push_back()
        return reason
    if len(feed.record) > 3 and _looks_like_rows(feed.record, width, delimiter, spaced=spaced):
        feed.push_back()
        return f"a cell in quotes holds lines that look like rows: perhaps a quote is not closed; {_LINES_AFTER}"
    line, text, _ = feed.record[0]
    if (
        (line <= feed.last_doubtful_line or feed.broken)
        and not spaced
        and any(cell.startswith(" ") for cell in cells[1:])
    ):
        if several:
            feed.push_back()
        feed.broken = feed.broken and '"' not in text
        return "the line may be a part of the broken cell before it"
    feed.broken = False
    return None


def _explain_error(message: str) -> str:
    """The csv module's error message in plain words."""
    if "unexpected end of data" in message:
        return "a quote opens a cell, and is not closed"
    if "expected after" in message:
        return "a quoted cell goes on behind its closing quote (a quote within it is written twice)"
    if "field limit" in message:
        return f"a cell is longer than {MAX_ROW_BYTES // 2**20} MiB: perhaps a quote is not closed"
    if "new-line character" in message:
        return "a carriage return stands alone between cells"
    return "the line cannot be taken apart into cells"


def _looks_like_rows(record: list[Line], width: int, delimiter: str, *, spaced: bool) -> bool:
    """Whether most lines between the first and the last of a record look like rows of the table.

    Prose has a space after each comma, and digits on both sides of a decimal comma; a row seldom has either.
    """
    if width < 2:
        return False
    number = re.compile(rf"\d{re.escape(delimiter)}\d")
    inner = [text.rstrip("\r\n") for _, text, _ in record[1:-1] if text.strip()]
    rows = 0
    for line in inner:
        prose = (f"{delimiter} " in line and not spaced) or (width == 2 and number.search(line))
        if line.count(delimiter) >= width - 1 and not prose:
            try:
                rows += len(next(csv.reader([line], delimiter=delimiter, strict=True))) == width
            except csv.Error:
                continue
    return rows > 1 and 2 * rows > len(inner)


def _check_header(names: list[str], file: SourceFile, delimiter: str) -> list[str]:
    """The names of the columns. Raises DataError if one occurs twice, or the file uses another delimiter."""
    names = [name.strip() or f"column {i}" for i, name in enumerate(names, start=1)]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise DataError(
            f"two columns are called {twice!r}",
            where=file.where,
            hint="the first line holds the columns' names: rename one",
        )
    other = next(
        (mark for mark in _DELIMITER_NAMES if len(names) == 1 and mark != delimiter and mark in names[0]), None
    )
    if other is not None:
        expected = _DELIMITER_NAMES[DELIMITERS[file.kind]]
        raise DataError(
            f"the header holds {_DELIMITER_NAMES[other]}, where a {file.kind} file has {expected}",
            where=file.where,
            hint=f"save it with commas as .csv, or with tabs as .tsv, or put a line sep={other} before the header",
        )
    return names


class _LineFeed:
    """Feeds the lines of a file to the csv reader. It keeps those of the current record, which can be pushed back.

    A file whose lines end in lone carriage returns is a single line for `read_lines`; it is split here.
    """

    def __init__(self, file: SourceFile) -> None:
        self.record: list[Line] = []
        self.last_doubtful_line = 0
        """The number of the last line that was within a broken cell."""
        self.broken = False
        """Whether the last record was a broken cell that may continue, up to a line with a quote or a good row."""
        self._pending: deque[Line] = deque()
        self._lines = read_lines(file)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._pending.popleft() if self._pending else self._read()
        self.record.append(line)
        return line[1]

    def _read(self) -> Line:
        number, text, fault = next(self._lines)
        if number == 1 and fault is None and not text.endswith("\n") and "\r" in text:
            self._pending.extend((i, f"{part}\n", None) for i, part in enumerate(text.split("\r"), 1))
            return self._pending.popleft()
        # A file converted twice has two carriage returns at each line's end.
        return number, text.rstrip("\r\n") + "\r\n" if text.endswith("\r\r\n") else text, fault

    def separator(self) -> str | None:
        """The delimiter that a first line `sep=…` names; then that line is consumed."""
        try:
            first = self._read()
        except StopIteration:
            return None
        if match := _SEPARATOR_LINE.fullmatch(first[1]):
            return match[1]
        self._pending.appendleft(first)
        return None

    def push_back(self, *, doubt: bool = True) -> None:
        """Keep only the first line in the current record. The others are read again; with `doubt` they may not be rows."""
        if doubt:
            self.last_doubtful_line = max(self.last_doubtful_line, self.record[-1][0])
        self._pending.extendleft(reversed(self.record[1:]))
        del self.record[1:]

    @property
    def fault(self) -> Fault | None:
        """The first fault of the lines of the current record."""
        return next((fault for _, _, fault in self.record if fault), None)

    @property
    def detail(self) -> str:
        return self.fault[1] if self.fault else ""
