"""Reads files line by line: `.jsonl`, a JSON object per line, and `.txt`, a document per line.

A line that is not UTF-8, holds a NUL or is longer than 64 MiB is a fault of that line alone. Memory holds one line at a
time. Blank lines are not rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TypeAlias

from corral.data.sources.files import MAX_ROW_BYTES, SourceFile
from corral.data.sources.raw_row import RawRow, faulty_row, row_or_fault
from corral.data.sources.strict_json import StrictDecoder, explain_error, explain_limit, skip_space

Fault: TypeAlias = tuple[str, str]
"""(reason, detail of the location)."""
NOT_UTF8 = "not UTF-8 text; `iconv -f latin1 -t utf-8` converts a Western European file"
NUL = "a NUL byte, which no text holds"


def read_lines(file: SourceFile) -> Iterator[tuple[int, str, Fault | None]]:
    """(number from 1, text with its line end, fault) of each line. The text of a faulty line may be wrong.

    Raises:
        DataError: the file is UTF-16 or not text at all.
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
                    fault = (NOT_UTF8, f", byte {offset + error.start} (0x{content[error.start]:02x})")
                    text = content.decode(errors="replace")
                if fault is None and (nul := content.find(b"\0")) >= 0:
                    fault = (NUL, f", byte {offset + nul}")
            yield number, text, fault
            offset += size


def read_jsonl(file: SourceFile) -> Iterator[RawRow]:
    """The rows of a `.jsonl` file. Raises as `read_lines` does."""
    decoder = StrictDecoder()
    for number, text, fault in read_lines(file):
        if fault is not None:
            yield faulty_row(number, f"line {number}", *fault)
        elif text := text.rstrip():
            yield _row(decoder, text, number)


def _row(decoder: StrictDecoder, text: str, number: int) -> RawRow:
    location = f"line {number}"
    try:
        value, end, reason = decoder.decode(text, skip_space(text, 0))
        if reason is None and end < len(text):
            reason = "more text follows the object on its line"
    except json.JSONDecodeError as error:
        # The column differs between rows: it belongs to the location, not to the reason.
        return faulty_row(number, location, f"not valid JSON: {explain_error(error)}", f", column {error.colno}")
    except (ValueError, RecursionError) as error:
        value, reason = None, explain_limit(error)
    return row_or_fault(number, location, value, reason)


def read_txt(file: SourceFile) -> Iterator[RawRow]:
    """The lines of a `.txt` file, each as `{"text": line}`. Raises as `read_lines` does."""
    for number, text, fault in read_lines(file):
        if fault is not None:
            yield faulty_row(number, f"line {number}", *fault)
        elif text.strip():
            yield RawRow(number, {"text": text.rstrip("\r\n")}, location=f"line {number}")
