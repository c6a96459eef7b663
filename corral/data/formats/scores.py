"""A judgement → a number from 0 (worst) to 1 (best): true and false, words for them, and numbers on a scale.

A number alone does not say on which scale it is, so a source's first rows decide: 0 to 1, or -1 and 1; any other scale must
be stated. This module does not know what is judged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from corral.data.formats.fields import ContradictionError, FormatError, describe_type, short_repr
from corral.errors import DataError

_GOOD = ("true", "yes", "good", "thumbs up", "thumbsup", "up", "like", "positive", "desirable", "\U0001f44d")
_BAD = ("false", "no", "bad", "thumbs down", "thumbsdown", "down", "dislike", "negative", "undesirable", "\U0001f44e")
JUDGEMENT_WORDS = dict.fromkeys(_GOOD, True) | dict.fromkeys(_BAD, False)
"""What a judgement in words may be, in lower case, with spaces for `_` and `-`."""

_HINT = "say which score is the worst and which the best: mapping = {{ score_range = [{}, {}] }}"


@dataclass(frozen=True, slots=True)
class Scale:
    """The scores of the worst and the best answer.

    Args:
        low: of the worst.
        high: of the best; smaller than `low` where less is better.
        stated: whether the recipe says so. Else a score outside shows that the scale is another one.
    """

    low: float = 0.0
    high: float = 1.0
    stated: bool = False

    def normalise(self, value: Any, name: str) -> float:
        """A judgement as a number in [0, 1].

        Raises:
            ContradictionError: it is outside a scale that nobody stated.
            FormatError: it is none, or outside.
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
    """A number, or true or false, also as a table's cell holds them. Raises: FormatError (it is neither)."""
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
        if "_" in cell:  # Python's own way to write a number
            raise ValueError
        return float(cell)
    except ValueError:
        raise FormatError(f"{name} is text: expected a number, true or false") from None


def is_judgement(value: Any) -> bool:
    """Whether a value is one."""
    try:
        parse_judgement(value, "")
    except FormatError:
        return False
    return True


def infer_scale(values: Iterable[Any], name: str, where: str, otherwise: str = "") -> tuple[Scale, str]:
    """(the scale of a source's scores, what to say of it), told from those of its first rows.

    Args:
        values: the scores, with what is none among them.
        name: of their column.
        where: the source, for errors.
        otherwise: another way out, for the hint.

    Raises:
        DataError: the scale cannot be told.
    """
    numbers = [parse_judgement(value, name) for value in values if is_judgement(value)]
    outside = [number for number in numbers if not 0 <= number <= 1]
    if not outside:
        return Scale(), ""
    if set(numbers) == {-1, 1}:
        return Scale(-1.0, 1.0), f"; `{name}` is -1 for the worst and 1 for the best"
    low, high = (short_repr(int(n) if n == int(n) else n) for n in (min(numbers), max(numbers)))
    raise DataError(
        f"`{name}` runs from {low} to {high} in the first rows: which is the worst score, and which the best, "
        "they do not say",
        where=where,
        hint=_HINT.format(low, high) + otherwise,
    )
