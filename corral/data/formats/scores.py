"""Turns judgements into numbers from 0 (worst) to 1 (best): true and false, words for them, and numbers on a scale.

A number alone does not show its scale, so a source's first rows decide: 0 to 1, or -1 and 1. Any other scale must be stated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from corral.data.formats.fields import ContradictionError, FormatError, describe_type, short_repr
from corral.errors import DataError

SCORE_COLUMNS = ("label", "score", "kto_tag")
"""Columns that judge an answer."""
CONVERSATION_SCORE_COLUMNS = ("kto_tag", "label")
"""Columns that judge the last answer of a list of messages, if they hold true or false."""
_GOOD = ("true", "yes", "good", "thumbs up", "thumbsup", "up", "like", "positive", "desirable", "\U0001f44d")
_BAD = ("false", "no", "bad", "thumbs down", "thumbsdown", "down", "dislike", "negative", "undesirable", "\U0001f44e")
JUDGEMENT_WORDS = dict.fromkeys(_GOOD, True) | dict.fromkeys(_BAD, False)
"""Judgements in words, in lower case, with spaces for `_` and `-`."""

_HINT = "say which score is the worst and which the best: mapping = {{ score_range = [{}, {}] }}"


@dataclass(frozen=True, slots=True)
class Scale:
    """The scores of the worst and the best answer.

    Args:
        low: of the worst.
        high: of the best; smaller than `low` where less is better.
        stated: whether the recipe states it. Otherwise a score outside shows that the scale is another one.
    """

    low: float = 0.0
    high: float = 1.0
    stated: bool = False

    def normalise(self, value: Any, name: str) -> float:
        """A judgement as a number in [0, 1].

        Raises:
            ContradictionError: it is outside a scale that was inferred.
            FormatError: it is not a judgement, or outside a stated scale.
        """
        judged = parse_judgement(value, name)
        if isinstance(judged, bool):
            return float(judged)
        if min(self.low, self.high) <= judged <= max(self.low, self.high):
            return (judged - self.low) / (self.high - self.low)
        reason = f"{name} is outside {self.low:g} to {self.high:g}"
        if self.stated:
            raise FormatError(f"{reason}, the `score_range` of its mapping")
        raise ContradictionError(
            f"{reason}: give its range as `score_range` in a mapping", _HINT.format("WORST", "BEST")
        )


def parse_judgement(value: Any, name: str) -> float | bool:
    """A number, or true or false, also as text in a table's cell. Raises FormatError if the value is neither."""
    if isinstance(value, str):
        word = " ".join(value.strip().lower().replace("_", " ").replace("-", " ").split())
        if word in JUDGEMENT_WORDS:
            return JUDGEMENT_WORDS[word]
        value = _as_number(value, name)
    if isinstance(value, bool):
        return value
    if not isinstance(value, int | float):
        raise FormatError(f"{name} is {describe_type(value)}: expected a number, true or false")
    if isinstance(value, float) and not math.isfinite(value):
        raise FormatError(f"{name} is {describe_type(value)}, which is no score")
    return value


def _as_number(cell: str, name: str) -> float:
    try:
        if "_" in cell:  # only Python writes numbers so
            raise ValueError
        return float(cell)
    except ValueError:
        raise FormatError(f"{name} is text: expected a number, true or false") from None


def is_judgement(value: Any) -> bool:
    """Whether `parse_judgement` accepts the value."""
    try:
        parse_judgement(value, "")
    except FormatError:
        return False
    return True


def infer_scale(values: Iterable[Any], name: str, where: str, advice: str = "") -> tuple[Scale, str]:
    """(the scale of a source's scores, a note on it), inferred from its first rows.

    Args:
        values: the scores; values that are not judgements are ignored.
        name: of their column.
        where: the source, for errors.
        advice: added to the hint of the error.

    Raises DataError if the scale is ambiguous.
    """
    numbers = [parse_judgement(value, name) for value in values if is_judgement(value)]
    outside = [number for number in numbers if not 0 <= number <= 1]
    if not outside:
        return Scale(), ""
    if set(numbers) == {-1, 1}:
        return Scale(-1.0, 1.0), f"; `{name}` is -1 for the worst and 1 for the best"
    low, high = (short_repr(int(n) if n == int(n) else n) for n in (min(numbers), max(numbers)))
    raise DataError(
        f"`{name}` runs from {low} to {high} in the first rows, which do not show the worst and the best possible score",
        where=where,
        hint=_HINT.format(low, high) + advice,
    )
