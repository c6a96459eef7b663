"""Reads rows of one to three texts: Alpaca, prompt and completion, question and answer, plain text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from corral.data.formats.chat_messages import (
    SYSTEM_COLUMNS,
    add_system_column,
    parse_json_list,
    read_hh_dialogue,
    read_messages,
)
from corral.data.formats.fields import (
    FormatError,
    check_turn_order,
    column_text,
    find_column,
    nonblank_text,
    optional_column_text,
)
from corral.messages import Conversation, Message, Text, with_input

PROMPT_COLUMNS = ("prompt", "query", "input")
COMPLETION_COLUMNS = ("completion", "response", "output")
TEXT_COLUMNS = ("text", "content")


def single_turn(row: Mapping[str, Any], request: str, answer: str) -> Conversation:
    """A conversation of a request and its answer, with the system message of the row's own column if it has one."""
    return Conversation(tuple(add_system_column([Message("user", request), Message("assistant", answer)], row)))


def alpaca(row: Mapping[str, Any]) -> Conversation:
    """Alpaca's form: `instruction`, `input` (may be empty), `output`. Raises FormatError."""
    request = with_input(column_text(row, "instruction"), optional_column_text(row, "input"))
    return single_turn(row, request, column_text(row, "output"))


def question_answer(row: Mapping[str, Any]) -> Conversation:
    """`question`, `answer` and perhaps a `context`, which follows the question as its input. Raises FormatError."""
    request = with_input(column_text(row, "question"), optional_column_text(row, "context"))
    return single_turn(row, request, column_text(row, "answer"))


def plain_text(row: Mapping[str, Any]) -> Text:
    """A document in `text` or `content`; all of it is trained. Raises FormatError."""
    return Text(column_text(row, *TEXT_COLUMNS))


def prompt_completion(row: Mapping[str, Any]) -> Conversation:
    """`prompt` and `completion` (or `query` and `response`, or `input` and `output`): texts, or lists of messages.

    Raises FormatError if the row has another form; the order of messages is that of `openai_messages`.
    """
    prompt = read_prompt(*find_column(row, PROMPT_COLUMNS), row)
    return prompt.add("assistant", read_answer(*find_column(row, COMPLETION_COLUMNS)))


def read_prompt(name: str, value: Any, row: Mapping[str, Any]) -> Conversation:
    """A prompt: a text, a dialogue in HH's form, or a list of messages that ends with the user's.

    Args:
        name: the column, for reasons.
        value: its value.
        row: may hold a system message in a column of its own.

    Raises FormatError if the value is something else.
    """
    value = parse_json_list(value)
    if isinstance(value, list):
        turns = read_messages(value, name)
    elif isinstance(value, str) and value.startswith("\n\nHuman:"):
        turns = read_hh_dialogue(value.rstrip().removesuffix("\n\nAssistant:"), name)
    else:
        turns = [Message("user", nonblank_text(value, name))]
    system = optional_column_text(row, *SYSTEM_COLUMNS)
    if system and turns[0].role != "system":
        turns.insert(0, Message("system", system))
    if turns[-1].role == "assistant":
        raise FormatError(f"{name} ends with an answer: nothing is left to ask")
    check_turn_order([*turns, Message("assistant", "")])
    return Conversation(tuple(turns))


def read_answer(name: str, value: Any) -> str:
    """An answer: a text, or one message of the assistant, alone or in a list. Raises FormatError."""
    value = parse_json_list(value)
    if value is None or not isinstance(value, list | dict):
        return nonblank_text(value, name)
    turns = read_messages(cast("Any", [value] if isinstance(value, dict) else value), name)
    if len(turns) > 1:
        raise FormatError(f"{name} has several messages: expected one answer")
    if turns[0].role != "assistant":
        raise FormatError(f"{name} is from the {turns[0].role}: expected an answer of the assistant")
    return turns[0].content
