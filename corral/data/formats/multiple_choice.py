"""Reads multiple-choice rows: a question with lettered options, answered with the letter and text of the right one.

A number as the answer does not show whether options are counted from 0 or from 1, so a source's first rows decide.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from corral.data.formats.context_columns import check_context_columns, context_text
from corral.data.formats.fields import (
    ContradictionError,
    FormatError,
    column_text,
    describe_type,
    find_column,
    nonblank_text,
    quote_names,
    short_repr,
)
from corral.data.formats.prompt_response import single_turn
from corral.errors import DataError
from corral.messages import Conversation, with_input

CHOICES_COLUMNS = ("choices", "options")
ANSWER_COLUMNS = ("answer", "answerKey", "answer_key", "answer_index", "label")
FIRST_OPTION_COLUMNS = ("A", "option_a", "option_A", "choice_a", "choice_A")
"""Names of the first column where options are in columns, one for each option."""

_LETTERS = string.ascii_uppercase
_LETTERS_INSTEAD = "write the right option's letter, or its text, as the answer"


@dataclass(frozen=True, slots=True)
class AnswerNumbering:
    """What the numbers in a source's answers mean.

    Args:
        first_number: the number of the first option.
        confirmed: whether rows have shown it. Otherwise a later row may contradict it.
        are_positions: whether a number that is also an option's text is a position (True), that text (False), or unknown.
    """

    first_number: int = 0
    confirmed: bool = True
    are_positions: bool | None = None


@check_context_columns
def multiple_choice(row: Mapping[str, Any], numbering: AnswerNumbering | None = None) -> Conversation:
    """A question with options.

    Options are a list of texts (MMLU), an object of `label` and `text` lists (CommonsenseQA, ARC), a list of such objects,
    an object of label to text, or columns `A`, `B` …. A passage in
    `context` follows them. The answer is a place, a label, or the text of an option.

    Args:
        row: the row.
        numbering: what a number means; by default a position from 0.

    Raises:
        ContradictionError: the answer contradicts the numbering, or has two meanings.
        FormatError: the row has another form, fewer than 2 options, or an answer that is none of them.
    """
    question = column_text(row, "question")
    labels, options = _options(row)
    if len(options) < 2:
        raise FormatError("fewer than 2 options")
    if len(options) > len(_LETTERS):
        raise FormatError(f"more than {len(_LETTERS)} options")
    right = _find_answer(*find_column(row, ANSWER_COLUMNS), labels, options, numbering or AnswerNumbering())
    lines = "\n".join(f"{letter}. {option}" for letter, option in zip(_LETTERS, options, strict=False))
    request = with_input(f"{question}\n\n{lines}", context_text(row))
    return single_turn(row, request, f"{_LETTERS[right]}. {options[right]}")


def _options(row: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(labels, texts) of the options."""
    if not any(name in row for name in CHOICES_COLUMNS):
        for first in FIRST_OPTION_COLUMNS:
            if first in row:
                return _from_columns(row, first)
    name, value = find_column(row, CHOICES_COLUMNS)
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        if isinstance(fields.get("text"), list):
            texts = cast("list[Any]", fields["text"])
            labels = fields.get("label")
            given = cast("list[Any]", labels) if isinstance(labels, list) else [_letter(i) for i in range(len(texts))]
            return _checked(name, given, texts)
        return _checked(name, list(fields), list(fields.values()))
    if not isinstance(value, list):
        raise FormatError(f"{name} is {describe_type(value)}: expected a list, or an object of labels and texts")
    items = cast("list[Any]", value)
    if items and all(isinstance(item, dict) for item in items):
        objects = cast("list[dict[str, Any]]", items)
        labels = [o.get("label", _letter(i)) for i, o in enumerate(objects)]
        return _checked(name, labels, [o.get("text") for o in objects])
    return _checked(name, [_letter(i) for i in range(len(items))], items)


def _letter(index: int) -> str:
    return _LETTERS[index] if index < len(_LETTERS) else str(index + 1)


def _from_columns(row: Mapping[str, Any], first: str) -> tuple[list[str], list[str]]:
    stem, lower = first[:-1], first[-1].islower()
    names = [stem + (letter.lower() if lower else letter) for letter in _LETTERS]
    given = [(name, row[name]) for name in names if row.get(name) is not None]
    return [name[-1].upper() for name, _ in given], [nonblank_text(value, name) for name, value in given]


def _checked(name: str, labels: list[Any], options: list[Any]) -> tuple[list[str], list[str]]:
    if len(options) > len(_LETTERS):
        raise FormatError(f"more than {len(_LETTERS)} options")
    if len(labels) != len(options):
        raise FormatError(f"{name} has {len(labels)} labels and {len(options)} texts")
    texts = [nonblank_text(option, f"{name}[{i}]") for i, option in enumerate(options)]
    return [nonblank_text(label, f"a label in {name}") for label in labels], texts


def infer_numbering(rows: Iterable[Mapping[str, Any]], where: str) -> tuple[AnswerNumbering, str]:
    """(what the numbers in a source's answers mean, a note on it), inferred from its first rows.

    Raises DataError if options are counted from 0 in some rows and from 1 in others.
    """
    from_0 = from_1 = numbers = only_position = only_text = False
    for row in rows:
        try:
            (labels, options), (_, answer) = _options(row), find_column(row, ANSWER_COLUMNS)
        except FormatError:
            continue
        number = _number(answer)
        if number is None or str(number) in labels:
            continue
        is_text, is_position = str(number) in _stripped(options), 0 <= number <= len(options)
        only_text |= is_text and not is_position
        only_position |= is_position and not is_text
        numbers = True
        from_0 |= number == 0
        from_1 |= number == len(options)
    are_positions = only_position if only_position != only_text else None
    if are_positions is False or not numbers:
        return AnswerNumbering(are_positions=are_positions), ""
    if from_0 and from_1:
        raise DataError(
            "the answers hold both 0 and the number of options: are these counted from 0 or from 1?",
            where=where,
            hint=_LETTERS_INSTEAD,
        )
    first = 1 if from_1 else 0
    return AnswerNumbering(first, from_0 or from_1, are_positions), f"; answers are counted from {first}"


def _number(answer: Any) -> int | None:
    if isinstance(answer, float) and answer.is_integer():
        return int(answer)  # A table's column of integers with a gap in it is read as floats.
    if isinstance(answer, str) and (digits := answer.strip()).isdecimal() and digits.isascii() and len(digits) < 10:
        return int(digits)
    return answer if isinstance(answer, int) and not isinstance(answer, bool) and abs(answer) < 10**9 else None


def _stripped(options: list[str]) -> list[str]:
    return [option.strip() for option in options]


def _find_answer(name: str, answer: Any, labels: list[str], options: list[str], numbering: AnswerNumbering) -> int:
    """The index of the right option, from 0."""
    number = _number(answer)
    if number is None and isinstance(answer, int | float) and not isinstance(answer, bool) and answer == answer:
        raise FormatError(f"{name} is outside the {len(options)} options, counted from {numbering.first_number}")
    given = nonblank_text(answer, name).strip() if number is None or isinstance(answer, str) else str(number)
    for label in (given, given.upper()):
        if label in labels:
            return labels.index(label)
    texts = _stripped(options)
    by_text = texts.index(given) if given in texts else None
    by_position = (
        number - numbering.first_number if number is not None and numbering.are_positions is not False else None
    )
    if by_position is None or (by_text is not None and not 0 <= by_position < len(options)):
        if by_text is None:
            raise FormatError(
                f"{name} is {short_repr(given)}: expected one of the options or their labels, {quote_names(labels)}"
            )
        return by_text
    if not 0 <= by_position < len(options):
        reason = f"{name} is outside the {len(options)} options, counted from {numbering.first_number}"
        if by_position == (len(options) if numbering.first_number == 0 else -1) and (
            numbering.first_number or not numbering.confirmed
        ):
            raise ContradictionError(f"{reason}, as the first rows seemed to be", _LETTERS_INSTEAD)
        raise FormatError(reason)
    if by_text is not None and by_text != by_position and numbering.are_positions is None:
        raise ContradictionError(f"{name} is the text of one option and the number of another", _LETTERS_INSTEAD)
    return by_position
