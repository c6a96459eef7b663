"""No text keeps a pattern busy for longer than its length explains: steps are counted, not seconds."""

from __future__ import annotations

import inspect
import random
import re
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from corral.answering import answerer, consensus
from corral.metrics import answer_extraction, bleu, rouge
from tests.metrics.regex_steps import Matcher, TooManyStepsError

MODULES = (answer_extraction, rouge, bleu, consensus, answerer)
AT_ONE_PLACE = {"_UNITS", "_FIRST_LINE", "_LETTER", "_LABEL", "_LONE"}
"""Patterns that are tried at one position only."""
PIECES = (
    *("a", "7", " ", "\n", "!", ".", ",", "/", "-", "(", ")", "{", "}", "*", "=", ":", "A", "é", "°", "²", "$", "\\"),
    *("12 3/4", "1,234", "e5", "answer", " is", " not", "final ", "\\boxed{", "\\frac{1}{", "\\text{", "####", "and "),
)


def patterns() -> Iterator[tuple[ModuleType, str, re.Pattern[str]]]:
    for module in MODULES:
        for name, value in vars(module).items():
            if isinstance(value, re.Pattern):
                yield module, name, value


NAMES = [name for _, name, _ in patterns()]


def steps(name: str, matcher: Matcher, text: str) -> int:
    try:
        if name in AT_ONE_PLACE:
            matcher.full_match(text)
        else:
            matcher.find_all(text)
    except TooManyStepsError:
        pytest.fail(f"{name} never ends on {text!r}")
    return matcher.steps


def texts(rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """(beginning, repeated part, end)"""
    for pump in PIECES:
        for end in ("!", "", "}"):
            yield rng.choice(("", "7 ", "A", "answer", "\\frac{1}{", "\\boxed{")), pump, end
    for _ in range(60):
        beginning, pump, end = ("".join(rng.choices(PIECES, k=rng.randint(least, 3))) for least in (0, 1, 0))
        yield beginning, pump, end


@pytest.mark.parametrize("name", NAMES)
def test_twice_the_text_takes_about_twice_the_steps(name: str) -> None:
    sys.setrecursionlimit(20_000)
    (pattern,) = [pattern for _, each, pattern in patterns() if each == name]
    matcher = Matcher(pattern)
    for beginning, pump, end in texts(random.Random(name)):
        once, twice = (steps(name, matcher, beginning + pump * n + end) for n in (20, 40))
        assert twice <= 2.3 * once + 20, (beginning, pump, end)


def test_the_counter_matches_as_python_does_and_sees_what_is_not_linear() -> None:
    rng = random.Random(0)
    for _, _, pattern in patterns():
        matcher = Matcher(pattern)
        for _ in range(40):
            text = "".join(rng.choices(PIECES, k=12))
            assert matcher.find_all(text) == [match.span() for match in pattern.finditer(text)], (pattern, text)
            assert matcher.full_match(text) == bool(pattern.fullmatch(text)), (pattern, text)
    quadratic = Matcher(re.compile(r"\s*\s*!"))
    once, twice = (steps("_UNITS", quadratic, " " * n) for n in (20, 40))
    assert twice > 3 * once
    with pytest.raises(TooManyStepsError):
        Matcher(re.compile(r"(?:[a-z]+[\s.]*)*")).full_match("a" * 30 + "!")


def test_every_pattern_is_known_here_and_used_as_it_is_tested() -> None:
    assert len(NAMES) == len(set(NAMES)) == 14
    for module, name, _ in patterns():
        used = set(re.findall(rf"\b{name}\.(\w+)\(", inspect.getsource(module)))
        assert name not in AT_ONE_PLACE or used <= {"match", "fullmatch"}, name
    for module in MODULES:
        calls = re.findall(r"\bre\.(\w+)\(", inspect.getsource(module))
        assert set(calls) <= {"compile"}, f"{module.__name__}: a pattern without a name is not tested"
