"""What a source yields: a row as it stands there, or the fault that keeps it from being one. Knows no kind of file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it stands in a source.

    Args:
        index: its number, from 1, unique and rising in a source: in a single file the line of a `.jsonl` or `.txt` file, or
            the row's place in another; the files of a folder are counted on.
        value: the row as JSON would hold it (dict, list, str, int, float, bool, None), or None where there is a fault.
        fault: what is wrong with it and where, for a person: `line 17: not valid JSON: …`.
        reason: the part of `fault` that does not name the place, so that equal faults can be counted together.
        place: where it stands, for a person: `line 17`, or `shard-2.jsonl, line 17` in a source of several files.
    """

    index: int
    value: dict[str, Any] | None
    fault: str | None = None
    reason: str | None = None
    location: str = ""

    def in_file(self, name: str, before: int) -> RawRow:
        """This row in a source of several files, `before` rows of which come before those of the file `name`."""
        fault = None if self.fault is None else f"{name}, {self.fault}"
        return RawRow(self.index + before, self.value, fault, self.reason, f"{name}, {self.location}")


def faulty_row(index: int, place: str, reason: str, detail: str = "") -> RawRow:
    """A row that cannot be read; `detail` says more of where, such as the column."""
    return RawRow(index, None, f"{place}{detail}: {reason}", reason, place)


def row_or_fault(index: int, place: str, value: Any, reason: str | None, detail: str = "") -> RawRow:
    """A row if `value` is an object and there is no reason against it; `detail` as for `faulty`."""
    if reason is None and not isinstance(value, dict):
        kinds = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
        reason = f"the row is {kinds.get(type(value), 'a number')}, where an object is expected"
    if reason is not None:
        return faulty_row(index, place, reason, detail)
    return RawRow(index, cast("dict[str, Any]", value), location=place)
