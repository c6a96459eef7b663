"""A matcher for Python's patterns that counts its steps, as `re` backtracks but cannot say how often."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

parser: Any = getattr(re, "_parser")  # noqa: B009 (Python's own parser of patterns; typeshed has no name for it)

MOST_STEPS = 200_000


class TooManyStepsError(Exception):
    """A pattern took more than `MOST_STEPS`."""


class Matcher:
    """Matches one pattern as `re` does: greedy, left to right, with backtracking. A part it does not know raises KeyError.

    Attributes:
        steps: how often a part of the pattern was tried at a position.
    """

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self._tree = parser.parse(pattern.pattern, pattern.flags)
        self._flags = pattern.flags & ~re.UNICODE
        self._single: dict[tuple[str, str], bool] = {}
        self.text = ""
        self.steps = 0

    def find_all(self, text: str) -> list[tuple[int, int]]:
        """The spans of `finditer`."""
        self.text, self.steps = text, 0
        spans: list[tuple[int, int]] = []
        position = 0
        while position <= len(text):
            end = next(self._sequence(self._tree, 0, position), None)
            if end is not None:
                spans.append((position, end))
            position = max(position + 1, end or 0)
        return spans

    def full_match(self, text: str) -> bool:
        """Whether `fullmatch` succeeds."""
        self.text, self.steps = text, 0
        return any(end == len(text) for end in self._sequence(self._tree, 0, 0))

    def _sequence(self, parts: Any, index: int, position: int) -> Iterator[int]:
        if index == len(parts):
            yield position
            return
        for end in self._part(parts[index], position):
            yield from self._sequence(parts, index + 1, end)

    def _part(self, part: Any, at: int) -> Iterator[int]:
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise TooManyStepsError
        name, argument = str(part[0]), part[1]
        match name:
            case "LITERAL" | "NOT_LITERAL" | "IN" | "ANY":
                if at < len(self.text) and self._accepts(part, self.text[at]):
                    yield at + 1
            case "SUBPATTERN":
                yield from self._sequence(argument[3], 0, at)
            case "BRANCH":
                for branch in argument[1]:
                    yield from self._sequence(branch, 0, at)
            case "MAX_REPEAT":
                yield from self._repeat(argument, at, 0)
            case "POSSESSIVE_REPEAT":
                yield from [end for end in [next(self._repeat(argument, at, 0), None)] if end is not None]
            case "ASSERT" | "ASSERT_NOT":
                direction, inner = argument
                start = at if direction > 0 else at - inner.getwidth()[0]
                holds = start >= 0 and next(self._sequence(inner, 0, start), None) is not None
                if holds == (name == "ASSERT"):
                    yield at
            case "AT":
                pattern = {"AT_BOUNDARY": r"\b", "AT_END": r"$", "AT_END_STRING": r"\Z"}[str(argument)]
                if re.compile(pattern).match(self.text, at):
                    yield at
            case _:
                raise KeyError(name)

    def _repeat(self, argument: Any, at: int, count: int) -> Iterator[int]:
        least, most, inner = argument
        if count < most:
            for end in self._sequence(inner, 0, at):
                if end > at:
                    yield from self._repeat(argument, end, count + 1)
        if count >= least:
            yield at

    def _accepts(self, part: Any, character: str) -> bool:
        key = (repr(part), character)
        if key not in self._single:
            tree = parser.SubPattern(self._tree.state, [part])
            compiler: Any = getattr(re, "_compiler")  # noqa: B009
            self._single[key] = compiler.compile(tree, self._flags).match(character) is not None
        return self._single[key]
