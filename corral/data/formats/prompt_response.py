"""Formats of two or three texts: Alpaca, prompt and completion, question and answer, plain text.

Does not know data sets by name: those are in `named`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from corral.data.formats.chat_messages import SYSTEM, hh_turns, read_turns, unpacked
from corral.data.formats.fields import FormatError, check_order, find, optional_text_at, text, text_at
from corral.messages import Conversation, Message, Text, with_input

PROMPT = ("prompt", "query", "input")
COMPLETION = ("completion", "response", "output")
TEXT = ("text", "content")


def asked(row: Mapping[str, Any], request: str, answer: str) -> Conversation:
    """A request and its answer, after the system message of the row's own column, if it has one. Raises: FormatError."""
    system = optional_text_at(row, *SYSTEM)
    turns = (Message("user", request), Message("assistant", answer))
    return Conversation((Message("system", system), *turns) if system else turns)


def alpaca(row: Mapping[str, Any]) -> Conversation:
    """Alpaca's form: `instruction`, `input` (may be empty), `output`. Raises: FormatError."""
    request = with_input(text_at(row, "instruction"), optional_text_at(row, "input"))
    return asked(row, request, text_at(row, "output"))


def question_answer(row: Mapping[str, Any]) -> Conversation:
    """`question`, `answer` and perhaps a `context`, which follows the question as its input. Raises: FormatError."""
    request = with_input(text_at(row, "question"), optional_text_at(row, "context"))
    return asked(row, request, text_at(row, "answer"))


def plain_text(row: Mapping[str, Any]) -> Text:
    """A document in `text` or `content`; all of it is trained. Raises: FormatError."""
    return Text(text_at(row, *TEXT))


def prompt_completion(row: Mapping[str, Any]) -> Conversation:
    """`prompt` and `completion` (or `query` and `response`, or `input` and `output`): texts, or lists of messages.

    Raises:
        FormatError: otherwise; the order of messages is that of `messages`.
    """
    prompt = prompt_of(*find(row, PROMPT), row)
    return prompt.add("assistant", answer_of(*find(row, COMPLETION)))


def prompt_of(name: str, value: Any, row: Mapping[str, Any]) -> Conversation:
    """A prompt: a text, a dialogue in HH's form, or a list of messages that ends with the user.

    Args:
        name: the column, for reasons.
        value: what it holds.
        row: where a system message may stand in a column of its own.

    Raises:
        FormatError: it is something else.
    """
    value = unpacked(value)
    if isinstance(value, list):
        turns = read_turns(value, name)
    elif isinstance(value, str) and value.startswith("\n\nHuman:"):
        turns = hh_turns(value.rstrip().removesuffix("\n\nAssistant:"), name)
    else:
        turns = [Message("user", text(value, name))]
    system = optional_text_at(row, *SYSTEM)
    if system and turns[0].role != "system":
        turns.insert(0, Message("system", system))
    if turns[-1].role == "assistant":
        raise FormatError(f"{name} ends with an answer: nothing is left to ask")
    check_order([*turns, Message("assistant", "")])
    return Conversation(tuple(turns))


def answer_of(name: str, value: Any) -> str:
    """An answer: a text, or one message of the assistant, alone or in a list. Raises: FormatError."""
    value = unpacked(value)
    if value is None or not isinstance(value, list | dict):
        return text(value, name)
    turns = read_turns(cast("Any", [value] if isinstance(value, dict) else value), name)
    if len(turns) > 1:
        raise FormatError(f"{name} has several messages: expected one answer")
    if turns[0].role != "assistant":
        raise FormatError(f"{name} is from the {turns[0].role}: expected an answer of the assistant")
    return turns[0].content
