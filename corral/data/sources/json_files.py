"""Reads `.json` files, a list of rows, and `.jsonl` files, a row per line. Both are recognised whatever the name says.

A list is decoded through a window that moves over the file, so that memory does not depend on its size. Text that is no JSON
ends the reading of a list, as nothing behind it can be trusted; a row of valid JSON that strict readers refuse is a fault of
that row. (`ijson` would replace half a surrogate pair by a question mark, and keep the last of two equal keys.) An object
may hold rows in one of its keys, or columns as pandas writes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any, cast

from corral.data.sources.files import BrokenFileError, Say, SourceFile
from corral.data.sources.raw_row import RawRow, column_of_turns, faulty_row, row_or_fault
from corral.data.sources.strict_json import StrictDecoder, explain_error, explain_limit, skip_space
from corral.data.sources.text_files import MAX_ROW, NUL, Fault, Line, TextReader, open_text, read_lines
from corral.errors import DataError

MAX_OBJECT = 256_000_000
"""Characters of a file that holds one object, which is loaded whole."""

_CHUNK = 2**18
_LONGEST_LITERAL = len("-Infinity")
_FORMS = (
    '[{…}, {…}], or one object on each line, or {"data": [{…}, {…}]}, or columns {"prompt": […], "completion": […]}'
)


def read_json(file: SourceFile, say: Say) -> Iterator[RawRow]:
    """The rows of a `.json` file: a list, an object per line, or an object that holds rows or columns.

    Raises:
        DataError: it holds something else, or is not text.
        BrokenFileError: it is not JSON.
        OSError: it cannot be read to its end.
    """
    with open_text(file) as text:
        window = _Window(text)
        first = window.peek()
        is_by_line = first == "{" and window.has_object_per_line()
        if first == "[":
            yield from _read_items(window)
        elif first == "{" and not is_by_line:
            rows = _rows_of_object(window.read_whole_object(), file, say)
            yield from (row_or_fault(i, f"row {i}", row, None) for i, row in enumerate(rows, start=1))
    if is_by_line:
        yield from _read_rows_by_line(read_lines(file))
    elif first not in ("", "[", "{"):
        raise DataError("the file holds no list of rows", where=file.where, hint=f"write the rows as {_FORMS}")


def read_json_values(file: SourceFile, _: Say) -> Iterator[RawRow]:
    """Rows that are the values of one object. Raises as `read_json` does."""
    with open_text(file) as text:
        yield from _read_items(_Window(text), "{}")


def read_jsonl(file: SourceFile, say: Say) -> Iterator[RawRow]:
    """The rows of a `.jsonl` file; if it is a list of rows, those of the list. Raises as `read_json` does."""
    lines = read_lines(file)
    first = next((line for line in lines if line[1].strip()), None)
    if first is None:
        return
    if not first[1].lstrip().startswith("["):
        yield from _read_rows_by_line(chain([first], lines))
    elif _is_list_of_rows(first[1], lines):
        say(f"{file.where}: read as .json, as it is a list and not a row on each line")
        yield from read_json(file, say)
    else:
        yield from _read_rows_by_line(read_lines(file))


def _is_list_of_rows(line: str, rest: Iterator[Line]) -> bool:
    """Whether a file is a list of rows, by its first line and the rest: it runs over several lines, or is the only line and
    holds objects or lists which are not the turns of one chat."""
    try:
        value, _, _ = StrictDecoder().decode(line, skip_space(line, 0))
    except json.JSONDecodeError:
        return True
    except (ValueError, RecursionError):
        return False
    holds_rows = bool(value) and isinstance(value[0], dict | list) and column_of_turns(value) is None
    return holds_rows and not any(text.strip() for _, text, _ in rest)


def _read_rows_by_line(lines: Iterable[Line]) -> Iterator[RawRow]:
    decoder = StrictDecoder()
    for number, text, fault in lines:
        location = f"line {number}"
        if fault is not None:
            yield faulty_row(number, location, *fault)
        elif text := text.rstrip():
            value, reason, detail = None, None, ""
            try:
                value, end, reason = decoder.decode(text, skip_space(text, 0))
                if reason is None and end < len(text):
                    reason = "more text follows the object on its line"
            except json.JSONDecodeError as error:
                # The column differs between rows: it belongs to the location, not to the reason.
                reason, detail = f"not valid JSON: {explain_error(error)}", f", column {error.colno}"
            except (ValueError, RecursionError) as error:
                reason = explain_limit(error)
            yield row_or_fault(number, location, value, reason, detail)


def _read_items(window: _Window, brackets: str = "[]") -> Iterator[RawRow]:
    """The elements of the list, or the values of the object, that begins at the window's position and ends the file."""
    opening, closing = brackets
    window.expect(opening)
    number = 0
    while number or window.peek() != closing:
        number += 1
        if opening == "{":
            window.read_value()
            window.expect(":")
        value, fault = window.read_value()
        yield row_or_fault(number, f"row {number}", value, *(fault or (None, "")))
        if window.peek() == closing:
            break
        window.expect(",")
    window.expect(closing)
    if window.peek():
        raise window.broken_error("text follows the end of the list")


def _rows_of_object(value: dict[str, Any], file: SourceFile, say: Say) -> list[Any]:
    """The rows that an object holds: in columns, or in the one key with a list of objects. Raises DataError."""
    if value and all(isinstance(column, dict) for column in value.values()):
        # By index, as pandas writes a table: {"a": {"0": …, "1": …}, "b": {…}}.
        by_index = cast("dict[str, dict[str, Any]]", value)
        indices = list(next(iter(by_index.values())))
        if all(index.isdecimal() for index in indices) and all(list(c) == indices for c in by_index.values()):
            return [{name: column[index] for name, column in by_index.items()} for index in indices]
    lists = {name: cast("list[Any]", column) for name, column in value.items() if isinstance(column, list)}
    chats = [name for name, items in lists.items() if column_of_turns(items)]
    if chats:
        raise DataError(
            f"the file holds an object without rows: one conversation, in {chats[0]!r}",
            where=file.where,
            hint=f"write the rows as {_FORMS}",
        )
    of_objects = [name for name, items in lists.items() if _holds_objects(items)]
    is_table = len(lists) == len(value) and not any(column_of_turns(items) for items in lists.values())
    if is_table and len(of_objects) < len(lists):
        lengths = {name: len(column) for name, column in lists.items()}
        if len(set(lengths.values())) == 1:
            return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
        if not of_objects:
            counts = ", ".join(f"{name!r} {length:,}" for name, length in islice(lengths.items(), 6))
            raise DataError(f"the columns differ in length: {counts}", where=file.where, hint=_FORMS)
    if len(of_objects) != 1:
        what = f"several lists of rows: {', '.join(map(repr, of_objects))}" if of_objects else "an object without rows"
        raise DataError(f"the file holds {what}", where=file.where, hint=f"write the rows as {_FORMS}")
    say(f"{file.where}: the rows are those in {of_objects[0]!r}")
    return lists[of_objects[0]]


def _holds_objects(items: list[Any]) -> bool:
    return bool(items) and all(isinstance(item, dict) for item in items) and column_of_turns(items) is None


class _Window:
    """The part of a file's text that is being decoded."""

    def __init__(self, text: TextReader) -> None:
        self._file = text
        self._json = StrictDecoder()
        self._text = ""
        self._position = 0
        self._ended = False
        self._line = 0  # line breaks before the window
        self._column = 0  # characters between the last of them and the window

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            self._position = skip_space(self._text, self._position)
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._read_more():
                return ""

    def expect(self, character: str) -> None:
        """Consume the next character, which must be this one. Raises BrokenFileError."""
        if (actual := self.peek()) != character:
            raise self.broken_error(f"expected {character!r}" if actual else "the file is cut short")
        self._position += 1

    def read_value(self) -> tuple[Any, Fault | None]:
        """Consume the next value. Returns it, or the fault of this value alone. Raises BrokenFileError."""
        self.peek()
        while True:
            try:
                value, end, reason = self._json.decode(self._text, self._position)
            except json.JSONDecodeError as error:
                if _is_unfinished(error, self._text):
                    if len(self._text) - self._position > MAX_ROW:
                        raise self.broken_error(f"a row is longer than {MAX_ROW:,} characters") from None
                    if self._read_more():
                        continue
                is_nul = self._text[error.pos : error.pos + 1] == "\0"
                raise self.broken_error(NUL if is_nul else explain_error(error), error.pos) from None
            except (ValueError, RecursionError) as error:
                raise self.broken_error(explain_limit(error)) from None
            # A number may continue beyond the window.
            if end < len(self._text) or not self._read_more():
                start, self._position = self._position, end
                if bad := self._file.find_fault(self._text[start:end]):
                    return None, (bad[0], f", {self._locate(start + bad[1])}")
                return value, None if reason is None else (reason, "")

    def read_whole_object(self) -> dict[str, Any]:
        """Consume the object that is the whole file. Raises BrokenFileError."""
        while len(self._text) <= MAX_OBJECT and self._read_more():
            pass
        if len(self._text) > MAX_OBJECT:
            raise BrokenFileError(f"one object of more than {MAX_OBJECT:,} characters: write a list of rows, or .jsonl")
        value, fault = self.read_value()
        if fault is not None:
            raise self.broken_error("".join(fault))
        if self.peek():
            raise self.broken_error("text follows the end of the object")
        return value

    def has_object_per_line(self) -> bool:
        """Whether the first line is one JSON value and another line follows."""
        while "\n" not in self._text[self._position :] and len(self._text) < MAX_ROW and self._read_more():
            pass
        first, _, rest = self._text[self._position :].partition("\n")
        try:
            _, end, _ = self._json.decode(first, 0)
        except (ValueError, RecursionError):
            return False
        return not first[end:].strip() and (bool(rest.strip()) or self._read_more())

    def broken_error(self, reason: str, at: int | None = None) -> BrokenFileError:
        """The error of text that is not JSON at an index into the window, by default at the position."""
        return BrokenFileError(f"not valid JSON at {self._locate(self._position if at is None else at)}: {reason}")

    def _locate(self, at: int) -> str:
        before = self._text[:at]
        line, column = before.count("\n"), len(before) - before.rfind("\n")
        return f"line {1 + self._line + line}, column {column if line else self._column + len(before) + 1}"

    def _read_more(self) -> bool:
        """Drop what was consumed and read as much as is left, so that a long row is decoded a few times; False at the end."""
        content = "" if self._ended else self._file.read(max(_CHUNK, len(self._text) - self._position))
        self._ended = not content
        if content:
            consumed = self._text[: self._position]
            breaks = consumed.count("\n")
            self._line += breaks
            self._column = len(consumed) - consumed.rfind("\n") - 1 if breaks else self._column + len(consumed)
            self._text, self._position = self._text[self._position :] + content, 0
        return not self._ended


def _is_unfinished(error: json.JSONDecodeError, text: str) -> bool:
    """Whether more text could complete it: it broke off near the end, or within a string without an end."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(text) - _LONGEST_LITERAL
