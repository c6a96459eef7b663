"""Columns beside a row's texts whose meaning is known: they are used, or the row is left out with the reason.

A mapping names every column that it uses, so none of this applies to it: it is the way to train such rows nevertheless.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

from corral.data.formats.fields import FormatError, describe_type, nonblank_text, optional_column_text
from corral.messages import Message

P = ParamSpec("P")
R = TypeVar("R")

MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")
TOOL_COLUMNS = ("tools", "functions")
REASONING_COLUMNS = ("reasoning_content", "reasoning", "thinking")
"""Columns, and keys of a message, that hold what a model thinks before it answers."""


def check_context_columns(read: Callable[P, R]) -> Callable[P, R]:
    """Let a format refuse rows with media, tools, reasoning or a weight of their own, which it would leave out of what is
    trained."""

    @wraps(read)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        row = cast("Mapping[str, Any]", args[0])
        for name in (*MEDIA_COLUMNS, *TOOL_COLUMNS, *REASONING_COLUMNS):
            if name in row and not is_empty(row[name]):
                raise FormatError(f"the row has `{name}`, which would be left out: {_advice(name)}")
        for name in ("train", "loss"):
            if str(row.get(name)).strip().lower() == "false":
                raise FormatError(f"the row's own `{name}` is false")
        if "weight" in row:
            _check_row_weight(row["weight"])
        return read(*args, **kwargs)

    return checked


def refuse_columns(row: Mapping[str, Any], names: Iterable[str], read_from: str) -> None:
    """Raises FormatError if one of these columns holds something: it belongs to the conversation, which is read from another
    column."""
    for name in names:
        if not is_empty(row.get(name)):
            raise FormatError(f"`{name}` beside `{read_from}` would be left out: say in a mapping what becomes of it")


def _advice(name: str) -> str:
    if name in MEDIA_COLUMNS:
        return "corral trains on text only"
    if name in TOOL_COLUMNS:
        return "tools are not trained"
    return "a mapping can put it into the answer"


def is_empty(value: Any) -> bool:
    """Whether a value is null, or a blank text or list in its place."""
    if isinstance(value, float):
        return math.isnan(value)
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    return value is None or (isinstance(value, list | dict) and not value)


def _check_row_weight(value: Any) -> None:
    """Raises FormatError for a weight that would change what is trained. What is no number is another column's name."""
    try:
        weight = float(value.replace(",", ".") if isinstance(value, str) else value)
    except (TypeError, ValueError):
        return
    if math.isnan(weight) or weight == 1:
        return
    if weight == 0:
        raise FormatError("the row's own `weight` is 0")
    raise FormatError(f"the row's own `weight` is {weight:g}: weights of rows other than 0 and 1 are not trained")


def earlier_turns(row: Mapping[str, Any]) -> list[Message]:
    """The turns in `history`: pairs of a question and its answer, as LLaMA-Factory writes them. Raises FormatError."""
    value = row.get("history")
    if is_empty(value):
        return []
    if not isinstance(value, list):
        raise FormatError(f"history is {describe_type(value)}: expected pairs of a question and its answer")
    turns: list[Message] = []
    for number, pair in enumerate(cast("list[Any]", value)):
        if not isinstance(pair, list) or len(cast("list[Any]", pair)) != 2:
            raise FormatError(f"history.{number} is not a pair of a question and its answer")
        question, answer = cast("list[Any]", pair)
        turns.append(Message("user", nonblank_text(question, f"history.{number}[0]")))
        turns.append(Message("assistant", nonblank_text(answer, f"history.{number}[1]")))
    return turns


def context_text(row: Mapping[str, Any]) -> str:
    """The material in `context` that the row's question is about; empty if there is none. Raises FormatError."""
    return optional_column_text(row, "context")
