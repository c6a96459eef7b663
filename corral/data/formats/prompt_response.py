"""Reads rows of one to three texts: Alpaca, prompt and completion, question and answer, plain text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

from corral.data.formats.chat_messages import (
    ANSWER_TEXT_COLUMNS,
    SYSTEM_COLUMNS,
    add_system_column,
    is_hh,
    parse_json_list,
    read_hh_dialogue,
    read_messages,
)
from corral.data.formats.context_columns import check_context_columns, context_text, earlier_turns, refuse_columns
from corral.data.formats.fields import (
    FormatError,
    find_column,
    nonblank_text,
    optional_column_text,
)
from corral.data.formats.rendered_text import parse_rendered, refuse_end_token, refuse_rendered
from corral.data.formats.scores import CONVERSATION_SCORE_COLUMNS
from corral.data.formats.turns import check_turn_order, ordered_conversation
from corral.messages import Conversation, Message, Text, with_input

PROMPT_COLUMNS = ("prompt", "query", "input", "user")
COMPLETION_COLUMNS = ANSWER_TEXT_COLUMNS
TEXT_COLUMNS = ("text", "content")


def single_turn(row: Mapping[str, Any], request: str, answer: str) -> Conversation:
    """A conversation of a request and its answer, after the turns in the row's `history` and with the system message of its
    own column, if it has them. Raises FormatError."""
    exchange = [Message("user", request), Message("assistant", answer)]
    return Conversation(tuple(add_system_column([*earlier_turns(row), *exchange], row)))


@check_context_columns
def alpaca(row: Mapping[str, Any]) -> Conversation:
    """Alpaca's form: `instruction`, `input` or `context` (may be empty), `output` (or `response` …). Raises FormatError."""
    material = "\n\n".join(text for text in (optional_column_text(row, "input"), context_text(row)) if text)
    request = with_input(_message_text(row, "instruction"), material)
    return single_turn(row, request, _message_text(row, "output", *COMPLETION_COLUMNS))


@check_context_columns
def question_answer(row: Mapping[str, Any]) -> Conversation:
    """`question`, `answer` (or `response` …) and perhaps a `context`, which follows the question as its input.

    Raises FormatError.
    """
    request = with_input(_message_text(row, "question"), context_text(row))
    return single_turn(row, request, _message_text(row, "answer", *COMPLETION_COLUMNS))


def _message_text(row: Mapping[str, Any], *names: str) -> str:
    """The text of one message in the first of these columns. Raises FormatError."""
    name, value = find_column(row, names)
    return refuse_rendered(nonblank_text(value, name), name)


@check_context_columns
def plain_text(row: Mapping[str, Any]) -> Text | Conversation:
    """A document in `text` or `content`, all of it trained; a conversation if the text is the rendering of one.

    Raises:
        TurnOrderError: a rendered conversation is out of order.
        FormatError: there is no text, or it begins as a rendering and is none to its end.
    """
    name, value = find_column(row, TEXT_COLUMNS)
    text = nonblank_text(value, name)
    if any(isinstance(row.get(key), str) for key in ("role", "from", "speaker", "sender", "user")):
        raise FormatError(
            "the row is one turn of a chat: write the turns of a conversation into one row, as `messages`"
        )
    turns = parse_rendered(text, name)
    if turns is None:
        return Text(refuse_end_token(text, name))
    refuse_columns(row, ("context", "history"), name)
    if judgement := next((column for column in CONVERSATION_SCORE_COLUMNS if isinstance(row.get(column), bool)), None):
        raise FormatError(f"`{judgement}` judges the rendered conversation: give its turns as messages")
    return ordered_conversation(add_system_column(turns, row))


@check_context_columns
def prompt_completion(row: Mapping[str, Any]) -> Conversation:
    """`prompt` and `completion` (or `query` and `response`, or `input` and `output` …): texts, or lists of messages.

    Both together may be a conversation that a template has rendered. Earlier answers in the prompt are context: the completion
    alone is trained.

    Raises FormatError if the row has another form; the order of messages is that of `openai_messages`.
    """
    prompt_name, prompt = find_column(row, PROMPT_COLUMNS)
    completion_name, completion = find_column(row, COMPLETION_COLUMNS)
    if prompt_name != "input":
        refuse_columns(row, ("input",), prompt_name)
    if isinstance(prompt, str) and isinstance(completion, str):
        rendered = parse_rendered(prompt, prompt_name, may_lack_end=True)
        if rendered is not None:
            refuse_columns(row, ("context", "history"), prompt_name)
            turns = parse_rendered(prompt + completion, prompt_name, may_lack_end=True) or []
            return ordered_conversation(add_system_column([*_as_context(turns[:-1]), *turns[-1:]], row))
    asked = read_prompt(prompt_name, prompt, row)
    if not earlier_turns(row):
        asked = Conversation(tuple(_as_context(asked.messages)))
    return asked.add("assistant", read_answer(completion_name, completion))


def _as_context(turns: Iterable[Message]) -> list[Message]:
    return [replace(turn, trained=turn.role != "assistant") for turn in turns]


def read_prompt(name: str, value: Any, row: Mapping[str, Any]) -> Conversation:
    """A prompt: a text, a dialogue in HH's form, or a list of messages that ends with the user's.

    Args:
        name: the column, for reasons.
        value: its value.
        row: may hold a system message, and for a text earlier turns and context, in columns of their own.

    Raises FormatError if the value is something else.
    """
    value = parse_json_list(value)
    history, context = earlier_turns(row), context_text(row)
    if isinstance(value, list):
        turns = read_messages(value, name)
    elif is_hh(value) and (value.startswith("\n\n") or value.rstrip().endswith("\n\nAssistant:")):
        turns = read_hh_dialogue(value.rstrip().removesuffix("\n\nAssistant:"), name)
    else:
        text = refuse_rendered(nonblank_text(value, name), name)
        turns, history, context = [*history, Message("user", with_input(text, context))], [], ""
    if history or context:
        extra = "history" if history else "context"
        raise FormatError(f"{name} is a conversation, and `{extra}` beside it would be left out")
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
        return refuse_rendered(nonblank_text(value, name), name)
    turns = read_messages(cast("Any", [value] if isinstance(value, dict) else value), name)
    if len(turns) > 1:
        raise FormatError(f"{name} has several messages: expected one answer")
    if turns[0].role != "assistant":
        raise FormatError(f"{name} is from the {turns[0].role}: expected an answer of the assistant")
    if not turns[0].trained:
        raise FormatError(f"{name} is not to be trained on, as it says itself")
    return turns[0].content
