"""Rows of a file → prompts, one at a time: what is asked, the caller's id, or the fault that keeps a row from being asked.

Reads what any source of a recipe may be. Memory does not depend on the number of rows. It does not know what is done with a
prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from corral.data.formats.chat_messages import OPENAI, read_messages
from corral.data.formats.fields import FormatError, check_turn_order, column_text, describe_type
from corral.data.sources import hash_source, read_rows
from corral.data.sources.raw_row import RawRow
from corral.messages import Conversation, Message
from corral.progress import Progress
from corral.recipe import Source

_KEYS = frozenset(("prompt", "messages", "id"))


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row.

    Args:
        index: its place among the rows, from 0; blank lines are no rows.
        id_field: `{"id": …}`, or empty if the row has none.
        conversation: what is asked; it ends with the user. None where there is a fault.
        fault: why the row cannot be asked, and where it stands.
    """

    index: int
    id_field: Mapping[str, Any]
    conversation: Conversation | None
    fault: str | None = None

    def error_row(self, reason: str) -> dict[str, Any]:
        """The row of the output that says why there is no answer."""
        return {"index": self.index, **self.id_field, "error": reason}


@dataclass(slots=True)
class Survey:
    """What a look at all rows finds."""

    rows: int = 0
    bad: int = 0
    faults: list[str] = field(default_factory=list[str])
    """The first few."""
    ignored: dict[str, None] = field(default_factory=dict[str, None])
    """Keys of rows that mean nothing here, in the order they came."""


class PromptFile:
    """The prompts of a source: a `.jsonl` file, or anything else that `data.sources` of a recipe reads.

    Raises:
        DataError: there is no such file, or it cannot be read; now, or while it is read.
    """

    def __init__(self, path: str, progress: Progress) -> None:
        self.path = path
        self._source = Source(path=path)
        self._progress = progress

    def digest(self) -> str:
        """sha256 (hex) of what is read."""
        return hash_source(self._source)

    def survey(self, most: int = 5) -> Survey:
        """Count rows and faults, keeping the first `most` faults."""
        found = Survey()
        for raw in read_rows(self._source, self._progress):
            found.rows += 1
            fault = _prompt(found.rows - 1, raw).fault
            if fault is not None:
                found.bad += 1
                if len(found.faults) < most:
                    found.faults.append(fault)
            elif len(found.ignored) < 100:
                found.ignored.update(dict.fromkeys(key for key in raw.value or {} if key not in _KEYS))
        return found

    def __iter__(self) -> Iterator[Prompt]:
        return (_prompt(index, raw) for index, raw in enumerate(read_rows(self._source)))


def _prompt(index: int, raw: RawRow) -> Prompt:
    if raw.value is None:
        return Prompt(index, {}, None, raw.fault)
    given: dict[str, Any] = {}
    try:
        given = _given(raw.value)
        return Prompt(index, given, _conversation(raw.value))
    except FormatError as error:
        return Prompt(index, given, None, f"{raw.location}: {error.reason}")


def _given(row: Mapping[str, Any]) -> dict[str, Any]:
    """The id of a row, if it has one. Raises: FormatError (it is no value that a line of JSON can carry by itself)."""
    if "id" not in row:
        return {}
    value = row["id"]
    is_number = isinstance(value, int | float) and math.isfinite(value)
    if not (value is None or isinstance(value, str) or is_number):
        raise FormatError(f"id is {describe_type(value)}: expected text, a number, true, false or null")
    return {"id": value}


def _conversation(row: Mapping[str, Any]) -> Conversation:
    """What a row asks. Raises: FormatError."""
    prompt, turns = (row.get(name) for name in ("prompt", "messages"))
    if prompt is not None and turns is not None:
        raise FormatError("both `prompt` and `messages`: one row asks one thing")
    if turns is None:
        return Conversation.from_turns(("user", column_text(row, "prompt", "messages")))
    read_ = read_messages(turns, "messages", OPENAI)
    if read_[-1].role != "user":
        raise FormatError(f"messages ends with the {read_[-1].role}: the last must be from the user")
    check_turn_order([*read_, Message("assistant", "")])
    return Conversation(tuple(read_))
