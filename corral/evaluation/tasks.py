"""A task: the questions of a set that are asked, the examples for them, and whether an answer is right."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from corral.evaluation import question_sets
from corral.evaluation.question_sets import LETTERS, AnswerKind, Question
from corral.evaluation.scoring import Row
from corral.messages import Conversation
from corral.metrics import answer_extraction
from corral.recipe.evaluate import Task as TaskSettings


@dataclass(frozen=True)
class Task:
    """Some questions of a set.

    Attributes:
        name: of the set.
        kind: of its answers.
        questions: those that are asked.
        example_pool: the other questions of the set; examples are taken from these.
        max_tokens: limit for an answer, if it differs from the recipe's.
    """

    name: str
    kind: AnswerKind
    questions: Sequence[Question]
    example_pool: Sequence[Question]
    max_tokens: int | None = None

    def examples(self, *, reasoning: bool) -> Sequence[Conversation]:
        """Answered questions for few-shot prompting. With `reasoning`, a task of numbers shows problems worked in steps; the
        other sets have no steps."""
        if reasoning and self.kind == "number":
            return question_sets.load_worked_problems()
        return [question.example for question in self.example_pool]

    def option_examples(self) -> Sequence[Conversation]:
        """Questions without their options, answered by the text of the correct one."""
        return [question.option_example for question in self.example_pool]


def load_task(name: str, rows: int, *, seed: int, max_tokens: int | None = None) -> Task:
    """A task of `rows` questions of the set with this name. Raises: AssetError, DataError."""
    return sample_task(name, question_sets.load_questions(name), rows, seed=seed, max_tokens=max_tokens)


def load_tasks(settings: Sequence[TaskSettings], *, seed: int) -> list[Task]:
    """The tasks of `[evaluate]`. Raises: as `load_task`."""
    return [load_task(task.name, task.rows, seed=seed, max_tokens=task.max_tokens) for task in settings]


def sample_task(
    name: str, questions: Sequence[Question], rows: int, *, seed: int, max_tokens: int | None = None
) -> Task:
    """Ask the `rows` questions with the lowest hash of seed and content: a smaller sample is part of a larger one, whatever
    the order of the questions."""

    def hash_of(question: Question) -> str:
        return hashlib.sha256(f"{seed}:{question.id}".encode()).hexdigest()

    shuffled = sorted(questions, key=hash_of)
    return Task(name, question_sets.QUESTION_SETS[name].kind, shuffled[:rows], shuffled[rows:], max_tokens)


def grade_answer(kind: AnswerKind, question: Question, text: str) -> dict[str, Any]:
    """Fields of a finished row: `result` extracted from the answer (None if it has none) and whether it is `right`; no fields
    for a task of texts."""
    match kind:
        case "number":
            result = answer_extraction.extract_number(text)
            expected = answer_extraction.extract_number(question.answer)
            return {"result": result, "right": result is not None and result == expected}
        case "choice":
            result = answer_extraction.extract_choice(text, question.options)
            return {"result": result, "right": result == LETTERS[question.correct_option]}
        case "text":
            return {}


def row_from_answer(row: Mapping[str, Any]) -> Row:
    """The row to score for a finished answer."""
    if "right" in row:
        return Row(row["id"], correct={"accuracy": row["right"]})
    first, *others = row["references"]
    return Row(row["id"], reference=first, answer=row["answer"], other_references=tuple(others))


def row_from_options(row: Mapping[str, Any]) -> Row:
    """The row to score for the log-probabilities of options: whether the correct option has the highest, and the highest per
    byte."""
    per_byte = [logprob / size for logprob, size in zip(row["logprobs"], row["bytes"], strict=True)]
    scores = {"logprob": row["logprobs"], "logprob_byte": per_byte}
    return Row(row["id"], correct={name: values.index(max(values)) == row["gold"] for name, values in scores.items()})


def join_rows(answers: Mapping[str, Mapping[str, Any]], options: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """A variant's rows of a task: answers and log-probabilities of options, joined by id."""
    rows: list[Row] = []
    for id_ in sorted(answers.keys() | options.keys()):
        parts = (("answers", answers.get(id_)), ("options", options.get(id_)))
        skipped = {source: str(row["skipped"]) for source, row in parts if row and "skipped" in row}
        row = row_from_answer(answers[id_]) if id_ in answers and "answers" not in skipped else Row(id_)
        by_option = row_from_options(options[id_]).correct if id_ in options and "options" not in skipped else {}
        rows.append(replace(row, correct={**row.correct, **by_option}, skipped=skipped))
    return rows
