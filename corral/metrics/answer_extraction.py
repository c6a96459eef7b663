"""The result of an answer, out of its text: a number, a choice, or a short text, in a form in which equal results are equal.

Pure, and by rules that can be read here. It does not know what the question was, nor whether the result is right.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction

RESULT_MARKER = "Answer:"
"""What a model is asked to write before its result."""

# What is said before a result: by MARKER, in GSM8K, in MetaMathQA and MATH. The last one counts.
_MARKERS = re.compile(r"####|\b(?:final\s+)?answer\s*(?:is\b(?!\s+not\b)|:|=)(?:\s*:)?|\\boxed\s*(?=\{)", re.IGNORECASE)
# Letters of scripts that put spaces between words: a digit right after one is a part of its word, as in "B12". In Chinese
# and Japanese a number stands among letters.
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
    """What follows the last marker of a result (`Answer:`, `####`, `the answer is`, `\\boxed{…}`), up to the end of its line.

    Returns: None where there is no marker, or nothing after it.
    """
    said, _ = _said(text)
    return said


def extract_number(text: str) -> str | None:
    """The number that an answer comes to: the first one after the last marker, or without a marker the last of the text.

    Returns: its shortest decimal form, or a fraction p/q where it has none; without sign of thousands, unit or currency, so
        that equal numbers are equal texts. None where there is no number, or where what is boxed is not just a number.
    """
    said, boxed = _said(text)
    if said is None:
        within = list(_NUMBER.finditer(_plain(text)))
        return _canonical(within[-1].group()) if within else None
    said = _plain(said)
    # "3 + 4 = 7": what stands after the sign of equality is the result; not so in "7 (= 3 + 4)".
    outside = re.sub(r"\([^()]*\)", "", said)
    if "=" in outside and (after := _NUMBER.search(outside, outside.rindex("="))):
        said = outside[after.start() :]
    if not (found := _NUMBER.search(said)):
        return None
    if boxed and (said[: found.start()].strip() or not _UNITS.fullmatch(said[found.end() :])):
        return None
    return _canonical(found.group())


def extract_choice(text: str, options: Sequence[str] = ()) -> str | None:
    """The letter of the option that an answer names: after the last marker, at its beginning, or by the option's own text.

    Args:
        text: the answer.
        options: the options' texts, in the order of their letters; without them any letter is taken.

    Returns: a capital letter, or None where the answer names none, or several.
    """
    last = chr(ord("A") + len(options) - 1) if options else "Z"
    said, _ = _said(text)
    said = None if said is None else _plain(said)
    if said is not None and (found := _LONE.fullmatch(said)) and found[1].upper() <= last:
        return found[1].upper()
    for part in (said, text):
        if part is not None and (found := _LETTER.match(part)) and found[1] <= last:
            return found[1]
    for part in (said, text):
        if part is not None and options:
            words = _key(part)
            named = [i for i, option in enumerate(options) if _key(option) and f" {_key(option)} " in f" {words} "]
            # "blue" within "light blue": the longer one is meant.
            longest = [i for i in named if not any(i != j and _key(options[i]) in _key(options[j]) for j in named)]
            if len(longest) == 1:
                return chr(ord("A") + longest[0])
    return None


def extract_result(text: str) -> str | None:
    """What an answer comes to, where the kind of question is not known: a choice's letter, else a number, else the short text
    after the marker (what is boxed by its signs, else by its words). None where there is nothing of the kind."""
    said, boxed = _said(text)
    if letter := extract_choice(text):
        return letter
    if (found := extract_number(text)) is not None:
        return found
    if said is None:
        return None
    return (re.sub(r"\s+", "", _plain(said)).casefold() if boxed else _key(said)) or None


def _said(text: str) -> tuple[str | None, bool]:
    """(what follows the last marker, whether it is boxed)."""
    for marker in reversed(list(_MARKERS.finditer(text))):
        rest = text[marker.end() :]
        boxed = rest.startswith("{")
        if boxed:
            said = _braced(rest)
        else:
            lines = [line for line in rest.splitlines() if line.strip(" *_`")]
            said = lines[0] if lines else ""
        if said := said.strip().strip("*_`").strip():
            return said, boxed
    return None, False


def _plain(text: str) -> str:
    """Without what LaTeX writes about numbers: `\\frac{1}{2}` is 1/2, `\\text{cm}` is cm."""
    text = _FRACTION.sub(lambda m: f"{m[1] + ' ' if m[1] else ''}{m[2] or m[4]}/{m[3] or m[5]}", text)
    return _LATEX.sub(lambda m: m[1] or m[2] or m[3] or "", text)


def _canonical(found: str) -> str | None:
    whole, _, part = found.strip().rpartition(" ") if re.search(r"\d\s\d", found) else ("", "", found)
    try:
        value = _fraction(part)
        if whole:
            value = _fraction(whole) + (-value if whole.startswith(("-", "−")) else value)
    except (ValueError, ZeroDivisionError):
        return None
    if value.denominator == 1:
        return str(value.numerator)
    rest, places = value.denominator, 0
    for prime in (2, 5):
        power = 0
        while rest % prime == 0:
            rest //= prime
            power += 1
        places = max(places, power)
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    digits = str(abs(value * 10**places)).zfill(places + 1)
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"


def _fraction(written: str) -> Fraction:
    return Fraction(re.sub(r"[\s,$€£+]", "", written).replace("−", "-"))


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
