"""Public question sets: rows as they lie in the packages → questions of one form. For evaluation only.

Knows the schema of each file, and how a question is put to a model; nothing about how it is answered, by whom, or whether
the answer is right.
"""

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
        prompt: what the model is asked.
        answer: a right answer, as an example shows it.
        references: what an answer is held against: the number, the right option's text, or texts that are as good.
        options: their texts, in the order they are shown, or none.
        stem: what the options' log-probabilities are taken after: the question without them.
    """

    prompt: str
    answer: str
    references: tuple[str, ...]
    options: tuple[str, ...] = ()
    stem: str = ""

    @property
    def id(self) -> str:
        """Names its content, the same in every run."""
        text = json.dumps([self.prompt, self.answer], ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def correct_option(self) -> int:
        """The place of the right option."""
        return self.options.index(self.references[0])

    @property
    def example(self) -> Conversation:
        """The question with its answer."""
        return Conversation.from_turns(("user", self.prompt), ("assistant", self.answer))

    @property
    def option_example(self) -> Conversation:
        """The question without its options, answered by the right one's text."""
        return Conversation.from_turns(("user", self.stem), ("assistant", self.references[0]))


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """A set: what its answers are, its file in the asset `question-sets`, and how a row is read.

    `parse_row` gives None for a row that cannot be scored.
    """

    kind: AnswerKind
    file: str
    parse_row: Callable[[Mapping[str, Any]], Question | None]


def load_questions(name: str) -> list[Question]:
    """The questions of a set, fetched if need be, in the order of the file; copies and what cannot be scored are left out.

    Raises:
        AssetError: it cannot be fetched.
        DataError: a row is not of the set's schema.
    """
    wanted = QUESTION_SETS[name]
    fetched = fetch("question-sets")
    return parse_questions(wanted, (fetched.path / wanted.file).read_text("utf-8").splitlines(), where=wanted.file)


def parse_questions(wanted: QuestionSet, lines: Iterable[str], *, where: str) -> list[Question]:
    """The same from lines of JSON. Raises: DataError."""
    return list({question.id: question for question in _parsed(wanted, lines, where)}.values())


def _parsed(wanted: QuestionSet, lines: Iterable[str], where: str) -> Iterator[Question]:
    for number, line in enumerate(lines, start=1):
        try:
            question = wanted.parse_row(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"this row has not the form of its question set: {type(error).__name__}: {error}",
                where=f"{where}, line {number}",
                hint="the file is not the one corral knows: `corral cache clear question-sets`",
            ) from None
        if question is not None:
            yield question


def load_worked_problems() -> list[Conversation]:
    """Word problems with the steps to their result, which follows `Answer:`, from the asset `gsm8k-examples`.

    Raises: AssetError.
    """
    import yaml

    value = cast("dict[str, Any]", yaml.safe_load(fetch("gsm8k-examples").files[0].read_text("utf-8")))
    return [parse_worked_problem(sample["question"], sample["target"]) for sample in value["fewshot_config"]["samples"]]


def parse_worked_problem(question: str, target: str) -> Conversation:
    """One of them, from a target that ends in `The answer is 6.`"""
    steps, _, result = target.rpartition("The answer is ")
    return Conversation.from_turns(
        ("user", question), ("assistant", f"{steps.strip()}\nAnswer: {result.strip().rstrip('.')}")
    )


def _asdiv(row: Mapping[str, Any]) -> Question | None:
    """ASDiv: passage, question, and an answer with its unit. Times, ratios, dates and names are not one number."""
    answer = row["answer"].strip()
    if not _ONE_NUMBER.fullmatch(answer):
        return None
    number = re.split(r"[^\d.,-]", answer, maxsplit=1)[0].replace(",", "").rstrip(".")
    return Question(f"{row['passage'].strip()} {row['question'].strip()}", number, (number,))


def _lettered(row: Mapping[str, Any]) -> Question | None:
    """CommonsenseQA and MMLU: options as lines `A. …`, and the right one as such a line."""
    lines = _OPTION.split(row["options"].strip())
    if row["answer"] not in lines:
        return None  # three rows of CommonsenseQA hold a line break within an option
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
"""By the name of their task. TruthfulQA lies in the package with its true answers only, so that there is no choice (mc1)."""
