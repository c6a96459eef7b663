"""Decodes the text of a file, for readers by line or by piece, and reads `.txt` files: a document a file.

Text is UTF-8, what a byte order mark says, or in the encoding that the source states; no encoding is guessed. A line with
other bytes or a NUL is a fault of its row alone. Files that are no text are recognised by their first bytes and refused.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias

from corral.data.sources.files import SPREADSHEET_HINT, Say, SourceFile
from corral.data.sources.raw_row import RawRow, faulty_row
from corral.errors import DataError

MAX_ROW = 64_000_000
"""Limit of a line or a row in characters. No row that fits a model's context comes near it, and a file without line breaks
must not fill the memory."""
MAX_DOCUMENT = 8_000_000
"""Characters from which a document is cut."""
NUL = "a NUL byte, which no text holds"
OVERLONG = f"the line is longer than {MAX_ROW:,} characters"

Fault: TypeAlias = tuple[str, str]
"""(reason, detail of the location)."""
Line: TypeAlias = tuple[int, str, Fault | None]
"""(number from 1, text with its line end, fault). The text of a faulty line may be wrong."""

_FOREIGN = {
    b"\x1f\x8b": ("packed twice, the second time with gzip", "unpack it"),
    b"\x28\xb5\x2f\xfd": ("packed twice, the second time with zstd", "unpack it"),
    b"PK\x03\x04": ("an Excel file or a zip archive", f"{SPREADSHEET_HINT}; unpack an archive"),
    b"PAR1": ("a parquet file", "its name should end in .parquet"),
    b"ARRO": ("an Arrow file", "its name should end in .arrow"),
    b"\x7fELF": ("a program, not text", "check `path` in data.sources"),
    b"%PDF": ("a PDF, not text", "save its text as .txt"),
}
# The mark of UTF-16 begins that of UTF-32.
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_C1 = re.compile("[\x80-\x84\x86-\x9f]")  # all but the line break U+0085
_NOT_IN_CP1252 = frozenset(b"\x81\x8d\x8f\x90\x9d")
_BAD_BYTE = 0xDC00  # no text holds this character or the 255 after it: one stands for each byte that cannot be decoded
_MARK_BAD_BYTES = "corral.mark-bad-bytes"


def _mark_bad_bytes(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "".join(chr(_BAD_BYTE + byte) for byte in error.object[error.start : error.end]), error.end


codecs.register_error(_MARK_BAD_BYTES, _mark_bad_bytes)


class TextReader:
    """The text of a file.

    Args:
        stream: its bytes, behind a byte order mark.
        encoding: the codec that decodes them, by its own name.
    """

    def __init__(self, stream: io.BufferedReader[Any], encoding: str) -> None:
        text = io.TextIOWrapper(stream, encoding, _MARK_BAD_BYTES, newline="\n")
        self.read = text.read
        self.readline = text.readline
        self._encoding = encoding
        self._not_cp1252 = False  # whether the file holds a byte that Windows-1252 does not know

    def find_fault(self, text: str) -> tuple[str, int] | None:
        """(the reason why a part of the text cannot be used, the index of the character), if so."""
        try:
            if not text.isascii():
                text.encode()
        except UnicodeEncodeError as error:
            bad = {ord(character) - _BAD_BYTE for character in text[error.start :] if "\udc00" <= character <= "\udcff"}
            if self._encoding != "utf-8":
                return f"not {self._encoding} text", error.start
            self._not_cp1252 |= not _NOT_IN_CP1252.isdisjoint(bad)
            if self._not_cp1252:
                return "neither UTF-8 nor Windows-1252 text: set the `encoding` of the source", error.start
            return 'not UTF-8 text; if it is Windows-1252, set `encoding = "cp1252"`', error.start
        if self._encoding.startswith(("cp125", "iso8859")) and not text.isascii():
            with suppress(UnicodeError):
                text.encode(self._encoding).decode("utf-8")
                first = next(at for at, character in enumerate(text) if character > "\x7f")
                return "the file is UTF-8 text: remove the `encoding` of the source", first
        if self._encoding == "iso8859-1" and (control := _C1.search(text)):
            return 'a control character: the file is probably Windows-1252, set `encoding = "cp1252"`', control.start()
        return (NUL, at) if (at := text.find("\0")) >= 0 else None

    def skip_line(self) -> None:
        """Read to the end of an overlong line."""
        while (more := self.readline(2**20)) and not more.endswith("\n"):
            pass


@contextmanager
def open_text(file: SourceFile) -> Generator[TextReader]:
    """The text of a file, decompressed.

    Raises:
        DataError: it is not text, or in UTF-16 without a mark.
        OSError: it is cut short or damaged.
    """
    with file.open_unpacked() as stream:
        head = stream.peek(4)[:4]
        for magic, (what, hint) in _FOREIGN.items():
            if head.startswith(magic):
                raise DataError(f"the file is {what}", where=file.where, hint=hint)
        mark = next((mark for mark in _MARKS if head.startswith(mark)), b"")
        encoding = _MARKS[mark] if mark else codecs.lookup(file.encoding or "utf-8").name
        if encoding in ("utf-16", "utf-32") or (file.encoding is None and not mark and b"\0" in head):
            raise DataError(
                "the file is not UTF-8 text: it looks like UTF-16 without a byte order mark, or binary data",
                where=file.where,
                hint='if it is UTF-16, set `encoding = "utf-16-le"` (or "utf-16-be"), or save it again as UTF-8',
            )
        stream.read(len(mark))
        yield TextReader(stream, encoding)


def read_lines(file: SourceFile) -> Iterator[Line]:
    """The lines of a file, which end with a line feed, or all with a carriage return. Memory holds one at a time.

    Raises as `open_text` does.
    """
    with open_text(file) as text:
        number = 0
        while line := text.readline(MAX_ROW):
            number += 1
            fault = None
            if len(line) == MAX_ROW and not line.endswith("\n"):
                text.skip_line()
                fault = (OVERLONG, "")
            elif reason_at := text.find_fault(line):
                reason, at = reason_at
                fault = (reason, _column(line, at))
            if number == 1 and "\r" in line and not line.endswith("\n"):
                yield from ((i, f"{part}\n", fault) for i, part in enumerate(line.split("\r"), start=1))
            else:
                yield number, line, fault


def _column(line: str, index: int) -> str:
    bad = ord(line[index])
    return f", column {index + 1}" + (f" (byte 0x{bad - _BAD_BYTE:02x})" if bad >= _BAD_BYTE else "")


def read_txt(file: SourceFile, _: Say) -> Iterator[RawRow]:
    """The document of a `.txt` file, as `{"text": …}`; a long one in several rows, each but the last up to a line's end.

    Raises as `open_text` does.
    """
    with open_text(file) as text:
        number, continues = 1, False
        while part := text.read(MAX_DOCUMENT):
            part += (rest := text.readline(MAX_ROW))
            location = f"line {number}"
            if len(rest) == MAX_ROW and not rest.endswith("\n"):
                text.skip_line()
                yield faulty_row(number, location, OVERLONG)
                number += 1
            elif reason_at := text.find_fault(part):
                reason, at = reason_at
                start = part.rfind("\n", 0, at) + 1
                line = number + part.count("\n", 0, at)
                yield faulty_row(number, location, reason, f", in line {line}{_column(part[start:], at - start)}")
            elif part.strip():
                yield RawRow(number, {"text": part}, location=location, continues=continues)
                continues = True
            number += part.count("\n")
