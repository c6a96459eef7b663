from __future__ import annotations

import random
from typing import Any

import pytest

from corral.evaluation import tasks
from corral.evaluation.question_sets import Question
from corral.evaluation.tasks import Task, sample_task

PROBLEMS = [Question(f"What is {i} plus {i}?", str(2 * i), (str(2 * i),)) for i in range(50)]
PLACES = [
    Question(
        f"Where is thing {i}?\nA. at sea\nB. on land",
        "B. on land",
        ("on land",),
        ("at sea", "on land"),
        f"Where is {i}?",
    )
    for i in range(20)
]


def test_a_smaller_sample_is_part_of_a_larger_one_in_any_order_of_the_set() -> None:
    shuffled = random.Random(0).sample(PROBLEMS, len(PROBLEMS))
    few, many = sample_task("arithmetic", PROBLEMS, 10, seed=4), sample_task("arithmetic", shuffled, 30, seed=4)
    assert list(few.questions) == list(many.questions)[:10]
    assert sample_task("arithmetic", PROBLEMS, 10, seed=5).questions != few.questions


def test_examples_are_never_questions_that_are_asked() -> None:
    task = sample_task("arithmetic", PROBLEMS, 10, seed=4)
    questions = {question.prompt for question in task.questions}
    shown = {example.messages[0].content for example in task.examples(reasoning=False)}
    assert len(questions) == 10
    assert shown == {question.prompt for question in PROBLEMS} - questions


def test_with_reasoning_word_problems_have_worked_examples_and_other_sets_their_own() -> None:
    worked = sample_task("arithmetic", PROBLEMS, 10, seed=4).examples(reasoning=True)
    assert len(worked) == 8
    assert all("Answer:" in example.messages[-1].content for example in worked)
    assert len(sample_task("mmlu", PLACES, 5, seed=4).examples(reasoning=True)) == 15


@pytest.mark.parametrize(
    ("kind", "text", "result", "right"),
    [
        ("number", "They are 12.", "12", True),
        ("number", "5 + 7 = 12\nAnswer: 12.0 pens", "12", True),
        ("number", "13", "13", False),
        ("number", "none", None, False),
        ("choice", "B. on land", "B", True),
        ("choice", "It is on land.", "B", True),
        ("choice", "A", "A", False),
        ("choice", "who knows", None, False),
    ],
)
def test_a_number_is_right_if_it_is_equal_and_a_choice_by_its_letter_or_its_text(
    kind: Any, text: str, result: str | None, right: bool
) -> None:
    question = PROBLEMS[6] if kind == "number" else PLACES[0]
    assert tasks.grade_answer(kind, question, text) == {"result": result, "right": right}


def test_options_are_chosen_by_log_probability_and_by_log_probability_per_byte() -> None:
    row = {"id": "a", "logprobs": [-4.0, -5.0], "bytes": [2, 10], "gold": 1}
    assert tasks.row_from_options(row).correct == {"logprob": False, "logprob_byte": True}


def test_answers_and_options_of_one_question_are_joined() -> None:
    answers = {"a": {"id": "a", "right": True}, "b": {"id": "b", "right": False}}
    options = {"a": {"id": "a", "logprobs": [-1.0, -2.0], "bytes": [4, 4], "gold": 0}}
    rows = tasks.join_rows(answers, options)
    assert [dict(row.correct) for row in rows] == [
        {"accuracy": True, "logprob": True, "logprob_byte": True},
        {"accuracy": False},
    ]


def test_an_answer_of_text_is_compared_with_all_references() -> None:
    task = Task("truthfulqa", "text", [], [])
    assert tasks.grade_answer(task.kind, PROBLEMS[0], "anything") == {}
    row = tasks.row_from_answer({"id": "a", "answer": "seeds", "references": ["insects", "seeds"]})
    assert (row.reference, row.other_references, row.answer) == ("insects", ("seeds",), "seeds")
