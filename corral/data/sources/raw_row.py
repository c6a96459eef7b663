"""A raw row as a source yields it: its JSON value, or the fault that made it unreadable."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

_TURN_KEYS = {"messages": {"role", "content"}, "conversations": {"from", "value"}}


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row of a source.

    Args:
        index: its number, unique and rising in its file: the line in a `.jsonl` file, the first line in a `.txt` file, the row
            of the spreadsheet in a table (its header is row 1), else the number of the row from 1.
        value: the row as JSON values (dict, list, str, int, float, bool, None), or None if there is a fault.
        fault: what is wrong with it and where, for a message: `line 17: not valid JSON: …`.
        reason: the part of `fault` without the location, so that equal faults are counted together.
        location: where it is, for a message: `line 17`, or `shard-2.jsonl, line 17` in a source of several files.
        file: the name of its file in a source of several files.
        continues: whether it goes on where the row before it ends, as the parts of a long document do.
    """

    index: int
    value: dict[str, Any] | None
    fault: str | None = None
    reason: str | None = None
    location: str = ""
    file: str = ""
    continues: bool = False

    def in_file(self, name: str) -> RawRow:
        """The row as part of a source of several files, in the file `name`."""
        fault = None if self.fault is None else f"{name}, {self.fault}"
        return replace(self, fault=fault, location=f"{name}, {self.location}", file=name)


def faulty_row(index: int, location: str, reason: str, detail: str = "") -> RawRow:
    """A row that cannot be read; `detail` adds to the location, such as the column."""
    return RawRow(index, None, f"{location}{detail}: {reason}", reason, location)


def row_or_fault(index: int, location: str, value: Any, reason: str | None, detail: str = "") -> RawRow:
    """The row if `value` is an object or a list of chat turns and there is no `reason` against it, else a faulty row."""
    if column := column_of_turns(value):
        value = {column: value}
    if reason is None and not isinstance(value, dict):
        kinds = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
        reason = f"the row is {kinds.get(type(value), 'a number')}, where an object is expected"
    if reason is not None:
        return faulty_row(index, location, reason, detail)
    return RawRow(index, cast("dict[str, Any]", value), location=location)


def column_of_turns(value: Any) -> str | None:
    """The column in which a list of chat turns usually stands, by the keys of the turns; None if `value` is no such list."""
    if not isinstance(value, list) or not value:
        return None
    turns = cast("list[Any]", value)
    for column, keys in _TURN_KEYS.items():
        if all(isinstance(turn, dict) and keys <= turn.keys() for turn in turns):
            return column
    return None
