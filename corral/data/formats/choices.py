"""Multiple choice → a question with lettered options, answered with the letter and the text of the right one.

Does not know how such answers are scored.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any, cast

from corral.data.formats.fields import FormatError, find, kind, listed, short, text, text_at
from corral.data.formats.plain import asked
from corral.messages import Conversation

CHOICES = ("choices", "options")
ANSWER = ("answer", "answerKey", "answer_key", "answer_index", "label")
FIRST_COLUMNS = ("A", "option_a", "option_A", "choice_a", "choice_A")
"""The first of the columns, one for each option."""

_LETTERS = string.ascii_uppercase


def multiple_choice(row: Mapping[str, Any]) -> Conversation:
    """A question with options.

    Options are a list of texts (MMLU), an object of `label` and `text` lists (CommonsenseQA, ARC), a list of such objects,
    an object of label to text, or columns `A`, `B` …. The answer is a place from 0, a label, or the text of an option.

    Raises:
        FormatError: otherwise; fewer than 2 options; or the answer is none of them.
    """
    question = text_at(row, "question")
    labels, options = _options(row)
    if len(options) < 2:
        raise FormatError("fewer than 2 options")
    if len(options) > len(_LETTERS):
        raise FormatError(f"more than {len(_LETTERS)} options")
    right = _place(*find(row, ANSWER), labels, options)
    lines = "\n".join(f"{letter}. {option}" for letter, option in zip(_LETTERS, options, strict=False))
    return asked(row, f"{question}\n\n{lines}", f"{_LETTERS[right]}. {options[right]}")


def _options(row: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(labels, texts) of the options."""
    if not any(name in row for name in CHOICES):
        for first in FIRST_COLUMNS:
            if first in row:
                return _from_columns(row, first)
    name, value = find(row, CHOICES)
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        if isinstance(fields.get("text"), list):
            texts = cast("list[Any]", fields["text"])
            labels = fields.get("label")
            given = cast("list[Any]", labels) if isinstance(labels, list) else [_letter(i) for i in range(len(texts))]
            return _checked(name, given, texts)
        return _checked(name, list(fields), list(fields.values()))
    if not isinstance(value, list):
        raise FormatError(f"{name} is {kind(value)}: expected a list, or an object of labels and texts")
    items = cast("list[Any]", value)
    if items and all(isinstance(item, dict) for item in items):
        objects = cast("list[dict[str, Any]]", items)
        labels = [o.get("label", _letter(i)) for i, o in enumerate(objects)]
        return _checked(name, labels, [o.get("text") for o in objects])
    return _checked(name, [_letter(i) for i in range(len(items))], items)


def _letter(place: int) -> str:
    return _LETTERS[place] if place < len(_LETTERS) else str(place + 1)


def _from_columns(row: Mapping[str, Any], first: str) -> tuple[list[str], list[str]]:
    stem, lower = first[:-1], first[-1].islower()
    names = [stem + (letter.lower() if lower else letter) for letter in _LETTERS]
    found = [(name, row[name]) for name in names if row.get(name) is not None]
    return [name[-1].upper() for name, _ in found], [text(value, name) for name, value in found]


def _checked(name: str, labels: list[Any], options: list[Any]) -> tuple[list[str], list[str]]:
    if len(options) > len(_LETTERS):
        raise FormatError(f"more than {len(_LETTERS)} options")
    if len(labels) != len(options):
        raise FormatError(f"{name} has {len(labels)} labels and {len(options)} texts")
    texts = [text(option, f"{name}[{i}]") for i, option in enumerate(options)]
    return [text(label, f"a label in {name}") for label in labels], texts


def _place(name: str, answer: Any, labels: list[str], options: list[str]) -> int:
    """Where the right option stands, from 0."""
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)  # A table's column of whole numbers with a gap in it is read so.
    if isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(options):
            raise FormatError(f"{name} is outside the {len(options)} options, counted from 0")
        return answer
    given = text(answer, name).strip()
    for known in (labels, [option.strip() for option in options]):
        if given in known:
            return known.index(given)
    if given.upper() in labels:
        return labels.index(given.upper())
    if given.isdecimal() and given.isascii() and len(given) < 3 and int(given) < len(options):
        return int(given)
    raise FormatError(f"{name} is {short(given)}: expected one of the options or their labels, {listed(labels)}")
