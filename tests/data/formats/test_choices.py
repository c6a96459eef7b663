from __future__ import annotations

from typing import Any

import pytest

from corral.data.formats.choices import multiple_choice
from corral.messages import Conversation
from tests.data.formats.reasons import reason

QUESTION = {"question": "Which?"}
EXPECTED = Conversation.of(("user", "Which?\n\nA. red\nB. blue\nC. B"), ("assistant", "B. blue"))
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


def test_labels_of_the_data_set_are_known_and_written_as_letters() -> None:
    row = QUESTION | {"choices": {"label": ["1", "2"], "text": ["red", "blue"]}, "answerKey": "2"}
    asked = ("user", "Which?\n\nA. red\nB. blue")
    assert multiple_choice(row) == Conversation.of(asked, ("assistant", "B. blue"))


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
def test_what_is_no_question_with_options_is_refused(changes: dict[str, Any], expected: str) -> None:
    assert reason(multiple_choice, QUESTION | {"choices": ["red", "blue"], "answer": 0} | changes) == expected
