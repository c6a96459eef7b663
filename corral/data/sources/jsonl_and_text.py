"""Files read line by line: `.jsonl`, a JSON object on each line, and `.txt`, a document on each line.

A line that is not UTF-8, holds a NUL or is longer than 64 MiB is a fault of that line alone, and no more than one line is
held in memory. Blank lines are no rows. This module does not know what an object's keys mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TypeAlias

from corral.data.sources.files import MAX_ROW_BYTES, SourceFile
from corral.data.sources.raw_row import RawRow, faulty_row, row_or_fault
from corral.data.sources.strict_json import StrictDecoder, explain_error, explain_limit, skip_space

Fault: TypeAlias = tuple[str, str]
"""(reason, detail of the place)."""
NOT_UTF8 = "not UTF-8 text; `iconv -f latin1 -t utf-8` converts a Western European file"
NUL = "a NUL byte, which no text holds"


def read_lines(file: SourceFile) -> Iterator[tuple[int, str, Fault | None]]:
    """(number from 1, text with its line end, what is wrong with it). The text of a faulty line is not to be relied on.

    Raises:
        DataError: the file is UTF-16, or no text at all.
        OSError, EOFError, zlib.error: it cannot be read to its end.
    """
    with file.open_text() as (stream, offset):
        number = 0
        while content := stream.readline(MAX_ROW_BYTES):
            number += 1
            text, fault, size = "", None, len(content)
            if size == MAX_ROW_BYTES and not content.endswith(b"\n"):
                while (more := stream.readline(2**20)) and not more.endswith(b"\n"):
                    size += len(more)
                size += len(more)
                fault = (f"the line is longer than {MAX_ROW_BYTES // 2**20} MiB", "")
            else:
                try:
                    text = content.decode()
                except UnicodeDecodeError as error:
                    at = f", byte {offset + error.start} (0x{content[error.start]:02x})"
                    fault = (NOT_UTF8, at)
                    text = content.decode(errors="replace")
                if fault is None and (at := content.find(b"\0")) >= 0:
                    fault = (NUL, f", byte {offset + at}")
            yield number, text, fault
            offset += size


def read_jsonl(file: SourceFile) -> Iterator[RawRow]:
    """The rows of a `.jsonl` file. Raises: as `lines`."""
    decoder = StrictDecoder()
    for number, text, fault in read_lines(file):
        if fault is not None:
            yield faulty_row(number, f"line {number}", *fault)
        elif text := text.rstrip():
            yield _row(decoder, text, number)


def _row(decoder: StrictDecoder, text: str, number: int) -> RawRow:
    place = f"line {number}"
    try:
        value, end, reason = decoder.decode(text, skip_space(text, 0))
        if reason is None and end < len(text):
            reason = "more text follows the object on its line"
    except json.JSONDecodeError as error:
        # The column changes from row to row: it belongs to the place, not to the reason.
        return faulty_row(number, place, f"not valid JSON: {explain_error(error)}", f", column {error.colno}")
    except (ValueError, RecursionError) as error:
        value, reason = None, explain_limit(error)
    return row_or_fault(number, place, value, reason)


def read_txt(file: SourceFile) -> Iterator[RawRow]:
    """The lines of a `.txt` file, each as `{"text": line}`. Raises: as `lines`."""
    for number, text, fault in read_lines(file):
        if fault is not None:
            yield faulty_row(number, f"line {number}", *fault)
        elif text.strip():
            yield RawRow(number, {"text": text.rstrip("\r\n")}, location=f"line {number}")
