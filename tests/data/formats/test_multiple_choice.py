from __future__ import annotations

from typing import Any

import pytest

from corral.data.formats.fields import ContradictionError
from corral.data.formats.multiple_choice import AnswerNumbering, infer_numbering, multiple_choice
from corral.errors import DataError
from corral.messages import Conversation
from tests.data.formats.rows import reason

QUESTION = {"question": "Which?"}
EXPECTED = Conversation.from_turns(("user", "Which?\n\nA. red\nB. blue\nC. B"), ("assistant", "B. blue"))
OPTIONS: list[dict[str, Any]] = [
    {"choices": ["red", "blue", "B"]},
    {"options": ["red", "blue", "B"]},
    {"choices": {"label": ["A", "B", "C"], "text": ["red", "blue", "B"]}},
    {"choices": {"text": ["red", "blue", "B"]}},
    {"choices": [{"label": "A", "text": "red"}, {"label": "B", "text": "blue"}, {"label": "C", "text": "B"}]},
    {"choices": {"A": "red", "B": "blue", "C": "B"}},
    {"A": "red", "B": "blue", "C": "B", "D": None},
    {"option_a": "red", "option_b": "blue", "option_c": "B"},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("answer", [1, 1.0, "B", " b", "blue", "1"])
def test_options_and_answer_are_read_in_every_form(options: dict[str, Any], answer: Any) -> None:
    assert multiple_choice(QUESTION | options | {"answer": answer}) == EXPECTED


def test_option_labels_are_matched_and_written_as_letters() -> None:
    row = QUESTION | {"choices": {"label": ["1", "2"], "text": ["red", "blue"]}, "answerKey": "2"}
    asked = ("user", "Which?\n\nA. red\nB. blue")
    assert multiple_choice(row) == Conversation.from_turns(asked, ("assistant", "B. blue"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"answer": 2}, "answer is outside the 2 options, counted from 0"),
        ({"answer": -1}, "answer is outside the 2 options, counted from 0"),
        ({"answer": "E"}, "answer is 'E': expected one of the options or their labels, 'A', 'B'"),
        ({"answer": ""}, "answer is empty"),
        ({"answer": None}, "answer is null: expected text"),
        ({"answer": True}, "answer is true or false: expected text"),
        ({"answer": float("nan")}, "answer is NaN: expected text"),
        ({"choices": ["red"]}, "fewer than 2 options"),
        ({"choices": []}, "fewer than 2 options"),
        ({"choices": ["red"] * 27}, "more than 26 options"),
        ({"choices": "red, blue"}, "choices is text: expected a list, or an object of labels and texts"),
        ({"choices": ["red", None]}, "choices[1] is null: expected text"),
        ({"choices": ["red", {"text": "blue"}]}, "choices[1] is an object: expected text"),
        ({"choices": [{"label": "A"}, {"label": "B"}]}, "choices[0] is null: expected text"),
        ({"choices": {"label": ["A"], "text": ["red", "blue"]}}, "choices has 1 labels and 2 texts"),
        ({"choices": {"label": [1, 2], "text": ["red", "blue"]}}, "a label in choices is a number: expected text"),
    ],
)
def test_an_invalid_multiple_choice_row_is_refused(changes: dict[str, Any], expected: str) -> None:
    assert reason(multiple_choice, QUESTION | {"choices": ["red", "blue"], "answer": 0} | changes) == expected


FOUR = {"question": "Which?", "choices": ["w", "x", "y", "z"]}


def rows(answers: list[Any], **changes: Any) -> list[dict[str, Any]]:
    return [FOUR | changes | {"answer": answer} for answer in answers]


@pytest.mark.parametrize("kind", [int, float, str])
@pytest.mark.parametrize(
    ("answers", "expected", "note"),
    [
        ([1, 2, 3, 4], AnswerNumbering(1, True, True), "; answers are counted from 1"),
        ([0, 1, 2, 3], AnswerNumbering(0, True, True), "; answers are counted from 0"),
        ([1, 2, 3], AnswerNumbering(0, False, True), "; answers are counted from 0"),
    ],
)
def test_the_first_rows_decide_where_options_are_counted_from(
    answers: list[int], expected: AnswerNumbering, note: str, kind: type
) -> None:
    assert infer_numbering(rows([kind(answer) for answer in answers]), "a") == (expected, note)


def test_letters_texts_and_labels_do_not_decide_the_numbering() -> None:
    assert infer_numbering(rows(["A", "z", "B"]), "a") == (AnswerNumbering(), "")
    labelled = {"label": ["1", "2"], "text": ["red", "blue"]}
    assert infer_numbering(rows(["1", 2], choices=labelled), "a") == (AnswerNumbering(), "")
    assert multiple_choice(rows([1], choices=labelled)[0]).messages[-1].content == "A. red"


def test_answers_counted_from_0_and_from_1_at_once_are_refused() -> None:
    with pytest.raises(DataError, match="both 0 and the number of options"):
        infer_numbering(rows([0, 1, 4]), "a")


def test_a_row_that_contradicts_the_first_rows_refuses_the_source() -> None:
    for answer, counting in ((4, AnswerNumbering(0, confirmed=False)), (0, AnswerNumbering(1))):
        with pytest.raises(ContradictionError, match="outside the 4 options"):
            multiple_choice(rows([answer])[0], counting)
    assert reason(lambda row: multiple_choice(row, AnswerNumbering(0)), rows([4])[0]).startswith("answer is outside")


@pytest.mark.parametrize("kind", [int, str])
def test_an_ambiguous_answer_number_is_refused_unless_other_rows_decide(kind: type) -> None:
    numbers = {"choices": ["3", "2", "1", "0"]}
    for are_positions, right in ((True, "B. 2"), (False, "C. 1")):
        row = rows([kind(1)], **numbers)[0]
        assert multiple_choice(row, AnswerNumbering(are_positions=are_positions)).messages[-1].content == right
    with pytest.raises(ContradictionError, match="the text of one option and the number of another"):
        multiple_choice(rows([kind(1)], **numbers)[0], AnswerNumbering(are_positions=None))
    assert infer_numbering(rows([kind(1)], **numbers), "a")[0].are_positions is None
    assert infer_numbering([*rows([kind(1)], **numbers), *rows([kind(2)])], "a")[0].are_positions is True
    texts = rows([kind(9)], choices=["9", "8", "7", "1"])
    assert infer_numbering([*rows([kind(1)], **numbers), *texts], "a")[0].are_positions is False
