"""`.json` files: a list of rows, read through a window that moves over the file, so that its size does not matter.

One broken element breaks the list, so it is an error with line and column, after the rows before it. A `.json` file that
holds an object on each line is read as what it is. This module does not know what an object's keys mean.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from typing import Any, NoReturn

from corral.data.sources.files import LONGEST, File
from corral.data.sources.lines import read_jsonl
from corral.data.sources.raw import RawRow, checked
from corral.data.sources.strict_json import Decoder, cannot_hold, explain, skip_space
from corral.errors import DataError

_CHUNK = 2**18
_LONGEST_LITERAL = len("-Infinity")


def read_json(file: File) -> Iterator[RawRow]:
    """The rows of a `.json` file: a list, or an object on each line.

    Raises:
        DataError: it holds something else, is broken, or is not UTF-8 text.
        OSError, EOFError, zlib.error: it cannot be read to its end.
    """
    with file.text() as (stream, offset):
        window = _Window(stream, offset, file)
        if window.peek() == "[":
            yield from _items(window, keyed=False)
            return
        what = "an object" if window.peek() == "{" else "no list"
        objects = what == "an object" and window.is_line_of_objects()
    if not objects:
        raise DataError(
            f"the file holds {what}, where a list of rows is expected",
            where=file.where,
            hint="[{…}, {…}], or one object on each line",
        )
    yield from read_jsonl(file)


def read_json_values(file: File) -> Iterator[RawRow]:
    """Rows that are the values of one object. Raises: as `read_json`."""
    with file.text() as (stream, offset):
        yield from _items(_Window(stream, offset, file), keyed=True)


def _items(window: _Window, *, keyed: bool) -> Iterator[RawRow]:
    """The elements of the list, or values of the object, that begins at the window's place, one after another."""
    close = "}" if keyed else "]"
    window.expect("{" if keyed else "[", "the file's start")
    if window.peek() == close:
        return
    number, separator = 0, ","
    while separator == ",":
        number += 1
        place = f"row {number}"
        if keyed:
            window.value(place)
            window.expect(":", place)
        value, reason = window.value(place)
        separator = window.expect(f",{close}", place)
        yield checked(number, place, value, reason)
    if window.peek():
        window.refuse(
            json.JSONDecodeError("more text follows the end of the list", window.text, window.at), "the file's end"
        )


class _Window:
    """The part of a file's text that is being decoded.

    Args:
        stream: the bytes, behind a byte order mark.
        offset: bytes before.
        file: for errors.
    """

    def __init__(self, stream: io.BufferedReader[Any], offset: int, file: File) -> None:
        self.text = ""
        self.at = 0
        self._stream = stream
        self._offset = offset
        self._where = file.where
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._json = Decoder()
        self._ended = False
        self._line = 0  # line breaks before the window
        self._column = 0  # characters between the last of them and the window

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            self.at = skip_space(self.text, self.at)
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def expect(self, characters: str, place: str) -> str:
        """Moves over the next character, which must be one of these."""
        found = self.peek()
        if not found or found not in characters:
            message = f"expected {' or '.join(map(repr, characters))}"
            self.refuse(json.JSONDecodeError(message, self.text, self.at), place)
        self.at += 1
        return found

    def value(self, place: str) -> tuple[Any, str | None]:
        """(the next value, what is wrong with it), and moves over it. Raises: DataError."""
        self.peek()
        self._forget()
        while True:
            try:
                value, end, reason = self._json.decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if not (_is_unfinished(error, self.text) and self._more(place)):
                    self.refuse(error, place)
                continue
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place}: {cannot_hold(error)}", where=self._where, hint="mend that row") from None
            # A number may go on beyond the window.
            if end < len(self.text) or not self._more(place):
                self.at = end
                return value, reason

    def is_line_of_objects(self) -> bool:
        """Whether a JSON value ends with the first line, and another line follows it."""
        start = self.at
        while "\n" not in self.text[start:] and self._more("line 1"):
            pass
        first, _, rest = self.text[start:].partition("\n")
        try:
            _, end, _ = self._json.decode(first, 0)
        except (ValueError, RecursionError):
            return False
        return not first[end:].strip() and (bool(rest.strip()) or self._more())

    def refuse(self, error: json.JSONDecodeError, place: str) -> NoReturn:
        """Raises DataError about the place of a syntax error."""
        column = error.colno + (self._column if error.lineno == 1 else 0)
        raise DataError(
            f"broken at line {error.lineno + self._line}, column {column}, in {place}: {explain(error)}",
            where=self._where,
            hint="mend it there; in a .jsonl file one broken row would not stop the others",
        ) from None

    def _forget(self) -> None:
        """Drops the text before the place, when it is much."""
        if self.at >= _CHUNK:
            before = self.text[: self.at]
            breaks = before.count("\n")
            self._line += breaks
            self._column = len(before) - before.rfind("\n") - 1 if breaks else self._column + len(before)
            self.text, self.at = self.text[self.at :], 0

    def _more(self, place: str = "") -> bool:
        """Reads on, as much as the window holds, so that a long row is not decoded too often; False at the end."""
        if self._ended:
            return False
        if len(self.text) - self.at > LONGEST:
            raise DataError(
                f"{place or 'a row'} is longer than {LONGEST // 2**20} MiB", where=self._where, hint="take that row out"
            )
        content = self._stream.read(max(_CHUNK, len(self.text) - self.at))
        self._ended = not content
        if (at := content.find(b"\0")) >= 0:
            self._refuse_bytes(content, self._offset, at, "a NUL byte, which no text holds", "name a file of JSON text")
        pending = self._utf8.getstate()[0]
        try:
            self.text += self._utf8.decode(content, final=self._ended)
        except UnicodeDecodeError as error:
            self._refuse_bytes(
                pending + content,
                self._offset - len(pending),
                error.start,
                "not UTF-8 text",
                "save the file again as UTF-8; `iconv -f latin1 -t utf-8` converts Western European text",
            )
        self._offset += len(content)
        return not self._ended

    def _refuse_bytes(self, content: bytes, offset: int, at: int, what: str, hint: str) -> NoReturn:
        line = 1 + self._line + self.text.count("\n") + content[:at].count(b"\n")
        place = f"byte {offset + at} (line {line}) is 0x{content[at]:02x}"
        raise DataError(f"{what}: {place}", where=self._where, hint=hint) from None


def _is_unfinished(error: json.JSONDecodeError, text: str) -> bool:
    """Whether more text could mend it: it broke off near the end, or within a string that has no end."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(text) - _LONGEST_LITERAL
