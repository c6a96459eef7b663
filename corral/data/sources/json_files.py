"""Reads `.json` files: a list of rows, through a window that moves over the file, so that memory does not depend on its size.

A broken row is a fault of that row alone. Reading continues at the next element, found by the brackets of the broken one and
by the first key of the first element. A `.json` file that holds an object per line is read as `.jsonl`.
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
_MAX_BROKEN = 2**20  # characters of a broken row that are searched for its end by brackets
_MAX_SPACE = 2**10  # characters between a comma and the next element
_BAD_BYTE = re.compile("[\udc80-\udcff]")  # what bytes that are not UTF-8 are decoded to
_BRACKET_OR_QUOTE = re.compile(r'["\\\n{}\[\],]')
_ANY_ROW_START = re.compile(r"[,\[}]\s*(?=\{)")
_FIRST_KEY = re.compile(r'\{\s*("(?:[^"\\\n]|\\.){0,200}")\s*:')
_OPENS = {"}": "{", "]": "["}


class _BrokenError(Exception):
    """Text that cannot be read as a row: the reason, and the detail of the location."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


def read_json(file: SourceFile) -> Iterator[RawRow]:
    """The rows of a `.json` file: a list, or an object per line.

    Raises:
        DataError: it holds something else, or is UTF-16 or not text at all.
        OSError, EOFError, zlib.error: it cannot be read to its end.
    """
    with file.open_text() as (stream, _):
        window = _Window(stream)
        first = window.peek()
        if first == "[":
            yield from _read_items(window)
            return
        object_per_line = first == "{" and window.has_object_per_line()
    if first and not object_per_line:
        raise DataError(
            f"the file holds {'an object' if first == '{' else 'no list'}, where a list of rows is expected",
            where=file.where,
            hint="[{…}, {…}], or one object on each line",
        )
    if first:
        yield from read_jsonl(file)


def read_json_values(file: SourceFile) -> Iterator[RawRow]:
    """Rows that are the values of one object.

    Raises:
        DataError: the object is broken.
        OSError, EOFError, zlib.error: it cannot be read to its end.
    """
    with file.open_text() as (stream, _):
        window = _Window(stream)
        try:
            separator, number = window.expect("{"), 0
            while separator != "}":
                number += 1
                window.read_value()
                window.expect(":")
                value, reason, _ = window.read_value()
                separator = window.expect(",}")
                yield row_or_fault(number, f"row {number}", value, reason)
        except _BrokenError as error:
            raise DataError(
                f"broken{error.detail}: {error.reason}", where=file.where, hint="fetch or write it again"
            ) from None


def _read_items(window: _Window) -> Iterator[RawRow]:
    """The elements of the list that begins at the window's position, broken ones as faults."""
    number, ended = 0, False
    window.expect("[")
    while True:
        # A comma before the list's end, or a missing one between elements, costs no row.
        if not ended and window.peek() == "]":
            window.expect("]")
            ended = True
        if ended and not window.peek():
            return
        number += 1
        try:
            if ended:
                raise _BrokenError("text follows the end of the list", window.location())
            if not window.peek():
                raise _BrokenError("the list is not closed: the file is cut short", window.location())
            value, reason, detail = window.read_value()
        except _BrokenError as error:
            yield faulty_row(number, f"row {number}", error.reason, error.detail)
            if not window.skip_broken(within=not ended):
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
        self.position = 0
        self._stream = stream
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._json = StrictDecoder()
        self._ended = False
        self._has_bad_bytes = False  # whether a byte that is not UTF-8 was read
        self._line = 0  # line breaks before the window
        self._row_start = _ANY_ROW_START  # what comes before an element, and how it begins
        self._column = 0  # characters between the last of them and the window

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            self.position = skip_space(self.text, self.position)
            if self.position < len(self.text):
                return self.text[self.position]
            self._drop_consumed()
            if not self._read_more():
                return ""

    def expect(self, characters: str) -> str:
        """Consume the next character, which must be one of these. Raises _BrokenError."""
        character = self.peek()
        if not character or character not in characters:
            raise _BrokenError(f"not valid JSON: expected {' or '.join(map(repr, characters))}", self.location())
        self.position += 1
        return character

    def read_value(self) -> tuple[Any, str | None, str]:
        """Consume the next value. Returns (value, reason against it if any, detail of its location). Raises _BrokenError."""
        self.peek()
        self._drop_consumed()
        while True:
            try:
                value, end, reason = self._json.decode(self.text, self.position)
            except json.JSONDecodeError as error:
                if _is_unfinished(error, self.text):
                    if len(self.text) - self.position > MAX_ROW_BYTES:
                        raise _BrokenError(
                            f"the row is longer than {MAX_ROW_BYTES // 2**20} MiB", self.location()
                        ) from None
                    if self._read_more():
                        continue
                self._learn_row_start()
                if error.pos < len(self.text) and self.text[error.pos] == "\0":
                    raise _BrokenError(NUL, self.location(error.pos)) from None
                raise _BrokenError(f"not valid JSON: {explain_error(error)}", self.location(error.pos)) from None
            except (ValueError, RecursionError) as error:
                raise _BrokenError(explain_limit(error)) from None
            # A number may continue beyond the window.
            if end < len(self.text) or not self._read_more():
                self._learn_row_start()
                bad = _BAD_BYTE.search(self.text, self.position, end) if self._has_bad_bytes else None
                detail = self.location(bad.start()) if bad else ""
                self.position = end
                return value, NOT_UTF8 if bad else reason, detail

    def _learn_row_start(self) -> None:
        """Remember the first key of the element here, unless one is known: later rows are expected to begin with it."""
        if self._row_start is _ANY_ROW_START and (match := _FIRST_KEY.match(self.text, self.position)):
            self._row_start = re.compile(rf"[,\[}}]\s*(?={{\s*{re.escape(match[1])}\s*:)")

    def skip_broken(self, *, within: bool) -> bool:
        """Move from the start of broken text to the next element, or to what follows this one; False if there is none.

        Args:
            within: whether the broken text is an element of the list, not something after the list.
        """
        target = None
        if within:
            # Brackets alone would skip rows if a quote is missing.
            limit = self.position + _MAX_BROKEN
            while len(self.text) < limit and self._read_more():
                pass
            target = self._find_next_row(limit)
            end = self._find_element_end(limit if target is None else target)
            target = target if end is None else end
        elif self.text[self.position] == "{":
            return True
        while target is None:
            searched = len(self.text)
            target = self._find_next_row(searched)
            if target is None:
                # The comma and the key of an element may lie on both sides of the window's end.
                self.position = max(self.position, searched - _MAX_SPACE)
                self._drop_consumed()
                if not self._read_more():
                    self.position = len(self.text)
                    return False
        self.position = target
        return True

    def _find_next_row(self, limit: int) -> int | None:
        """The index, before `limit`, of the next object that begins like the first element."""
        match = self._row_start.search(self.text, self.position, limit)
        return match.end() if match else None

    def _find_element_end(self, limit: int) -> int | None:
        """The index, before `limit`, where the broken element here ends by its brackets: before a comma and an object, or the
        list's end."""
        at, opened, quoted = self.position, list[str](), False
        while at < limit:
            match = _BRACKET_OR_QUOTE.search(self.text, at, limit)
            if match is None:
                at = min(len(self.text), limit)
                if at < limit and not self._read_more():
                    return None
                continue
            mark, at = match.group(), match.end()
            if mark == "\\":
                at += 1
            elif mark == '"':
                quoted = not quoted
            elif mark == "\n":
                quoted = False  # no string continues after a line's end
            elif quoted:
                continue
            elif not opened and mark == "{" and match.start() > self.position:
                return match.start()
            elif mark in "{[":
                opened.append(mark)
            elif not opened and mark in ",]":
                return match.start() if self._list_continues(match.start()) else None
            elif mark != "," and (not opened or opened.pop() != _OPENS[mark]):
                return None
        return None

    def _list_continues(self, at: int) -> bool:
        """Whether a comma and an object follow here, or the end of the list and the file."""
        while (after := skip_space(self.text, at + 1)) >= len(self.text):
            if not self._read_more():
                return self.text[at] == "]"
        return self.text[at] == "," and self.text[after] == "{"

    def has_object_per_line(self) -> bool:
        """Whether the first line is one JSON value and another line follows."""
        start = self.position
        while "\n" not in self.text[start:] and len(self.text) < MAX_ROW_BYTES and self._read_more():
            pass
        first, _, rest = self.text[start:].partition("\n")
        try:
            _, end, _ = self._json.decode(first, 0)
        except (ValueError, RecursionError):
            return False
        return not first[end:].strip() and (bool(rest.strip()) or self._read_more())

    def location(self, at: int | None = None) -> str:
        """The line and column of an index into the window, by default of the position, as the detail of a location."""
        before = self.text[: self.position if at is None else at]
        line, column = before.count("\n"), len(before) - before.rfind("\n")
        return f", line {1 + self._line + line}, column {column if line else self._column + len(before) + 1}"

    def _drop_consumed(self) -> None:
        """Drop the text before the position, once it is large."""
        if self.position >= _CHUNK:
            before = self.text[: self.position]
            breaks = before.count("\n")
            self._line += breaks
            self._column = len(before) - before.rfind("\n") - 1 if breaks else self._column + len(before)
            self.text, self.position = self.text[self.position :], 0

    def _read_more(self) -> bool:
        """Read as much as the window holds, so that a long row is not decoded too often; False at the end."""
        if self._ended:
            return False
        content = self._stream.read(max(_CHUNK, len(self.text) - self.position))
        self._ended = not content
        text = self._utf8.decode(content, final=self._ended)
        self._has_bad_bytes = self._has_bad_bytes or (not text.isascii() and _BAD_BYTE.search(text) is not None)
        self.text += text
        return not self._ended


def _is_unfinished(error: json.JSONDecodeError, text: str) -> bool:
    """Whether more text could complete it: it broke off near the end, or within a string without an end."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(text) - _LONGEST_LITERAL
