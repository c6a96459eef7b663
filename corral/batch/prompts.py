"""Reads prompts from a file, row by row: the conversation, the user's id, or the fault that makes a row unusable.

It reads every kind of source that a recipe can name. Memory does not depend on the number of rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from corral.data.formats.chat_messages import OPENAI, read_messages
from corral.data.formats.fields import FormatError, column_text, describe_type
from corral.data.formats.turns import check_turn_order
from corral.data.sources import hash_source, read_rows
from corral.data.sources.raw_row import RawRow
from corral.messages import Conversation, Message
from corral.progress import Progress
from corral.recipe import Source

_KEYS = frozenset(("prompt", "messages", "id"))
_MAX_FAULTS = 5
_MAX_UNKNOWN_KEYS = 100


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row.

    Args:
        index: its number among the rows, from 0; blank lines are no rows.
        id_field: `{"id": …}`, or empty if the row has none.
        conversation: ends with the user; None if there is a fault.
        fault: why the row cannot be used, and its line.
    """

    index: int
    id_field: Mapping[str, Any]
    conversation: Conversation | None
    fault: str | None = None

    def error_row(self, reason: str) -> dict[str, Any]:
        """The row of the output that says why there is no answer."""
        return {"index": self.index, **self.id_field, "error": reason}

    def to_json(self) -> str:
        """A row without a fault as text; see `from_json`."""
        assert self.conversation is not None, "a faulty row has no conversation"
        return json.dumps([self.index, dict(self.id_field), self.conversation.to_json()])

    @classmethod
    def from_json(cls, text: str) -> Prompt:
        """The row of that text."""
        index, id_field, conversation = json.loads(text)
        return cls(index, id_field, Conversation.from_json(conversation))


@dataclass(slots=True)
class Survey:
    """Counts and faults of all rows."""

    rows: int = 0
    bad: int = 0
    faults: list[str] = field(default_factory=list[str])
    """The first few."""
    unknown_keys: dict[str, None] = field(default_factory=dict[str, None])
    """Keys of rows that have no meaning here, in order of appearance."""


class PromptFile:
    """The prompts of a source: a `.jsonl` file, or anything else that `data.sources` of a recipe reads.

    Raises:
        DataError: the file does not exist or cannot be read; now, or while iterating.
    """

    def __init__(self, path: str, progress: Progress) -> None:
        self.path = path
        self._source = Source(path=path)
        self._progress = progress

    def digest(self) -> str:
        """sha256 (hex) of the content."""
        return hash_source(self._source)

    def survey(self) -> Survey:
        """Read all rows, count them and keep the first faults."""
        survey = Survey()
        for raw in read_rows(self._source, self._progress):
            survey.rows += 1
            fault = _prompt(survey.rows - 1, raw).fault
            if fault is not None:
                survey.bad += 1
                if len(survey.faults) < _MAX_FAULTS:
                    survey.faults.append(fault)
            elif len(survey.unknown_keys) < _MAX_UNKNOWN_KEYS:
                survey.unknown_keys.update(dict.fromkeys(key for key in raw.value or {} if key not in _KEYS))
        return survey

    def __iter__(self) -> Iterator[Prompt]:
        return (_prompt(index, raw) for index, raw in enumerate(read_rows(self._source)))


def _prompt(index: int, raw: RawRow) -> Prompt:
    if raw.value is None:
        return Prompt(index, {}, None, raw.fault)
    id_field: dict[str, Any] = {}
    try:
        id_field = _id_field(raw.value)
        return Prompt(index, id_field, _conversation(raw.value))
    except FormatError as error:
        return Prompt(index, id_field, None, f"{raw.location}: {error.reason}")


def _id_field(row: Mapping[str, Any]) -> dict[str, Any]:
    """The id of a row, if it has one. Raises: FormatError (it is not a JSON scalar)."""
    if "id" not in row:
        return {}
    value = row["id"]
    is_number = isinstance(value, int | float) and math.isfinite(value)
    if not (value is None or isinstance(value, str) or is_number):
        raise FormatError(f"id is {describe_type(value)}: expected text, a number, true, false or null")
    return {"id": value}


def _conversation(row: Mapping[str, Any]) -> Conversation:
    """The conversation of a row. Raises: FormatError."""
    prompt, turns = (row.get(name) for name in ("prompt", "messages"))
    if prompt is not None and turns is not None:
        raise FormatError("both `prompt` and `messages`: a row may have only one of them")
    if turns is None:
        return Conversation.from_turns(("user", column_text(row, "prompt", "messages")))
    messages = read_messages(turns, "messages", OPENAI)
    if messages[-1].role != "user":
        raise FormatError(f"messages ends with the {messages[-1].role}: the last must be from the user")
    check_turn_order([*messages, Message("assistant", "")])
    return Conversation(tuple(messages))
