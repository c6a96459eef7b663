"""A task: which questions of a set are asked, which are examples, and whether an answer is right.

Knows nothing about models or files of rows; the sets themselves are read by `questions`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from corral.evaluation import question_sets
from corral.evaluation.question_sets import LETTERS, Kind, Question
from corral.evaluation.scoring import Row
from corral.messages import Conversation
from corral.metrics import answer_extraction


@dataclass(frozen=True)
class Task:
    """Some questions of a set.

    Attributes:
        name: of the set.
        kind: what its answers are.
        questions: those that are asked.
        others: the rest of the set, which examples are taken of.
        max_tokens: most tokens of an answer, where that is not as elsewhere.
    """

    name: str
    kind: Kind
    questions: Sequence[Question]
    others: Sequence[Question]
    max_tokens: int | None = None

    def examples(self, *, reasoning: bool) -> Sequence[Conversation]:
        """Solved questions to show. With `reasoning`, word problems with their steps for a task of numbers; the other sets
        have no steps to show."""
        if reasoning and self.kind == "number":
            return self._worked
        return [question.example for question in self.others]

    @cached_property
    def _worked(self) -> Sequence[Conversation]:
        return question_sets.worked_problems()

    @property
    def examples_of_options(self) -> Sequence[Conversation]:
        """Questions without their options, answered by the right one's text."""
        return [question.example_of_options for question in self.others]


def load(name: str, rows: int, *, seed: int, max_tokens: int | None = None) -> Task:
    """A task by its name. Raises: AssetError, DataError."""
    return draw(name, question_sets.read(name), rows, seed=seed, max_tokens=max_tokens)


def draw(name: str, every: Sequence[Question], rows: int, *, seed: int, max_tokens: int | None = None) -> Task:
    """The questions of lowest hash (of content and seed) are asked, so that fewer are a part of more, in any order."""

    def place(question: Question) -> str:
        return hashlib.sha256(f"{seed}:{question.id}".encode()).hexdigest()

    drawn = sorted(every, key=place)
    return Task(name, question_sets.SETS[name].kind, drawn[:rows], drawn[rows:], max_tokens)


def judge(kind: Kind, question: Question, text: str) -> dict[str, Any]:
    """What a text answers: `result` (None where it gives none) and whether that is `right`; nothing for a task of texts."""
    match kind:
        case "number":
            result = answer_extraction.number(text)
            return {
                "result": result,
                "right": result is not None and result == answer_extraction.number(question.answer),
            }
        case "choice":
            result = answer_extraction.choice(text, question.options)
            return {"result": result, "right": result == LETTERS[question.right_option]}
        case "text":
            return {}


def answered_row(row: Mapping[str, Any]) -> Row:
    """A finished answer as what scores are taken of."""
    if "right" in row:
        return Row(row["id"], right={"accuracy": row["right"]})
    first, *others = row["references"]
    return Row(row["id"], reference=first, answer=row["answer"], others=tuple(others))


def chosen_row(row: Mapping[str, Any]) -> Row:
    """The options' log-probabilities as what scores are taken of: which is highest, as a whole and by byte."""
    by_byte = [value / size for value, size in zip(row["logprobs"], row["bytes"], strict=True)]
    return Row(
        row["id"],
        right={
            "logprob": _highest(row["logprobs"]) == row["gold"],
            "logprob_byte": _highest(by_byte) == row["gold"],
        },
    )


def rows(answers: Mapping[str, Mapping[str, Any]], options: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """A task's rows of one variant, answers and log-probabilities of the options joined by id."""
    made: list[Row] = []
    for id_ in sorted(answers.keys() | options.keys()):
        row = answered_row(answers[id_]) if id_ in answers else Row(id_)
        right = dict(row.right) | (dict(chosen_row(options[id_]).right) if id_ in options else {})
        made.append(Row(id_, reference=row.reference, answer=row.answer, others=row.others, right=right))
    return made


def _highest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
