"""Lists of messages in every spelling, system columns, and the dialogues of HH."""

from __future__ import annotations

import json
from typing import Any

import pytest

from corral.data.formats.chat_messages import hh_chosen, openai_messages, sharegpt
from corral.messages import Conversation, Message
from tests.data.formats.rows import reason

USER = {"role": "user", "content": "Hello?"}
ASSISTANT = {"role": "assistant", "content": "Hello."}
SAID = (Message("user", "Hello?"), Message("assistant", "Hello."))
SYSTEM = {"role": "system", "content": "Be brief."}


def test_messages_become_a_conversation_and_other_keys_are_ignored() -> None:
    value = {"id": 7, "messages": [SYSTEM, USER, ASSISTANT | {"name": "x"}, USER, ASSISTANT]}
    assert openai_messages(value) == Conversation.from_turns(
        ("system", "Be brief."),
        ("user", "Hello?"),
        ("assistant", "Hello."),
        ("user", "Hello?"),
        ("assistant", "Hello."),
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"text": "x", "label": 1}, "no `messages`: the row has 'text', 'label'"),
        ({}, "no `messages`: the row has no columns"),
        ({"messages": "hi"}, "messages is text: expected a list"),
        ({"messages": []}, "messages is an empty list"),
        ({"messages": [USER, "hi"]}, "messages.1 is text: expected an object with role and content"),
        ({"messages": [{"content": "x"}]}, "messages.0 has no role"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages.1 has no content"),
        (
            {"messages": [USER, {"role": "bot", "content": "x"}]},
            "messages.1.role is 'bot': expected system, user or assistant",
        ),
        (
            {"messages": [{"role": ["user"], "content": "x"}]},
            "messages.0.role is ['user']: expected system, user or assistant",
        ),
        ({"messages": [USER, ASSISTANT | {"content": None}]}, "messages.1.content is null: expected text"),
        ({"messages": [USER | {"content": ["x"]}, ASSISTANT]}, "messages.0.content is a list: expected text"),
        ({"messages": [USER | {"content": 3}, ASSISTANT]}, "messages.0.content is a number: expected text"),
        ({"messages": [USER, ASSISTANT | {"content": " \n"}]}, "empty content in turn 2"),
        ({"messages": [USER, SYSTEM, ASSISTANT]}, "system message in second place: it must be the first"),
        ({"messages": [USER, ASSISTANT, USER, SYSTEM]}, "system message in 4th place: it must be the first"),
        ({"messages": [SYSTEM, USER, USER, ASSISTANT]}, "turns 2 and 3 are both from the user"),
        ({"messages": [USER, ASSISTANT, USER]}, "no answer: the last message is from the user"),
        ({"messages": [SYSTEM]}, "no answer: the last message is from the system"),
        ({"messages": [ASSISTANT]}, "no question: the first message is from the assistant"),
        ({"messages": [ASSISTANT, USER, ASSISTANT]}, "no question: the first message is from the assistant"),
        ({"messages": [SYSTEM, ASSISTANT, USER, ASSISTANT]}, "no question: the first message is from the assistant"),
    ],
)
def test_a_row_without_the_messages_form_is_refused_with_a_reason_that_names_the_fault(
    value: dict[str, Any], expected: str
) -> None:
    assert reason(openai_messages, value) == expected


def test_a_long_value_is_shortened_in_a_reason() -> None:
    assert len(reason(openai_messages, {"messages": [{"role": "x" * 10_000, "content": "y"}]})) < 120


@pytest.mark.parametrize(
    "column",
    ["messages", "conversations", "conversation", "dialogue", "dialog", "turns", "chat", "items", "history"],
)
def test_the_list_may_have_any_of_its_names(column: str) -> None:
    assert openai_messages({column: [USER, ASSISTANT]}) == Conversation.from_turns(
        ("user", "Hello?"), ("assistant", "Hello.")
    )


def test_content_may_be_a_list_of_text_parts_and_nothing_else() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo?"}]
    assert (
        openai_messages({"messages": [{"role": "user", "content": parts}, ASSISTANT]}).messages[0].content == "Hello?"
    )
    image = [*parts, {"type": "image_url", "image_url": {"url": "x"}}]
    assert (
        reason(openai_messages, {"messages": [{"role": "user", "content": image}, ASSISTANT]})
        == "messages.0 holds 'image_url': corral trains on text only"
    )


@pytest.mark.parametrize("user", ["human", "user", "prompter", "Human", "USER ", "input", "customer"])
@pytest.mark.parametrize(
    "assistant",
    [
        *("gpt", "assistant", "chatgpt", "bing", "bard", "GPT", "model", "output", "agent", "llm"),
        *("gpt-3.5-turbo", "gpt4", "GPT-4o", "claude-3-opus", "Llama 3"),
    ],
)
@pytest.mark.parametrize(
    ("author", "content"), [("from", "value"), ("role", "content"), ("speaker", "text"), ("author", "value")]
)
def test_sharegpt_is_read_in_every_spelling(user: str, assistant: str, author: str, content: str) -> None:
    row = {
        "id": "a_0",
        "conversations": [
            {author: "system", content: "Be brief."},
            {author: user, content: "Hello?"},
            {author: assistant, content: "Hello."},
            {author: user, content: "More?"},
            {author: assistant, content: "No."},
        ],
    }
    assert sharegpt(row) == Conversation.from_turns(
        ("system", "Be brief."), ("user", "Hello?"), ("assistant", "Hello."), ("user", "More?"), ("assistant", "No.")
    )


@pytest.mark.parametrize("function", [openai_messages, sharegpt])
def test_a_system_column_comes_first_and_is_not_repeated(function: Any) -> None:
    expected = Conversation.from_turns(("system", "Be brief."), ("user", "Hello?"), ("assistant", "Hello."))
    turns = [USER, ASSISTANT]
    assert function({"messages": turns, "system": "Be brief."}) == expected
    assert function({"messages": turns, "system_prompt": "Be brief."}) == expected
    assert function({"messages": [SYSTEM, *turns], "system": "Be brief."}) == expected
    for empty in (None, "", "  ", float("nan")):
        assert function({"messages": [SYSTEM, *turns], "system": empty}) == expected
    assert reason(function, {"messages": [SYSTEM, *turns], "system": "Be long."}).startswith("two system messages")
    assert reason(function, {"messages": turns, "system": 3}) == "system is a number: expected text"


@pytest.mark.parametrize(
    "call",
    [
        {"from": "function_call", "value": "{}"},
        {"role": "tool", "content": "22"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]},
        {"role": "assistant", "tool_calls": [{"id": 1}]},
    ],
)
def test_a_conversation_with_tool_calls_is_refused_with_that_reason(
    call: dict[str, Any],
) -> None:
    turns = [{"role": "user", "content": "Weather?"}, call, {"role": "assistant", "content": "Fine."}]
    for function in (openai_messages, sharegpt):
        if "from" not in call or function is sharegpt:
            assert reason(function, {"messages": turns}) == "tools are called in the conversation: it is left out whole"


def test_a_null_list_is_skipped_if_another_column_has_one() -> None:
    assert openai_messages({"messages": None, "conversations": [USER, ASSISTANT]}).answered
    assert reason(openai_messages, {"messages": None}) == "messages is null: expected a list"


def test_a_dialogue_of_hh_is_split_at_its_speakers() -> None:
    chosen = "\n\nHuman: Hi\nthere\n\nAssistant: Yes?\n\nIn: full\n\nHuman: Bye\n\nAssistant: Bye. Human: no"
    assert hh_chosen({"chosen": chosen, "rejected": "…"}) == Conversation.from_turns(
        ("user", "Hi\nthere"), ("assistant", "Yes?\n\nIn: full"), ("user", "Bye"), ("assistant", "Bye. Human: no")
    )


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("Hello", "chosen does not begin with `Human:`"),
        ("\n\nAssistant: Hi\n\nHuman: Hi", "chosen does not begin with `Human:`"),
        ("\n\nHuman: Hi\n\nAssistant: ", "empty content in turn 2"),
        ("\n\nHuman: Hi\n\nAssistant:", "empty content in turn 2"),
        ("\n\nHuman: Hi", "no answer: the last message is from the user"),
        ("\n\nHuman: Hi\n\nHuman: Hi\n\nAssistant: Hi", "turns 1 and 2 are both from the user"),
        (["\n\nHuman: Hi"], "chosen is a list: expected text"),
    ],
)
def test_an_invalid_dialogue_is_refused(chosen: Any, expected: str) -> None:
    assert reason(hh_chosen, {"chosen": chosen}) == expected


def test_the_list_may_be_json_text_and_its_column_is_the_one_that_holds_one() -> None:
    expected = Conversation.from_turns(("user", "Hello?"), ("assistant", "Hello."))
    turns = [USER, ASSISTANT]
    for function in (openai_messages, sharegpt):
        assert function({"messages": json.dumps(turns)}) == expected
        assert function({"conversation": "c-17", "turns": 2, "chat": turns}) == expected
    assert (
        reason(openai_messages, {"messages": "[{'role': 'user'}]"})
        == "messages is text that is no JSON list of messages"
    )
    assert reason(openai_messages, {"messages": "Hello"}) == "messages is text: expected a list"


def test_a_word_that_begins_like_a_models_name_is_no_author() -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "philosopher", "value": "Hm."}]
    assert "is 'philosopher'" in reason(sharegpt, {"conversations": turns})


def test_earlier_turns_in_a_column_beside_the_messages_are_not_left_out_unseen() -> None:
    value = {"history": [["a", "b"]], "messages": [USER, ASSISTANT]}
    assert reason(openai_messages, value).startswith("`history` beside `messages` would be left out")
    assert openai_messages({"history": [USER, ASSISTANT]}).messages[1].content == "Hello."


def test_corrals_own_mark_of_an_answer_that_is_not_trained_is_read() -> None:
    record = Conversation((Message("user", "Hello?"), Message("assistant", "Hm.", trained=False), *SAID))
    assert openai_messages(record.to_json()) == record


def test_an_empty_system_message_is_none() -> None:
    value = {
        "conversations": [
            {"from": "system", "value": " "},
            {"from": "human", "value": "a"},
            {"from": "gpt", "value": "b"},
        ]
    }
    assert sharegpt(value) == Conversation.from_turns(("user", "a"), ("assistant", "b"))
    assert reason(sharegpt, {"conversations": value["conversations"][:1]}).startswith("empty content")
