"""Reads `.csv` and `.tsv` files: a header, then a row of text per record.

A record is what Python's strict csv reader yields; no line is read twice. The delimiter is the one that the source states,
that a first line `sep=;` states, as spreadsheets write it, or the only usual one that takes the header apart. Every value is
text as it stands: numbers, dates and missing values are not guessed. An unnamed column (pandas writes its index so) is called
`column N`. Rows are numbered as a spreadsheet shows them: the header is row 1.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Generator, Iterator
from itertools import chain
from typing import NamedTuple

from corral.data.sources.files import BrokenFileError, Say, SourceFile
from corral.data.sources.raw_row import RawRow, faulty_row
from corral.data.sources.text_files import MAX_ROW, OVERLONG, Fault, Line, read_lines
from corral.errors import DataError

_USUAL_DELIMITER = {".csv": ",", ".tsv": "\t"}
_DELIMITER_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_SEPARATOR_LINE = re.compile(r'"?sep=([,;|\t])"?\s*', re.IGNORECASE)
_QUOTED_CELL = re.compile(r'(?:(?<=[,;\t|\n])|^)"(?:[^"]|"")*"')
_MAX_HEADER_LINES = 100
_ERRORS = {
    "expected after": "a quoted cell goes on behind its closing quote (a quote within it is written twice)",
    "field limit": f"a cell is longer than {MAX_ROW:,} characters",
    "new-line character": "a carriage return stands alone between cells",
}
"""Parts of the csv module's messages, and what they say in plain words."""


class _Record(NamedTuple):
    """One record: its cells, or a fault; its row in a spreadsheet, and its first and last line."""

    cells: list[str]
    fault: Fault | None
    row: int
    first: int
    last: int


def read_csv(file: SourceFile, say: Say) -> Iterator[RawRow]:
    """The rows of a `.csv` or `.tsv` file. `say` reports a delimiter that the extension does not suggest.

    Raises:
        DataError: the header cannot be used, or the file is not text.
        BrokenFileError: a quote is not as it should be, so that nothing behind it can be trusted.
        OSError: it cannot be read to its end.
    """
    # Python's default limit is 128 KiB; longer documents are valid.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW))
    lines, delimiter = _find_delimiter(_split_lines(file), file, say)
    # Spreadsheets write empty rows as delimiters alone; in a table of one column an empty cell is a row.
    records = (r for r in _read_records(lines, delimiter) if r.fault or any(r.cells) or len(r.cells) == 1)
    header = next(records, None)
    if header is None:
        return
    if header.fault is not None:
        raise DataError(f"the header cannot be read: {header.fault[0]}", where=file.where, hint="fix the first line")
    names = [name.strip() or f"column {i}" for i, name in enumerate(header.cells, start=1)]
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        raise DataError(
            f"two columns are called {twice!r}",
            where=file.where,
            hint="the first line holds the columns' names: rename one",
        )
    for cells, fault, row, first, last in records:
        several = f" to {last}" if last > first else ""
        location = f"row {row}" + (
            f" (line{'s' if several else ''} {first}{several})" if first != row or several else ""
        )
        if fault is None and len(cells) != len(names):
            more = "fewer" if len(cells) < len(names) else "more"
            fault = f"the row has {more} cells than the header, which has {len(names)}", ""
        elif [cell.strip().removeprefix("\ufeff") for cell in cells] == names:
            fault = "the header again", ""
        if fault is not None:
            yield faulty_row(row, location, *fault)
        else:
            yield RawRow(row, dict(zip(names, cells, strict=True)), location=location)


def _split_lines(file: SourceFile) -> Generator[Line]:
    """The lines of a table. Raises BrokenFileError at an overlong one: whether it opens a quote is not known."""
    for number, text, fault in read_lines(file):
        if fault is not None and fault[0] == OVERLONG:
            raise BrokenFileError(f"line {number}: {OVERLONG}")
        # A file converted twice has two carriage returns at each line's end.
        yield number, text.rstrip("\r\n") + "\r\n" if text.endswith("\r\r\n") else text, fault


def _find_delimiter(lines: Iterator[Line], file: SourceFile, say: Say) -> tuple[Iterator[Line], str]:
    """(the lines from the header on, the delimiter). Raises DataError if more than one could be meant."""
    head: list[Line] = []
    delimiter = file.delimiter
    header = ""
    for line in lines:
        if line[0] == 1 and (match := _SEPARATOR_LINE.fullmatch(line[1])):
            delimiter = delimiter or match[1]
            continue
        head.append(line)
        header += line[1]
        if (header.strip() and header.count('"') % 2 == 0) or len(head) == _MAX_HEADER_LINES:
            break
    lines = chain(head, lines)
    usual = _USUAL_DELIMITER[file.kind]
    if delimiter is None:
        bare = _QUOTED_CELL.sub("", header)
        present = [mark for mark in _DELIMITER_NAMES if mark in bare]
        if len(present) > 1:
            raise DataError(
                f"the header holds {' and '.join(_DELIMITER_NAMES[mark] for mark in present)}: either may stand between names",
                where=file.where,
                hint=f'set `delimiter` of this source, such as `delimiter = "{usual}"`'.replace("\t", "\\t"),
            )
        delimiter = present[0] if present else usual
        if delimiter != usual:
            say(f"{file.where}: read with {_DELIMITER_NAMES[delimiter]} between the cells, as in its header")
    return lines, delimiter


def _read_records(lines: Iterator[Line], delimiter: str) -> Iterator[_Record]:
    """The records of a table, blank ones too, as a spreadsheet shows them. Raises BrokenFileError."""
    record: list[Line] = []

    def feed() -> Iterator[str]:
        for line in lines:
            record.append(line)
            yield line[1]

    reader = csv.reader(feed(), delimiter=delimiter, strict=True)
    row = 0
    while True:
        record.clear()
        row += 1
        fault: Fault | None = None
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise _explain(str(error), record, delimiter) from None
        if any(cell[:1].isspace() and cell.lstrip().startswith('"') for cell in cells):
            raise BrokenFileError(
                f"line {record[0][0]}: a quote stands behind a space, so that it does not hold its cell together; nothing "
                "behind it can be trusted"
            )
        for number, _, line_fault in record:
            if line_fault is not None:
                fault = line_fault[0], f", in line {number}{line_fault[1]}" if len(record) > 1 else line_fault[1]
                break
        yield _Record(cells, fault, row, record[0][0], record[-1][0])


def _explain(message: str, record: list[Line], delimiter: str) -> BrokenFileError:
    """The csv module's error in a record of these lines. What follows may be the rest of a cell, so nothing of it is read."""
    reason = next((text for part, text in _ERRORS.items() if part in message), "it cannot be taken apart")
    is_unfinished = "unexpected end of data" in message
    if not is_unfinished and len(record) == 1:
        return BrokenFileError(f"line {record[0][0]}: {reason}; nothing behind it can be trusted")
    opening = _line_of_open_quote(record if is_unfinished else record[:-1], delimiter) or record[0][0]
    how = "by the end of the file" if is_unfinished else f"as it should be: in line {record[-1][0]}, {reason}"
    return BrokenFileError(f"a quote opens in line {opening} and is not closed {how}; nothing behind it can be trusted")


def _line_of_open_quote(record: list[Line], delimiter: str) -> int | None:
    """The line in which the cell opens that is still open at the end of these lines of a record; None if there are none."""
    if not record:
        return None
    *_, last_cell = next(csv.reader([text for _, text, _ in record], delimiter=delimiter))
    breaks = sum(text.count("\n") for _, text, _ in record)
    return record[0][0] + breaks - last_cell.count("\n")
