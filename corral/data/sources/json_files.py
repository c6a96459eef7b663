"""`.json` files: a list of rows, read through a window that moves over the file, so that its size does not matter.

A row that is broken is a fault of that row: reading goes on at the next element, found by the brackets of the broken one and
by the key that the first element begins with. A `.json` file that holds an object on each line is read as what it is. This
module does not know what an object's keys mean.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import Any

from corral.data.sources.files import MAX_ROW_BYTES, SourceFile
from corral.data.sources.jsonl_and_text import NOT_UTF8, NUL, read_jsonl
from corral.data.sources.raw_row import RawRow, faulty_row, row_or_fault
from corral.data.sources.strict_json import StrictDecoder, explain_error, explain_limit, skip_space
from corral.errors import DataError

_CHUNK = 2**18
_LONGEST_LITERAL = len("-Infinity")
_MOST_BROKEN = 2**20  # characters of a broken row in which its end is looked for by its brackets
_MOST_SPACE = 2**10  # characters between a comma and the element behind it
_BAD_BYTE = re.compile("[\udc80-\udcff]")  # what bytes that are not UTF-8 are decoded to
_BRACKET_OR_QUOTE = re.compile(r'["\\\n{}\[\],]')
_NEXT = re.compile(r"[,\[}]\s*(?=\{)")
_FIRST_KEY = re.compile(r'\{\s*("(?:[^"\\\n]|\\.){0,200}")\s*:')
_OPENS = {"}": "{", "]": "["}


class _BrokenError(Exception):
    """Text that cannot be read as a row: the reason, and the detail of the place."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


def read_json(file: SourceFile) -> Iterator[RawRow]:
    """The rows of a `.json` file: a list, or an object on each line.

    Raises:
        DataError: it holds something else, or is UTF-16 or no text at all.
        OSError, EOFError, zlib.error: it cannot be read to its end.
    """
    with file.open_text() as (stream, _):
        window = _Window(stream)
        first = window.peek()
        if first == "[":
            yield from _items(window)
            return
        objects = first == "{" and window.is_line_of_objects()
    if first and not objects:
        raise DataError(
            f"the file holds {'an object' if first == '{' else 'no list'}, where a list of rows is expected",
            where=file.where,
            hint="[{…}, {…}], or one object on each line",
        )
    if first:
        yield from read_jsonl(file)


def read_json_values(file: SourceFile) -> Iterator[RawRow]:
    """Rows that are the values of one object, which is not broken.

    Raises:
        DataError: it is.
        OSError, EOFError, zlib.error: it cannot be read to its end.
    """
    with file.open_text() as (stream, _):
        window = _Window(stream)
        try:
            separator, number = window.expect("{"), 0
            while separator != "}":
                number += 1
                window.value()
                window.expect(":")
                value, reason, _ = window.value()
                separator = window.expect(",}")
                yield row_or_fault(number, f"row {number}", value, reason)
        except _BrokenError as error:
            raise DataError(
                f"broken{error.detail}: {error.reason}", where=file.where, hint="fetch or write it again"
            ) from None


def _items(window: _Window) -> Iterator[RawRow]:
    """The elements of the list that begins at the window's place, one after another, broken ones as faults."""
    number, ended = 0, False
    window.expect("[")
    while True:
        # A comma before the list's end, or a missing one between elements, hides no row.
        if not ended and window.peek() == "]":
            window.expect("]")
            ended = True
        if ended and not window.peek():
            return
        number += 1
        try:
            if ended:
                raise _BrokenError("text follows the end of the list", window.place())
            if not window.peek():
                raise _BrokenError("the list is not closed: the file is cut short", window.place())
            value, reason, detail = window.value()
        except _BrokenError as error:
            yield faulty_row(number, f"row {number}", error.reason, error.detail)
            if not window.skip(within=not ended):
                return
            ended = False
        else:
            yield row_or_fault(number, f"row {number}", value, reason, detail)
        if window.peek() == ",":
            window.expect(",")


class _Window:
    """The part of a file's text that is being decoded.

    Args:
        stream: the bytes, behind a byte order mark.
    """

    def __init__(self, stream: io.BufferedReader[Any]) -> None:
        self.text = ""
        self.at = 0
        self._stream = stream
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._json = StrictDecoder()
        self._ended = False
        self._spoilt = False  # whether a byte that is not UTF-8 was read
        self._line = 0  # line breaks before the window
        self._start = _NEXT  # what comes before an element, and how it begins
        self._column = 0  # characters between the last of them and the window

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            self.at = skip_space(self.text, self.at)
            if self.at < len(self.text):
                return self.text[self.at]
            self._forget()
            if not self._more():
                return ""

    def expect(self, characters: str) -> str:
        """Moves over the next character, which must be one of these. Raises: _BrokenError."""
        found = self.peek()
        if not found or found not in characters:
            raise _BrokenError(f"not valid JSON: expected {' or '.join(map(repr, characters))}", self.place())
        self.at += 1
        return found

    def value(self) -> tuple[Any, str | None, str]:
        """(the next value, what is wrong with it, where), and moves over it. Raises: _BrokenError."""
        self.peek()
        self._forget()
        while True:
            try:
                value, end, reason = self._json.decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if _is_unfinished(error, self.text):
                    if len(self.text) - self.at > MAX_ROW_BYTES:
                        raise _BrokenError(
                            f"the row is longer than {MAX_ROW_BYTES // 2**20} MiB", self.place()
                        ) from None
                    if self._more():
                        continue
                self._learn()
                if error.pos < len(self.text) and self.text[error.pos] == "\0":
                    raise _BrokenError(NUL, self.place(error.pos)) from None
                raise _BrokenError(f"not valid JSON: {explain_error(error)}", self.place(error.pos)) from None
            except (ValueError, RecursionError) as error:
                raise _BrokenError(explain_limit(error)) from None
            # A number may go on beyond the window.
            if end < len(self.text) or not self._more():
                self._learn()
                bad = _BAD_BYTE.search(self.text, self.at, end) if self._spoilt else None
                detail = self.place(bad.start()) if bad else ""
                self.at = end
                return value, NOT_UTF8 if bad else reason, detail

    def _learn(self) -> None:
        """Keeps the key that the element here begins with, if it is the first that has one."""
        if self._start is _NEXT and (found := _FIRST_KEY.match(self.text, self.at)):
            self._start = re.compile(rf"[,\[}}]\s*(?={{\s*{re.escape(found[1])}\s*:)")

    def skip(self, *, within: bool) -> bool:
        """Moves from the beginning of what is broken to the next element, or to what follows this one; False if there is none.

        Args:
            within: whether it is an element, and not something behind the list.
        """
        found = None
        if within:
            # Brackets alone would lead over rows where a quote is missing.
            most = self.at + _MOST_BROKEN
            while len(self.text) < most and self._more():
                pass
            found = self._next_row(most)
            end = self._end_of_element(most if found is None else found)
            found = found if end is None else end
        elif self.text[self.at] == "{":
            return True
        while found is None:
            searched = len(self.text)
            found = self._next_row(searched)
            if found is None:
                # The comma and the key of an element may stand on both sides of the window's end.
                self.at = max(self.at, searched - _MOST_SPACE)
                self._forget()
                if not self._more():
                    self.at = len(self.text)
                    return False
        self.at = found
        return True

    def _next_row(self, most: int) -> int | None:
        """Where the next object begins, behind the present place and before another, that begins like the first element."""
        found = self._start.search(self.text, self.at, most)
        return found.end() if found else None

    def _end_of_element(self, most: int) -> int | None:
        """Where the broken element that begins here ends by its brackets: before a comma and an object, or the list's end."""
        at, opened, quoted = self.at, list[str](), False
        while at < most:
            found = _BRACKET_OR_QUOTE.search(self.text, at, most)
            if found is None:
                at = min(len(self.text), most)
                if at < most and not self._more():
                    return None
                continue
            mark, at = found.group(), found.end()
            if mark == "\\":
                at += 1
            elif mark == '"':
                quoted = not quoted
            elif mark == "\n":
                quoted = False  # No string goes on behind a line's end.
            elif quoted:
                continue
            elif not opened and mark == "{" and found.start() > self.at:
                return found.start()
            elif mark in "{[":
                opened.append(mark)
            elif not opened and mark in ",]":
                return found.start() if self._goes_on(found.start()) else None
            elif mark != "," and (not opened or opened.pop() != _OPENS[mark]):
                return None
        return None

    def _goes_on(self, at: int) -> bool:
        """Whether a comma and an object stand here, or the list's and the file's end."""
        while (after := skip_space(self.text, at + 1)) >= len(self.text):
            if not self._more():
                return self.text[at] == "]"
        return self.text[at] == "," and self.text[after] == "{"

    def is_line_of_objects(self) -> bool:
        """Whether a JSON value ends with the first line, and another line follows it."""
        start = self.at
        while "\n" not in self.text[start:] and len(self.text) < MAX_ROW_BYTES and self._more():
            pass
        first, _, rest = self.text[start:].partition("\n")
        try:
            _, end, _ = self._json.decode(first, 0)
        except (ValueError, RecursionError):
            return False
        return not first[end:].strip() and (bool(rest.strip()) or self._more())

    def place(self, at: int | None = None) -> str:
        """The line and column of a place in the window, by default of the present one."""
        before = self.text[: self.at if at is None else at]
        line, column = before.count("\n"), len(before) - before.rfind("\n")
        return f", line {1 + self._line + line}, column {column if line else self._column + len(before) + 1}"

    def _forget(self) -> None:
        """Drops the text before the place, when it is much."""
        if self.at >= _CHUNK:
            before = self.text[: self.at]
            breaks = before.count("\n")
            self._line += breaks
            self._column = len(before) - before.rfind("\n") - 1 if breaks else self._column + len(before)
            self.text, self.at = self.text[self.at :], 0

    def _more(self) -> bool:
        """Reads on, as much as the window holds, so that a long row is not decoded too often; False at the end."""
        if self._ended:
            return False
        content = self._stream.read(max(_CHUNK, len(self.text) - self.at))
        self._ended = not content
        text = self._utf8.decode(content, final=self._ended)
        self._spoilt = self._spoilt or (not text.isascii() and _BAD_BYTE.search(text) is not None)
        self.text += text
        return not self._ended


def _is_unfinished(error: json.JSONDecodeError, text: str) -> bool:
    """Whether more text could mend it: it broke off near the end, or within a string that has no end."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(text) - _LONGEST_LITERAL
