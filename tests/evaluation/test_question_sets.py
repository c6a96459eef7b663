"""Question sets: rows of their true schemas, made up here; and the files as they lie in the package."""

from __future__ import annotations

import json
from typing import Any

import pytest

from corral.errors import DataError
from corral.evaluation import question_sets
from corral.evaluation.question_sets import QUESTION_SETS, Question, parse_worked_problem
from corral.metrics import answer_extraction

ROWS: dict[str, dict[str, Any]] = {
    "arithmetic": {"passage": "Ann has two pens. ", "question": "How many with 3 more?", "answer": "1,005 pens"},
    "commonsense_qa": {
        "question": "Where does a boat lie?",
        "answer": "B. harbour",
        "options": "\nA. attic\nB. harbour\nC. oven\nD. shelf\nE. drawer",
    },
    "mmlu": {"question": "Two and two:", "options": "A. 3\nB. 5\nC. 4\nD. 22", "answer": "C. 4"},
    "boolq": {"question": "is a boat a house", "title": "Boat", "answer": "False", "passage": "A boat floats."},
    "truthfulqa": {"question": "What do crows eat?", "answer": ["Seeds", " Insects ", ""]},
    "xsum": {"id": "1", "document": "A boat sank.\nNobody was hurt.", "summary": "A boat sank, all are well."},
}


def parse_one(name: str, **changes: Any) -> Question:
    (question,) = question_sets.parse_questions(QUESTION_SETS[name], [json.dumps(ROWS[name] | changes)], where="a test")
    return question


def test_every_set_has_a_sample_row() -> None:
    assert ROWS.keys() == QUESTION_SETS.keys()


def test_a_word_problem_is_its_passage_and_question_and_the_number_of_its_answer() -> None:
    question = parse_one("arithmetic")
    assert question.prompt == "Ann has two pens. How many with 3 more?"
    assert (question.answer, question.references) == ("1005", ("1005",))


@pytest.mark.parametrize(
    "answer", ["Mrs. Hilt", "3:30 p.m.", "5:6", "Yes", "February 3rd", "11:55 p.m. on 24 December", "1/2"]
)
def test_a_word_problem_without_one_number_as_its_answer_is_left_out(answer: str) -> None:
    row = json.dumps(ROWS["arithmetic"] | {"answer": answer})
    assert question_sets.parse_questions(QUESTION_SETS["arithmetic"], [row], where="a test") == []


@pytest.mark.parametrize(("name", "place", "text"), [("commonsense_qa", 1, "harbour"), ("mmlu", 2, "4")])
def test_options_are_shown_with_their_letters_and_the_stem_has_none(name: str, place: int, text: str) -> None:
    question = parse_one(name)
    assert question.options[place] == text == question.references[0]
    assert question.correct_option == place
    assert question.stem == ROWS[name]["question"]
    assert question.prompt.startswith(f"{question.stem}\nA. ")
    assert question.prompt.count("\n") == len(question.options)
    assert question.option_example.messages[-1].content == text
    assert answer_extraction.extract_choice(question.answer, question.options) == "ABCDE"[place]


def test_ambiguous_and_unreadable_options_are_left_out() -> None:
    faults = ({"options": "A. 3\nB. 4\nC. 4\nD. 22", "answer": "C. 4"}, {"answer": "C. 44"}, {"options": "A. 3\nC. 4"})
    lines = [json.dumps(ROWS["mmlu"] | fault) for fault in faults]
    assert question_sets.parse_questions(QUESTION_SETS["mmlu"], lines, where="a test") == []


def test_the_other_sets_are_read() -> None:
    assert (parse_one("boolq").options, parse_one("boolq").references) == (("yes", "no"), ("no",))
    assert "A boat floats." in parse_one("boolq").prompt
    assert parse_one("truthfulqa").references == ("Seeds", "Insects")
    assert parse_one("xsum").references == ("A boat sank, all are well.",)
    assert "Nobody was hurt." in parse_one("xsum").prompt


def test_duplicates_are_dropped_and_a_row_of_another_schema_is_named_by_its_line() -> None:
    line = json.dumps(ROWS["mmlu"])
    assert len(question_sets.parse_questions(QUESTION_SETS["mmlu"], [line, line], where="a test")) == 1
    with pytest.raises(DataError, match=r"does not have the schema of its question set: KeyError: 'answer'") as caught:
        question_sets.parse_questions(
            QUESTION_SETS["mmlu"], [line, '{"question": "", "options": ""}'], where="rows.jsonl"
        )
    assert caught.value.where == "rows.jsonl, line 2"


def test_the_result_of_a_worked_problem_can_be_extracted() -> None:
    steps = "Two pens and 3 are 2 + 3 = 5. The answer is 5."
    question, answer = parse_worked_problem("How many?", steps).messages
    assert question.content == "How many?"
    assert answer.content == "Two pens and 3 are 2 + 3 = 5.\nAnswer: 5"
    assert answer_extraction.extract_number(answer.content) == "5"


def test_the_packaged_sets_are_read_completely() -> None:
    sets = {name: question_sets.load_questions(name) for name in QUESTION_SETS}
    assert {name: len(questions) for name, questions in sets.items()} == {
        "arithmetic": 2085,
        "commonsense_qa": 1209,
        "mmlu": 2842,
        "boolq": 3270,
        "truthfulqa": 817,
        "xsum": 1000,
    }
    for name, questions in sets.items():
        assert len({question.id for question in questions}) == len(questions)
        for question in questions:
            assert question.prompt.strip()
            assert all(question.references)
            assert bool(question.options) == (QUESTION_SETS[name].kind == "choice")
    assert all(answer_extraction.extract_number(question.answer) for question in sets["arithmetic"])
    lettered = [*sets["commonsense_qa"], *sets["mmlu"]]
    unread = [q for q in lettered if answer_extraction.extract_choice(q.answer, q.options) != "ABCDE"[q.correct_option]]
    assert unread == []


def test_the_package_has_eight_worked_problems_with_results() -> None:
    problems = question_sets.load_worked_problems()
    results = [answer_extraction.extract_number(problem.messages[-1].content) for problem in problems]
    assert results == ["6", "5", "39", "8", "9", "29", "33", "8"]
