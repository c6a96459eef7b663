"""Reads and checks the fields of a raw row, for all formats.

The reason of an error names the fault and the field, never the row, so that equal faults are counted together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, cast

from corral.messages import Record

Format: TypeAlias = Callable[[Mapping[str, Any]], Record]
"""Turns a raw row into a record. Raises FormatError."""

MAX_TEXT_CHARACTERS = 10_000_000
"""Characters of the longest text that is accepted. No model's context holds as much; a tokenizer would need minutes."""

_SURROGATE = re.compile("[\ud800-\udfff]")


class FormatError(Exception):
    """A row does not fit its format. `reason` says why, not where."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ContradictionError(FormatError):
    """A row contradicts what the first rows showed about the whole source, so that no row of it can be trusted.

    Args:
        reason: as of any FormatError.
        hint: what the user can do.
    """

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.hint = hint


def find_column(row: Mapping[str, Any], names: Sequence[str]) -> tuple[str, Any]:
    """(name, value) of the first of these columns that is not null, or else of the first that is there.

    Raises FormatError if the row has none of them.
    """
    present = [name for name in names if name in row]
    if not present:
        raise FormatError(f"no `{names[0]}`: the row has {quote_names(row)}")
    name = next((name for name in present if row[name] is not None), present[0])
    return name, row[name]


def nonblank_text(value: Any, name: str) -> str:
    """The value if it is a text that is not blank. Raises FormatError."""
    checked = valid_text(value, name)
    if not checked or checked.isspace():
        raise FormatError(f"{name} is empty")
    return checked


def valid_text(value: Any, name: str) -> str:
    """The value if it is a text, perhaps blank, that can be encoded and stored. Raises FormatError."""
    if not isinstance(value, str):
        raise FormatError(f"{name} is {describe_type(value)}: expected text")
    if len(value) > MAX_TEXT_CHARACTERS:
        raise FormatError(f"{name} is longer than {MAX_TEXT_CHARACTERS:,} characters")
    if "\0" in value:
        raise FormatError(f"{name} holds a NUL character")
    if not value.isascii() and _SURROGATE.search(value):
        raise FormatError(f"{name} holds half of a surrogate pair, which is no character")
    return value


def column_text(row: Mapping[str, Any], *names: str) -> str:
    """The text in the first of these columns. Raises FormatError."""
    name, value = find_column(row, names)
    return nonblank_text(value, name)


def optional_column_text(row: Mapping[str, Any], *names: str) -> str:
    """The text in the first of these columns that is not null, NaN or blank; empty if there is none. Raises FormatError."""
    for name in names:
        value = row.get(name)
        # A table's empty cell may be read as NaN.
        if value is None or (isinstance(value, float) and math.isnan(value)):
            continue
        text = valid_text(value, name)
        if text and not text.isspace():
            return text
    return ""


def value_at_path(row: Mapping[str, Any], path: Sequence[str | int]) -> Any:
    """The value at a path of a column, keys and list indices. Raises FormatError if the row has no such path."""
    value: Any = row
    for i, step in enumerate(path):
        name = format_path(path[:i]) or "the row"
        if isinstance(step, int):
            if not isinstance(value, list):
                raise FormatError(f"{name} is {describe_type(value)}: expected a list")
            items = cast("list[Any]", value)
            if not -len(items) <= step < len(items):
                raise FormatError(f"{name} is a list of {len(items)}: it has no [{step}]")
            value = items[step]
        else:
            if not isinstance(value, Mapping):
                raise FormatError(f"{name} is {describe_type(value)}: expected an object")
            fields = cast("Mapping[str, Any]", value)
            if step not in fields:
                raise FormatError(f"no `{format_path(path[: i + 1])}`: {name} has {quote_names(fields)}")
            value = fields[step]
    return value


def format_path(path: Sequence[str | int]) -> str:
    """`("answer", "aliases", 0)` → `answer.aliases[0]`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


def describe_type(value: Any) -> str:
    """The type of a value in a word or two, for a message."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinite"
    kinds: dict[type, str] = {
        type(None): "null",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
        bytes: "bytes",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")


def quote_names(names: Iterable[Any], most: int = 8) -> str:
    """Names for a message: `'a', 'b'`."""
    quoted = [short_repr(name) for name in names]
    return (", ".join(quoted[:most]) + (" …" if len(quoted) > most else "")) or "no columns"


def short_repr(value: Any) -> str:
    """A value's repr, cut to 40 characters."""
    try:
        text = repr(value[:60] if isinstance(value, str) else value)  # no repr of a huge text
    except (RecursionError, ValueError):  # nested too deeply, or a number of thousands of digits
        return describe_type(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


def column_names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names of all columns of the rows, in order of appearance."""
    return [str(name) for name in dict.fromkeys(name for row in rows for name in row)]
