"""Public question sets: reads the rows of each packaged file as questions of one form. For evaluation only."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

from corral.assets import fetch
from corral.errors import DataError
from corral.messages import Conversation, with_input

AnswerKind: TypeAlias = Literal["number", "choice", "text"]
LETTERS = "ABCDEFGH"

_ONE_NUMBER = re.compile(r"-?\d[\d,]*(\.\d+)?(?!\s*[\d:/])\D*")
_OPTION = re.compile(r"\n(?=[A-H]\. )")


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Attributes:
        prompt: the text that the model is asked.
        answer: a right answer, as a few-shot example shows it.
        references: what an answer is compared with: the number, the correct option's text, or several equally good texts.
        options: their texts in the order they are shown, or none.
        stem: the question without its options, for the log-probability of each option as the answer.
    """

    prompt: str
    answer: str
    references: tuple[str, ...]
    options: tuple[str, ...] = ()
    stem: str = ""

    @property
    def id(self) -> str:
        """Hash of its content."""
        text = json.dumps([self.prompt, self.answer], ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def correct_option(self) -> int:
        """The index of the correct option."""
        return self.options.index(self.references[0])

    @property
    def example(self) -> Conversation:
        """The question with its answer."""
        return Conversation.from_turns(("user", self.prompt), ("assistant", self.answer))

    @property
    def option_example(self) -> Conversation:
        """The question without its options, answered by the text of the correct one."""
        return Conversation.from_turns(("user", self.stem), ("assistant", self.references[0]))


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """A set: the kind of its answers, its file in the asset `question-sets`, and the parser of its rows, which returns None
    for a row that cannot be scored."""

    kind: AnswerKind
    file: str
    parse_row: Callable[[Mapping[str, Any]], Question | None]


def load_questions(name: str) -> list[Question]:
    """The questions of a set in the order of the file, without duplicates and rows that cannot be scored.

    Raises:
        AssetError: the file cannot be fetched.
        DataError: a row does not have the set's schema.
    """
    question_set = QUESTION_SETS[name]
    path = fetch("question-sets").path / question_set.file
    return parse_questions(question_set, path.read_text("utf-8").splitlines(), where=question_set.file)


def parse_questions(question_set: QuestionSet, lines: Iterable[str], *, where: str) -> list[Question]:
    """As `load_questions`, from lines of JSON. Raises: DataError."""
    return list({question.id: question for question in _parse_rows(question_set, lines, where)}.values())


def _parse_rows(question_set: QuestionSet, lines: Iterable[str], where: str) -> Iterator[Question]:
    for number, line in enumerate(lines, start=1):
        try:
            question = question_set.parse_row(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"this row does not have the schema of its question set: {type(error).__name__}: {error}",
                where=f"{where}, line {number}",
                hint="fetch the file again: `corral cache clear question-sets`",
            ) from None
        if question is not None:
            yield question


def load_worked_problems() -> list[Conversation]:
    """Word problems worked in steps, with the result after `Answer:`, from the asset `gsm8k-examples`. Raises: AssetError."""
    import yaml

    value = cast("dict[str, Any]", yaml.safe_load(fetch("gsm8k-examples").files[0].read_text("utf-8")))
    return [parse_worked_problem(sample["question"], sample["target"]) for sample in value["fewshot_config"]["samples"]]


def parse_worked_problem(question: str, target: str) -> Conversation:
    """One worked problem, from a target that ends in `The answer is 6.`"""
    steps, _, result = target.rpartition("The answer is ")
    return Conversation.from_turns(
        ("user", question), ("assistant", f"{steps.strip()}\nAnswer: {result.strip().rstrip('.')}")
    )


def _asdiv(row: Mapping[str, Any]) -> Question | None:
    """ASDiv: passage, question, and an answer with its unit. Answers that are times, ratios, dates or names are skipped."""
    answer = row["answer"].strip()
    if not _ONE_NUMBER.fullmatch(answer):
        return None
    number = re.split(r"[^\d.,-]", answer, maxsplit=1)[0].replace(",", "").rstrip(".")
    return Question(f"{row['passage'].strip()} {row['question'].strip()}", number, (number,))


def _lettered(row: Mapping[str, Any]) -> Question | None:
    """CommonsenseQA and MMLU: options as lines `A. …`, and the correct one as such a line."""
    lines = _OPTION.split(row["options"].strip())
    if row["answer"] not in lines:
        return None  # three rows of CommonsenseQA have a line break within an option
    options = tuple(line.partition(". ")[2].strip() for line in lines)
    right = options[lines.index(row["answer"])]
    if [line[0] for line in lines] != list(LETTERS[: len(lines)]) or options.count(right) > 1 or "" in options:
        return None
    stem = row["question"].strip()
    shown = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    return Question(f"{stem}\n{shown}", row["answer"], (right,), options, stem)


def _boolq(row: Mapping[str, Any]) -> Question:
    right = {"True": "yes", "False": "no"}[row["answer"]]
    prompt = with_input(f"{row['question'].strip().capitalize()}? Answer yes or no.", row["passage"].strip())
    return Question(prompt, right, (right,), ("yes", "no"), prompt)


def _truthfulqa(row: Mapping[str, Any]) -> Question:
    references = tuple(text.strip() for text in row["answer"] if text.strip())
    return Question(row["question"].strip(), references[0], references)


def _xsum(row: Mapping[str, Any]) -> Question:
    summary = row["summary"].strip()
    return Question(with_input("Summarise this article in one sentence.", row["document"].strip()), summary, (summary,))


QUESTION_SETS: Mapping[str, QuestionSet] = {
    "arithmetic": QuestionSet("number", "ASDiv/test.jsonl", _asdiv),
    "commonsense_qa": QuestionSet("choice", "CommonsenseQA/validation.jsonl", _lettered),
    "mmlu": QuestionSet("choice", "MMLU/test.jsonl", _lettered),
    "boolq": QuestionSet("choice", "BoolQ/dev.jsonl", _boolq),
    "truthfulqa": QuestionSet("text", "TruthfulQA/combined.jsonl", _truthfulqa),
    "xsum": QuestionSet("text", "XSum/test.jsonl", _xsum),
}
"""By the name of their task. The packaged TruthfulQA has true answers only, so its multiple choice (mc1) cannot be asked."""
