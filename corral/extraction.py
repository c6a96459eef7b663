"""The result of an answer, out of its text: a number, a choice, or a short text, in a form in which equal results are equal.

Pure, and by rules that can be read here. It does not know what the question was, nor whether the result is right.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction

MARKER = "Answer:"
"""What a model is asked to write before its result."""

# What is said before a result: by MARKER, in GSM8K, in MetaMathQA and MATH. The last one counts.
_MARKERS = re.compile(r"####|\b(?:final\s+)?answer\s*(?:is|:|=)(?:\s*:)?|\\boxed\s*(?=\{)", re.IGNORECASE)
_NUMBER = re.compile(
    r"(?<![\w.])[-−+]?[$€£]?\s?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s?/\s?\d+(?![\d.]))?(?!\d)"
    r"|(?<![\w.])[-−+]?\.\d+"
)
_LETTER = re.compile(r"[\s*_`\"'(\[]*\(?([A-Z])(?:[).:\]*]|\s*$|\s*\n|(?=\s+[-–—]))")
_WORDS = re.compile(r"[^\W_]+")


def final(text: str) -> str | None:
    """What follows the last marker of a result (`Answer:`, `####`, `the answer is`, `\\boxed{…}`), up to the end of its line.

    Returns: None where there is no marker, or nothing after it.
    """
    found = list(_MARKERS.finditer(text))
    for marker in reversed(found):
        rest = text[marker.end() :]
        if rest.startswith("{"):
            said = _braced(rest)
        else:
            lines = [line for line in rest.splitlines() if line.strip(" *_`")]
            said = lines[0] if lines else ""
        if said := said.strip().strip("*_`").strip():
            return said
    return None


def number(text: str) -> str | None:
    """The number that an answer comes to: the first one after the last marker, or without a marker the last of the text.

    Returns: its shortest decimal form, or a fraction p/q where it has none; without sign of thousands, unit or currency, so
        that equal numbers are equal texts. None where there is no number.
    """
    said = final(text)
    within = list(_NUMBER.finditer(said if said is not None else text))
    if not within:
        return None
    # "3 + 4 = 7" after a marker: what stands after the sign of equality is the result.
    at = 0 if said is not None else -1
    if said is not None and "=" in said:
        after = [found for found in within if found.start() > said.rindex("=")]
        within = after or within
    return _canonical(within[at].group())


def choice(text: str, options: Sequence[str] = ()) -> str | None:
    """The letter of the option that an answer names: after the last marker, at its beginning, or by the option's own text.

    Args:
        text: the answer.
        options: the options' texts, in the order of their letters; without them any letter is taken.

    Returns: a capital letter, or None where the answer names none, or several.
    """
    last = chr(ord("A") + len(options) - 1) if options else "Z"
    for part in (final(text), text):
        if part is not None and (found := _LETTER.match(part)) and found[1] <= last:
            return found[1]
    for part in (final(text), text):
        if part is not None and options:
            words = _key(part)
            named = [i for i, option in enumerate(options) if _key(option) and f" {_key(option)} " in f" {words} "]
            # "blue" within "light blue": the longer one is meant.
            longest = [i for i in named if not any(i != j and _key(options[i]) in _key(options[j]) for j in named)]
            if len(longest) == 1:
                return chr(ord("A") + longest[0])
    return None


def result(text: str) -> str | None:
    """What an answer comes to, where the kind of question is not known: a choice's letter, else a number, else the short text
    after the marker. None where there is nothing of the kind."""
    said = final(text)
    if letter := choice(said if said is not None else text):
        return letter
    return number(text) or (_key(said) or None if said is not None else None)


def _canonical(found: str) -> str | None:
    digits = re.sub(r"[\s,$€£+]", "", found).replace("−", "-")
    try:
        value = Fraction(digits)
    except (ValueError, ZeroDivisionError):
        return None
    if value.denominator == 1:
        return str(value.numerator)
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    places = next(n for n in range(1, 400) if (value * 10**n).denominator == 1)
    whole = str(abs(value * 10**places)).zfill(places + 1)
    return f"{'-' if value < 0 else ''}{whole[:-places]}.{whole[-places:]}"


def _braced(text: str) -> str:
    """What is in the braces that a text begins with."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[1:i]
    return text[1:]


def _key(text: str) -> str:
    """The words of a text, for comparing."""
    return " ".join(_WORDS.findall(unicodedata.normalize("NFKC", text).casefold()))
