"""Extracts the result of an answer from its text by rules: a number, a choice or a short text, in comparable form."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction

RESULT_MARKER = "Answer:"
"""Models are asked to write this before their result."""

# Markers of results: RESULT_MARKER, and those of GSM8K, MetaMathQA and MATH. The last one counts.
_MARKERS = re.compile(r"####|\b(?:final\s+)?answer\s*(?:is\b(?!\s+not\b)|:|=)(?:\s*:)?|\\boxed\s*(?=\{)", re.IGNORECASE)
# Letters of scripts with spaces between words: a digit right after one belongs to its word, as in "B12". In Chinese and
# Japanese, numbers follow letters directly.
_SPACED = r"A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u052f"
_WHOLE = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_NUMBER = re.compile(
    rf"(?<![\d._{_SPACED}])(?:[-−+]?(?:[$€£]\s?)?)"
    rf"(?:\d+\s\d+/\d+(?![\d.])|{_WHOLE}(?:\.\d+)?(?:\s?/\s?\d+(?![\d.]))?(?:[eE][-+]?\d{{1,2}}(?![\w.]))?)(?!\d)"
    rf"|(?<![\d._{_SPACED}])[-−+]?\.\d+"
)
_FRACTION = re.compile(r"(\d)?\\[dt]?frac\s*(?:\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)(\d))")
_LATEX = re.compile(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}|\\(?:left|right)\b|\\([%$])|\\[!,;: ]|(?<=\d)\{(,)\}")
_UNITS = re.compile(r"\s*(?:\^?\{?\\circ\b\}?|[°%])?\s*(?:[^\W\d_]+[\s.²³]*)*\.?")
_AND_ANOTHER = r"\s*(?:(?:and|or)\s+)?[A-Z]\b"
_LETTER = re.compile(
    r"[\s*_`\"'(\[]*\(?([A-Z])"
    rf"(?:[).:\]*]|\s*$|\s*\n|,(?!{_AND_ANOTHER})|(?=\s+[-–—])|(?=\s+(?:because|since|as|for)\b))"
)
_LONE = re.compile(r"[\s*_`\"'(\[]*([A-Za-z])[\s*_`\"')\].:]*")
_WORDS = re.compile(r"[^\W_]+")


def marked_text(text: str) -> str | None:
    """The text after the last result marker (`Answer:`, `####`, `the answer is`, `\\boxed{…}`), up to the end of its line.

    Returns: None if there is no marker, or nothing after it.
    """
    return _after_marker(text)[0]


def extract_number(text: str) -> str | None:
    """The number that an answer comes to: the first after the last marker, or the last of a text without a marker.

    Returns: its shortest decimal form, or a fraction p/q if it has none, without thousands separators, unit or currency, so
        that equal numbers are equal texts. None if there is no number, or a box holds more than a number.
    """
    marked, boxed = _after_marker(text)
    if marked is None:
        numbers = list(_NUMBER.finditer(_without_latex(text)))
        return _canonical(numbers[-1].group()) if numbers else None
    marked = _without_latex(marked)
    # In "3 + 4 = 7" the result is after the last equals sign; in "7 (= 3 + 4)" it is not.
    outside = re.sub(r"\([^()]*\)", "", marked)
    if "=" in outside and (number := _NUMBER.search(outside, outside.rindex("="))):
        marked = outside[number.start() :]
    if not (number := _NUMBER.search(marked)):
        return None
    if boxed and (marked[: number.start()].strip() or not _UNITS.fullmatch(marked[number.end() :])):
        return None
    return _canonical(number.group())


def extract_choice(text: str, options: Sequence[str] = ()) -> str | None:
    """The letter of the option that an answer names: after the last marker, at its beginning, or by the option's own text.

    Args:
        text: the answer.
        options: the options' texts, in the order of their letters; without them any letter is accepted.

    Returns: a capital letter, or None if the answer names no option or several.
    """
    last = chr(ord("A") + len(options) - 1) if options else "Z"
    marked, _ = _after_marker(text)
    marked = None if marked is None else _without_latex(marked)
    if marked is not None and (letter := _LONE.fullmatch(marked)) and letter[1].upper() <= last:
        return letter[1].upper()
    parts = [part for part in (marked, text) if part is not None]
    for part in parts:
        if (letter := _LETTER.match(part)) and letter[1] <= last:
            return letter[1]
    keys = [_words_of(option) for option in options]
    for part in parts:
        words = f" {_words_of(part)} "
        named = [i for i, key in enumerate(keys) if key and f" {key} " in words]
        # Of "light blue" and "blue" within it, the longer one is meant.
        longest = [i for i in named if not any(i != j and keys[i] in keys[j] for j in named)]
        if len(longest) == 1:
            return chr(ord("A") + longest[0])
    return None


def extract_result(text: str) -> str | None:
    """The result of an answer to a question of unknown kind: a choice's letter, else a number, else the text after the marker
    (without spaces if it is boxed, else its words). None if there is none of these."""
    if result := extract_choice(text) or extract_number(text):
        return result
    marked, boxed = _after_marker(text)
    if marked is None:
        return None
    return (re.sub(r"\s+", "", _without_latex(marked)).casefold() if boxed else _words_of(marked)) or None


def _after_marker(text: str) -> tuple[str | None, bool]:
    """(the text after the last marker, whether it is boxed)."""
    for marker in reversed(list(_MARKERS.finditer(text))):
        rest = text[marker.end() :]
        boxed = rest.startswith("{")
        marked = _braced(rest) if boxed else next((line for line in rest.splitlines() if line.strip(" *_`")), "")
        if marked := marked.strip().strip("*_`").strip():
            return marked, boxed
    return None, False


def _without_latex(text: str) -> str:
    """Replace LaTeX around numbers: `\\frac{1}{2}` by 1/2, `\\text{cm}` by cm."""
    text = _FRACTION.sub(lambda m: f"{m[1] + ' ' if m[1] else ''}{m[2] or m[4]}/{m[3] or m[5]}", text)
    return _LATEX.sub(lambda m: m[1] or m[2] or m[3] or "", text)


def _canonical(number: str) -> str | None:
    whole, _, part = number.strip().rpartition(" ") if re.search(r"\d\s\d", number) else ("", "", number)
    try:
        value = _fraction(part)
        if whole:
            value = _fraction(whole) + (-value if whole.startswith(("-", "−")) else value)
    except (ValueError, ZeroDivisionError):
        return None
    if value.denominator == 1:
        return str(value.numerator)
    rest, decimals = value.denominator, 0
    for prime in (2, 5):
        power = 0
        while rest % prime == 0:
            rest //= prime
            power += 1
        decimals = max(decimals, power)
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    digits = str(abs(value * 10**decimals)).zfill(decimals + 1)
    return f"{'-' if value < 0 else ''}{digits[:-decimals]}.{digits[-decimals:]}"


def _fraction(text: str) -> Fraction:
    return Fraction(re.sub(r"[\s,$€£+]", "", text).replace("−", "-"))


def _braced(text: str) -> str:
    """The content of the braces that a text begins with."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[1:i]
    return text[1:]


def _words_of(text: str) -> str:
    """The words of a text, normalised for comparison."""
    return " ".join(_WORDS.findall(unicodedata.normalize("NFKC", text).casefold()))
