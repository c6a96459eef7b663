"""Formats recognised by the first rows: what is chosen, reported and refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.data.formats import FORMATS, FormatError
from corral.data.formats.recognition import recognise
from corral.errors import DataError
from tests.data.formats.rows import GOOD, SAID, SHAPES, TURNS


def refusal(rows: list[dict[str, Any]]) -> DataError:
    with pytest.raises(DataError) as caught:
        recognise(rows, where="a.jsonl")
    assert caught.value.where == "a.jsonl"
    return caught.value


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (
            {"id": 1, "messages": TURNS},
            "messages, as the rows have `messages` with `role` and `content`; not used: `id`",
        ),
        ({"conversation": TURNS}, "messages, as the rows have `conversation` with `role` and `content`"),
        (
            {"conversations": SAID, "score": 5.2},
            "sharegpt, as the rows have `conversations` with `from` and `value`, in one of their spellings; "
            "not used: `score`",
        ),
        (
            {"instruction": "i", "input": "", "output": "o", "text": "t"},
            "alpaca, as the rows have `instruction`, `output`, `input`; not used: `text`",
        ),
        ({"instruction": "i", "output": "o"}, "alpaca, as the rows have `instruction`, `output`"),
        ({"prompt": "p", "completion": "c"}, "prompt-completion, as the rows have `prompt`, `completion`"),
        ({"input": "p", "output": "c"}, "prompt-completion, as the rows have `input`, `output`"),
        ({"question": "q", "answer": "a"}, "question-answer, as the rows have `question`, `answer`"),
        (
            {"question": "q", "answer": "a", "context": "c"},
            "question-answer, as the rows have `question`, `answer`, `context`",
        ),
        ({"text": "t", "url": "u"}, "text, as the rows have `text`; not used: `url`"),
        ({"chosen": "a b", "rejected": "a c"}, "preference, as the rows have `chosen`, `rejected`"),
        (
            {"prompt": "p", "completion": "c", "label": False},
            "feedback, as the rows have `prompt`, `completion`, `label`",
        ),
        (
            {"question": "q", "choices": ["x", "y"], "answer": "x"},
            "multiple-choice, as the rows have `question`, `choices`, `answer`",
        ),
        (
            {"question": "q", "A": "x", "B": "y", "answer": "A"},
            "multiple-choice, as the rows have `question`, `A`, `B`, `answer`",
        ),
    ],
)
def test_the_format_is_recognised_by_the_columns_and_reported(row: dict[str, Any], why: str) -> None:
    found = recognise([row] * 3)
    assert found.why == f"format: {why}"
    assert found.name == why.split(",")[0]


@pytest.mark.parametrize("name", ["hotpot_qa", "trivia_qa", "truthfulqa", "wikibooks-recipes"])
def test_a_public_data_set_is_recognised_by_all_its_columns(name: str) -> None:
    assert recognise([GOOD[name][0]]).name == name


def test_a_few_bad_rows_do_not_hide_the_format() -> None:
    bad: list[dict[str, Any]] = [{}, {"messages": None}, {"messages": "x"}, {"other": 1}]
    assert recognise([*bad, *[{"messages": TURNS}] * 4]).name == "messages"
    refusal([*bad, *[{"messages": TURNS}] * 3])


def test_values_decide_if_columns_do_not() -> None:
    assert recognise([{"messages": SAID}]).name == "sharegpt"
    assert "close: question-answer (`answer` is a number)" in str(refusal([{"question": "q", "answer": 3}]).hint)


def test_two_formats_in_one_row_are_refused() -> None:
    error = refusal([{"prompt": "p", "chosen": TURNS, "rejected": TURNS, "messages": TURNS}])
    assert error.what == (
        "the rows could be of two formats: messages, by `messages`; or preference, by `chosen`, `rejected`, `prompt`"
    )
    assert error.hint == 'name one: format = "messages"'


def test_rows_of_two_formats_are_to_be_two_sources() -> None:
    error = refusal([{"instruction": "i", "output": "o"}, {"messages": TURNS}])
    assert error.what.startswith("the rows could be of two formats")
    assert "a file of their own" in str(error.hint)


def test_an_unknown_format_error_lists_columns_close_formats_and_a_mapping() -> None:
    error = refusal([{"instruction": "x", "reply": "y"}, {"instruction": "x", "why": None}])
    assert error.what == "the rows are of no known format: their columns are `instruction`, `reply`, `why`"
    assert error.hint is not None
    assert error.hint.startswith("close: alpaca (needs `output`)")
    assert error.hint.endswith('mapping = { prompt = "{instruction}", completion = "{reply}" }')


def test_no_rows_at_all_are_refused() -> None:
    assert refusal([]).what == "there is no row to tell the format from"
    assert refusal([{}]).what == "the rows are of no known format: their columns are none"


def test_a_columns_name_is_escaped_in_an_error() -> None:
    error = refusal([{"\x1b[31m\ud800": 1}])
    str(error).encode("utf-8")
    assert "\x1b" not in str(error)


VALUES = (
    st.none() | st.booleans() | st.floats() | st.text(max_size=4) | st.just(TURNS) | st.just(SAID) | st.lists(st.none())
)
COLUMNS = st.sampled_from(sorted({column for row, _, _ in GOOD.values() for column in row})) | st.text(max_size=3)


@settings(deadline=None)
@given(st.lists(st.dictionaries(COLUMNS, VALUES, max_size=6), max_size=4))
def test_any_rows_have_a_format_or_are_refused(rows: list[dict[str, Any]]) -> None:
    found, error = outcome(rows)
    if error is None:
        assert found in GOOD
    else:
        assert error.hint
        str(error).encode("utf-8")


def outcome(rows: list[dict[str, Any]]) -> tuple[str | None, DataError | None]:
    try:
        return recognise(rows).name, None
    except DataError as error:
        return None, error


@pytest.mark.parametrize("name", SHAPES)
def test_no_format_is_recognised_without_its_text(name: str) -> None:
    row, path, _ = SHAPES[name]
    rest = {column: value for column, value in row.items() if column != path[0]}
    assert outcome([rest])[0] is None


def test_two_columns_are_not_enough_to_recognise_a_data_set() -> None:
    # GSM8K has these two columns, and HotpotQA a context of this form.
    assert outcome([{"question": "q", "answer": "a", "context": {"title": ["x"]}}])[0] is None


def test_a_rendered_text_column_beside_its_parts_is_ignored() -> None:
    error = refusal([{"instruction": "x", "reply": "y", "text": "x y"}])
    assert 'format = "text" would train `text` as it is' in str(error.hint)
    assert recognise([{"text": "x", "score": 0.5, "label": 1, "url": "u"}]).name == "text"


SYSTEM = {"system": "Be brief.", "id": 7, "history": [["a", "b"]]}
CHOICE = {"question": "Which?", "A": "w", "B": "x", "C": "y", "D": "z", "answer": "D"}
ROWS = [
    *(row for row, _, _ in SHAPES.values()),
    CHOICE,
    {"chosen": "The sky is green.", "rejected": "The sky is grey."},
    {"prompt": TURNS[0]["content"], "chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "No."}]},
    {"prompt": "p", "response": "r", "completion": None},
    {"conversation": "c-1", "messages": TURNS},
    {"items": TURNS},
    {"prompt": [TURNS[0]], "completion": "c", "score": None, "label": "yes"},
]


@pytest.mark.parametrize("extra", [{}, SYSTEM, {"system": None, "system_prompt": "S"}])
@pytest.mark.parametrize("row", ROWS)
def test_the_columns_reported_as_used_are_those_that_change_the_record(
    row: dict[str, Any], extra: dict[str, Any]
) -> None:
    row = row | {name: value for name, value in extra.items() if name not in row}
    if any(isinstance(value, list) and isinstance(value[0], dict) for value in row.values()):  # refused beside turns
        row = {name: row[name] for name in row if name != "history"}
    found = recognise([row] * 3)
    _, _, unused = found.why.partition("; not used: ")
    unused = set(re.findall("`([^`]*)`", unused))
    assert unused == {name for name in row if name not in _used(found.name, row)}


def _used(name: str, row: dict[str, Any]) -> set[str]:
    """The columns without which, or with something else in which, the record is another one or none."""

    def read(changed: dict[str, Any]) -> Any:
        try:
            return FORMATS[name](changed)
        except FormatError as error:
            return error.reason

    whole = read(row)
    return {column for column, value in row.items() if value is not None and read(row | {column: 77}) != whole}


@pytest.mark.parametrize("answer", ["yes", "maybe", "3 stars", [1]])
@pytest.mark.parametrize(("prompt", "completion"), [("prompt", "completion"), ("instruction", "output")])
@pytest.mark.parametrize("column", ["label", "score"])
def test_answers_with_unreadable_judgements_are_refused(prompt: str, completion: str, column: str, answer: Any) -> None:
    rows = [{prompt: "p", completion: "c", column: answer}, {prompt: "p", completion: "d", column: answer}]
    if answer == "yes":
        assert recognise(rows).name == "feedback"
    else:
        error = refusal(rows)
        assert error.what.startswith(f"`{column}` may say how good an answer is, but ")
        assert str(error.hint).endswith('format = "prompt-completion"' if prompt == "prompt" else 'format = "alpaca"')
    assert recognise([row | {column: None} for row in rows]).name in ("prompt-completion", "alpaca")


def test_history_and_items_hold_the_conversation_only_without_other_columns() -> None:
    assert recognise([{"history": TURNS, "id": 3}]).name == "messages"
    assert recognise([{"items": SAID}]).name == "sharegpt"
    both = recognise([{"prompt": "p", "completion": "c", "history": TURNS}])
    assert both.why.endswith("`prompt`, `completion`; not used: `history`")


@pytest.mark.parametrize(
    ("row", "ending"),
    [
        ({"reply": "x"}, "Name a format; to train `reply` as a document, call it `text`"),
        ({"reply": "x", "stars": 3, "parts": [1]}, "to train `reply` as a document, call it `text`"),
        ({"stars": 3}, "Name a format"),
        ({"q": "x", "stars": 3, "a": "y"}, 'mapping = { prompt = "{COLUMN}", completion = "{COLUMN}" }'),
        (
            {"id": "x", "my question": "y", "why": "z"},
            'mapping = { prompt = "{my question}", completion = "{COLUMN}" }',
        ),
    ],
)
def test_a_mapping_is_suggested_only_from_two_columns_of_text(row: dict[str, Any], ending: str) -> None:
    assert str(refusal([row]).hint).endswith(ending)
