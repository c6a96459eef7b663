"""Columns and keys beside a row's texts: used, or the row is left out with the reason."""

from __future__ import annotations

from typing import Any

import pytest

from corral.data.formats import FORMATS, FormatError, choose_format
from corral.messages import Conversation, Feedback, Message, Preference
from corral.recipe import Source
from tests.data.formats.rows import SHAPES, TURNS, reason

ALPACA = {"instruction": "And how long?", "input": "", "output": "Long."}


def read(row: dict[str, Any]) -> Any:
    return choose_format(Source(path="a.jsonl"), [row]).to_record(row)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("images", ["a.png"]),
        ("image", {"bytes": "…"}),
        ("videos", ["a.mp4"]),
        ("tools", [{"type": "function"}]),
        ("tools", '[{"name": "f"}]'),
        ("reasoning_content", "Hm."),
        ("thinking", "Hm."),
        ("weight", 0),
        ("weight", "0.5"),
        ("train", False),
        ("loss", "False"),
    ],
)
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "text"])
def test_a_row_with_what_would_be_left_out_is_left_out_itself(name: str, column: str, value: Any) -> None:
    row, _, expected = SHAPES[name]
    assert f"`{column}`" in reason(FORMATS[name], row | {column: value})
    for nothing in (None, "", "[]", [], float("nan")):
        assert FORMATS[name](row | {column: nothing}) == expected
    assert FORMATS[name](row | {"weight": 1}) == expected


def test_history_context_and_query_are_used() -> None:
    earlier = [["Which river?", "The Rhine."], ["Where?", "In Europe."]]
    assert read(ALPACA | {"history": earlier, "system": "You know rivers."}) == Conversation.from_turns(
        ("system", "You know rivers."),
        ("user", "Which river?"),
        ("assistant", "The Rhine."),
        ("user", "Where?"),
        ("assistant", "In Europe."),
        ("user", "And how long?"),
        ("assistant", "Long."),
    )
    asked = Conversation.from_turns(("user", "Who?\n\n### Input:\nAda came."))
    context = {"context": "Ada came."}
    assert read({"prompt": "Who?", "response": "Ada", **context}) == asked.add("assistant", "Ada")
    assert read({"instruction": "Who?", "response": "Ada", **context}) == asked.add("assistant", "Ada")
    assert read({"query": "Who?", "chosen": "Ada", "rejected": "Bob", **context}) == Preference(asked, "Ada", "Bob")
    assert reason(FORMATS["alpaca"], ALPACA | {"history": ["Which river?"]}).startswith("history.0 is not a pair")
    assert "`history` beside it" in reason(
        FORMATS["prompt-completion"], {"prompt": TURNS[:1], "completion": "x", "history": earlier}
    )


@pytest.mark.parametrize(("key", "no", "yes"), [("weight", 0, 1), ("train", False, True), ("loss", False, True)])
def test_what_a_message_says_of_its_own_training_is_honoured(key: str, no: Any, yes: Any) -> None:
    turns = [*TURNS, TURNS[0], TURNS[1] | {key: yes}]
    turns[1] = TURNS[1] | {key: no}
    assert [message.trained for message in read({"messages": turns}).messages] == [True, False, True, True]
    assert "only 0, 1, true and false" in reason(FORMATS["messages"], {"messages": [TURNS[0], TURNS[1] | {key: 0.5}]})
    if key != "weight":
        assert "only answers are trained" in reason(
            FORMATS["messages"], {"messages": [TURNS[0] | {key: yes}, TURNS[1]]}
        )


@pytest.mark.parametrize("column", ["label", "kto_tag"])
def test_messages_with_a_judgement_are_feedback_and_never_trained_as_an_answer(column: str) -> None:
    record = read({"messages": TURNS, column: False})
    assert record == Feedback(Conversation((Message("user", TURNS[0]["content"]),)), TURNS[1]["content"], 0.0)
    assert isinstance(read({"messages": TURNS, column: "news"}), Conversation)


def test_reasoning_in_a_message_is_refused_and_other_keys_are_reported() -> None:
    turns = [TURNS[0], TURNS[1] | {"reasoning_content": "Hm."}]
    assert reason(FORMATS["messages"], {"messages": turns}).startswith("a message has `reasoning_content`")
    named = [{**turn, "name": "Ada"} for turn in TURNS]
    why = choose_format(Source(path="a.jsonl"), [{"messages": named}]).why
    assert why.endswith("; keys of messages that are not used: `name`")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"Department": "HR", "Question": "Who?", "Answer": "Ada"}, ("Who?", "Ada")),
        ({" Prompt ": "Who?", " Completion ": "Ada"}, ("Who?", "Ada")),
        ({"Instruction": "Who?", "Response": "Ada"}, ("Who?", "Ada")),
        ({"user": "Who?", "assistant": "Ada"}, ("Who?", "Ada")),
        ({"instruction": "Who?", "response": "Ada"}, ("Who?", "Ada")),
        ({"body": {"messages": TURNS}, "custom_id": "1"}, (TURNS[0]["content"], TURNS[1]["content"])),
    ],
)
def test_columns_are_known_in_other_spellings(row: dict[str, Any], expected: tuple[str, str]) -> None:
    assert read(row) == Conversation.from_turns(("user", expected[0]), ("assistant", expected[1]))


def test_a_named_format_reads_columns_in_other_spellings_and_says_so() -> None:
    row = {"Question": "Who?", "Answer": "Ada"}
    chosen = choose_format(Source(path="a.csv", format="question-answer"), [row])
    assert chosen.to_record(row) == Conversation.from_turns(("user", "Who?"), ("assistant", "Ada"))
    assert chosen.why.endswith("; read without regard to capitals and spaces: `Question`, `Answer`")


def test_the_columns_of_openorca_are_known() -> None:
    row = {"id": "niv.1", "system_prompt": "You are a geographer.", "question": "Who?", "response": "Ada"}
    assert read(row) == Conversation.from_turns(
        ("system", "You are a geographer."), ("user", "Who?"), ("assistant", "Ada")
    )


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"role": "user", "content": "Hi"}, "one turn of a chat"),
        ({"speaker": "Ada", "text": "Hi"}, "one turn of a chat"),
        ({"messages": TURNS, "label": 0}, "`label` judges the answer"),
        ({"messages": TURNS, "kto_tag": "bad"}, "`kto_tag` judges the answer"),
        ({"prompt": "[{'role': 'user', 'content': 'Hi'}]", "completion": "x"}, "holds turns of a chat"),
        ({"prompt": "Hi", "completion": '{"role": "assistant", "content": "x"}'}, "holds turns of a chat"),
        ({"prompt": "Translate.", "input": "Bonjour", "output": "Hello"}, "`input` beside `prompt`"),
        ({"messages": TURNS, "context": "Ada came."}, "`context` beside `messages`"),
        (ALPACA | {"System": 3}, "system is a number"),
        ({"messages": TURNS, "Weight": 0}, "the row's own `weight` is 0"),
        ({"text": "Hi", "weight": 0}, "the row's own `weight` is 0"),
        ({"text": "Hi", "images": ["a.png"]}, "the row has `images`"),
        ({"question": "a", "answer": "b", "weight": "0,5"}, "the row's own `weight` is 0.5"),
        ({"body": {"messages": TURNS, "tools": [{"type": "function"}]}}, "the row has `tools`"),
        ({"context": "c", "chosen": "The sky is green.", "rejected": "The sky is grey."}, "`context` beside `chosen`"),
        ({"messages": [*TURNS, TURNS[0]], "completion": "x"}, "`completion` beside `messages`"),
    ],
)
def test_what_would_change_the_meaning_of_a_row_leaves_it_out(row: dict[str, Any], words: str) -> None:
    with pytest.raises(FormatError) as caught:
        read(row)
    assert words in caught.value.reason


def test_a_null_answer_is_not_replaced_by_another_columns_text() -> None:
    rows = [
        {"question": "a", "answer": "gold", "response": "guess"},
        {"question": "b", "answer": None, "response": "guess"},
    ]
    chosen = choose_format(Source(path="a.jsonl"), rows)
    assert chosen.to_record(rows[0]) == Conversation.from_turns(("user", "a"), ("assistant", "gold"))
    with pytest.raises(FormatError, match="answer is null"):
        chosen.to_record(rows[1])
    # Files of two kinds in one folder: a row has one of the columns.
    mixed = [{"question": "a", "answer": "x", "response": None}, {"question": "b", "answer": None, "response": "y"}]
    assert [choose_format(Source(path="a.jsonl"), mixed).to_record(row).messages[-1].content for row in mixed] == [
        "x",
        "y",
    ]  # type: ignore[union-attr]


def test_columns_in_another_spelling_are_read_beside_others() -> None:
    row = {"question": "Who?", "answer": "Ada", "Context": "Ada came.", "System": "Be brief."}
    assert read(row) == Conversation.from_turns(
        ("system", "Be brief."), ("user", "Who?\n\n### Input:\nAda came."), ("assistant", "Ada")
    )


def test_the_right_option_is_not_taken_for_a_second_answer() -> None:
    row = {"question": "Which is larger?", "choices": ["The moon", "The sun"], "answer": 1, "response": "A. The moon"}
    expected = SHAPES["multiple-choice"][2]
    assert choose_format(Source(path="a.jsonl", format="multiple-choice"), [row, row]).to_record(row) == expected


@pytest.mark.parametrize("form", [{"instruction": "a", "output": "b"}, {"prompt": "a", "completion": "b"}])
def test_a_bad_answer_among_rows_that_judge_none_is_not_trained(form: dict[str, Any]) -> None:
    bad = form | {"label": False}
    chosen = choose_format(Source(path="a.jsonl"), [form, form, form, bad])
    assert isinstance(chosen.to_record(form), Conversation)
    with pytest.raises(FormatError, match="`label` judges the answer"):
        chosen.to_record(bad)
