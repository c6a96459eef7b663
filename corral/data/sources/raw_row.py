"""A raw row as a source yields it: its JSON value, or the fault that made it unreadable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row of a source.

    Args:
        index: its number, from 1, unique and rising in a source: the line in a `.jsonl` or `.txt` file, the number of the
            row in others; the count continues over the files of a folder.
        value: the row as JSON values (dict, list, str, int, float, bool, None), or None if there is a fault.
        fault: what is wrong with it and where, for a message: `line 17: not valid JSON: …`.
        reason: the part of `fault` without the location, so that equal faults are counted together.
        location: where it is, for a message: `line 17`, or `shard-2.jsonl, line 17` in a source of several files.
    """

    index: int
    value: dict[str, Any] | None
    fault: str | None = None
    reason: str | None = None
    location: str = ""

    def in_file(self, name: str, before: int) -> RawRow:
        """The row as part of a source of several files, in the file `name`, after `before` rows of earlier files."""
        fault = None if self.fault is None else f"{name}, {self.fault}"
        return RawRow(self.index + before, self.value, fault, self.reason, f"{name}, {self.location}")


def faulty_row(index: int, location: str, reason: str, detail: str = "") -> RawRow:
    """A row that cannot be read; `detail` adds to the location, such as the column."""
    return RawRow(index, None, f"{location}{detail}: {reason}", reason, location)


def row_or_fault(index: int, location: str, value: Any, reason: str | None, detail: str = "") -> RawRow:
    """The row if `value` is an object and there is no `reason` against it, else a faulty row."""
    if reason is None and not isinstance(value, dict):
        kinds = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
        reason = f"the row is {kinds.get(type(value), 'a number')}, where an object is expected"
    if reason is not None:
        return faulty_row(index, location, reason, detail)
    return RawRow(index, cast("dict[str, Any]", value), location=location)
