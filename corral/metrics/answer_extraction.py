"""Extracts the result of an answer from its text by rules: a number, a choice or a short text, in comparable form.

Texts come from models and users, so the work is linear in the text's length: no two parts of a pattern that follow each other
can match the same characters, or the first is possessive. Markers and numbers are looked for in the last 16,384 characters:
Python runs no other thread during a search. math-verify knows more mathematics and was not taken: 2,000 open
brackets keep it for half a minute, its limits of time are signals (main thread only), and it reads no numbers between Chinese
characters and no choices.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from string import ascii_uppercase

from corral.metrics.rouge import unicode_words

_READ_CHARACTERS = 2**14  # from the end: a search holds Python's lock, up to a second in a text of a million characters

RESULT_MARKER = "Answer:"
"""Models are asked to write this before their result."""

# Markers of results: RESULT_MARKER, and those of GSM8K, MetaMathQA and MATH. The last one counts.
_MARKERS = re.compile(
    r"####|\b(?:final\s+)?answer\s*(?:is\b(?!\s+not\b)|:|=)(?:\s*:)?|\b(?:option|choice)\s+is\b(?!\s+not\b)|\\boxed\s*(?=\{)",
    re.IGNORECASE,
)
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
_UNITS = re.compile(r"\s*+(?:\^?\{?\\circ\b\}?|[°%])?(?:[^\W\d_]|[\s.])*")
_IN_PARENTHESES = re.compile(r"\([^()]*\)")
_MIXED_NUMBER = re.compile(r"\d\s\d")
_FIRST_LINE = re.compile(r"[\s*_`]*+([^\r\n\v\f\x1c-\x1e\x85\u2028\u2029]*)")
_BRACES = re.compile(r"[{}]")
_NOT_NUMERIC = re.compile(r"[\s,$€£+]")
_SPACES = re.compile(r"\s+")

_LAST_LETTER = "H"  # where the options are not known: "X: so 12" names none
_BEFORE_LETTER = r"[\s*_`\"'(\[]*+(?:(?:[Tt]he\s+)?(?:[Oo]ption|[Cc]hoice)\b[\s*_`\"'(\[:]*+)?+"
_AND_ANOTHER = r"\s*(?:(?:and|or)\s+)?[A-Z]\b"
# "B)", "B.", "**B**", "B" alone, "B because …", "B – text"; not "A.M.", "A*2" or "A - 3 = 5".
_LETTER = re.compile(
    rf"{_BEFORE_LETTER}([A-Z])"
    r"(?:[)\]]|\.(?![A-Za-z])|\*(?![\w(]|\s*\d)|[^\S\n]*+(?:\n|\Z)|(?=,?\s+(?:because|since|as|for)\b)"
    r"|(?=\s+(?:[–—]|-(?!(?:[^\n=A-Za-z]|\b[A-Za-z]\b)*=))))"
)
# "B: text" and "B, text" may as well be the name of a speaker ("A: There are 15 trees"), or of a quantity.
_LABEL = re.compile(rf"{_BEFORE_LETTER}([A-Z])(?::|,(?!{_AND_ANOTHER}))")
_LONE = re.compile(rf"{_BEFORE_LETTER}([A-Za-z])[\s*_`\"')\].:]*")


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
        numbers = list(_NUMBER.finditer(_without_latex(text[-_READ_CHARACTERS:])))
        return _canonical(numbers[-1].group()) if numbers else None
    marked = _without_latex(marked)
    # In "3 + 4 = 7" the result is after the last equals sign; in "7 (= 3 + 4)" it is not.
    outside = _IN_PARENTHESES.sub("", marked)
    if "=" in outside and (number := _NUMBER.search(outside, outside.rindex("="))):
        marked = outside[number.start() :]
    if not (number := _NUMBER.search(marked)):
        return None
    if boxed and (marked[: number.start()].strip() or not _UNITS.fullmatch(marked[number.end() :])):
        return None
    return _canonical(number.group())


def extract_choice(text: str, options: Sequence[str]) -> str | None:
    """The letter of the option that an answer names: after the last marker, at its beginning, or by the option's own text.

    Args:
        text: the answer.
        options: the options' texts, in the order of their letters.

    Returns: a capital letter, or None if the answer names no option or several.
    """
    last = ascii_uppercase[len(options) - 1]
    marked = _after_marker(text)[0]
    if marked is not None:
        marked = _without_latex(marked)
        if choice := _marked_letter(marked, last) or _named_option(marked, options):
            return choice
    if choice := _first_letter(_LETTER, text, last):
        return choice
    label = _LABEL.match(text)
    if label and (choice := _marked_letter(text[label.end() :], last)):
        return choice
    return _named_option(text, options) or _first_letter(_LABEL, text, last)


def extract_result(text: str) -> str | None:
    """The result of an answer to a question of unknown kind, for votes.

    After a marker: a choice's letter, else a number, else the words (boxed: the symbols). Without one: a letter at the
    beginning, else the last number. A letter that may be something else ("A: There are …") counts if there is nothing better.
    """
    first = _first_letter(_LETTER, text, _LAST_LETTER)
    marked, boxed = _after_marker(text)
    if marked is None:
        return first or extract_number(text) or _first_letter(_LABEL, text, _LAST_LETTER)
    plain = _without_latex(marked)
    if result := _marked_letter(plain, _LAST_LETTER) or extract_number(text) or first:
        return result
    return (_SPACES.sub("", plain).casefold() if boxed else _words_of(marked)) or None


def _marked_letter(text: str, last: str) -> str | None:
    """The letter that a text consists of or begins with, where a result is expected."""
    lone = _LONE.fullmatch(text)
    if lone and lone[1].upper() <= last:
        return lone[1].upper()
    return _first_letter(_LETTER, text, last) or _first_letter(_LABEL, text, last)


def _first_letter(form: re.Pattern[str], text: str, last: str) -> str | None:
    letter = form.match(text)
    return letter[1] if letter and letter[1] <= last else None


def _named_option(text: str, options: Sequence[str]) -> str | None:
    """The letter of the one option whose text is in a text; of "light blue" and "blue" within it, the longer one is meant."""
    keys = [_words_of(option) for option in options]
    words = f" {_words_of(text)} "
    named = [i for i, key in enumerate(keys) if key and f" {key} " in words]
    longest = [i for i in named if not any(i != j and keys[i] in keys[j] for j in named)]
    return ascii_uppercase[longest[0]] if len(longest) == 1 else None


def _after_marker(text: str) -> tuple[str | None, bool]:
    """(the text after the last marker, whether it is boxed)."""
    for marker in reversed(list(_MARKERS.finditer(text, max(0, len(text) - _READ_CHARACTERS)))):
        boxed = text.startswith("{", marker.end())
        line = _FIRST_LINE.match(text, marker.end())
        marked = _braced(text, marker.end()) if boxed else line[1] if line else ""
        if marked := marked.strip().strip("*_`").strip():
            return marked, boxed
    return None, False


def _without_latex(text: str) -> str:
    """Replace LaTeX around numbers: `\\frac{1}{2}` by 1/2, `\\text{cm}` by cm."""
    text = _FRACTION.sub(lambda m: f"{m[1] + ' ' if m[1] else ''}{m[2] or m[4]}/{m[3] or m[5]}", text)
    return _LATEX.sub(lambda m: m[1] or m[2] or m[3] or "", text)


def _canonical(number: str) -> str | None:
    whole, _, part = number.strip().rpartition(" ") if _MIXED_NUMBER.search(number) else ("", "", number)
    try:
        value = _fraction(part)
        if whole:
            value = _fraction(whole) + (-value if whole.startswith(("-", "−")) else value)
        return _shortest(value)
    except (ValueError, ZeroDivisionError):  # Python converts numbers of up to 4,300 digits
        return None


def _shortest(value: Fraction) -> str:
    """The decimal form, or p/q if that has no end. Raises: ValueError (too many digits)."""
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
    return Fraction(_NOT_NUMERIC.sub("", text).replace("−", "-"))


def _braced(text: str, start: int) -> str:
    """The content of the braces that begin at `start`."""
    depth = 0
    for brace in _BRACES.finditer(text, start):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[start + 1 : brace.start()]
    return text[start + 1 :]


def _words_of(text: str) -> str:
    """The words of a text in any script, normalised for comparison."""
    return " ".join(unicode_words(text))
