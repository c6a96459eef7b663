"""Strict JSON: what Python's reader lets pass (NaN, infinity, one key twice, half a surrogate pair) is a reason to refuse.

Knows nothing about files or rows.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

_SPACE = re.compile(r"[ \t\r\n]*")
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


class StrictDecoder:
    """Decodes one JSON value after another."""

    def __init__(self) -> None:
        self._reason: str | None = None
        self._json = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._float
        )

    def decode(self, text: str, at: int) -> tuple[Any, int, str | None]:
        """(the value that begins at `at`, where it ends, what is wrong with it).

        Raises:
            JSONDecodeError: it is not JSON.
            ValueError, RecursionError: Python cannot hold it.
        """
        self._reason = None
        value, end = self._json.raw_decode(text, at)
        if self._reason is None and _may_hold_half(text, at, end) and not _is_text(value):
            self._reason = "half a surrogate pair (\\ud800 to \\udfff), which is no character"
        return value, end, self._reason

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for i, key in enumerate(keys) if key in keys[:i])
            self._reason = f"the key {_short(twice)} stands twice in one object"
        return value

    def _constant(self, name: str) -> None:
        self._reason = f"{name} is not a JSON number"

    def _float(self, digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            self._reason = "a number is too large"
        return value


def skip_space(text: str, at: int) -> int:
    """Where the next token begins, from `at`."""
    found = _SPACE.match(text, at)
    return found.end() if found else at


def explain_limit(error: ValueError | RecursionError) -> str:
    """Why Python cannot hold a JSON value, in words."""
    return "nested too deeply" if isinstance(error, RecursionError) else "an integer has too many digits"


def explain_error(error: json.JSONDecodeError) -> str:
    """The reader's message, as the part of a sentence."""
    return error.msg[:1].lower() + error.msg[1:]


def _may_hold_half(text: str, at: int, end: int) -> bool:
    # A search for one character is far faster than one for two, and that than the pattern; most rows need no more.
    return text.find("\\", at, end) >= 0 and text.find("\\u", at, end) >= 0 and _HALF.search(text, at, end) is not None


def _is_text(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(value: Any) -> str:
    shown = ascii(value) if not _is_text(value) else repr(value)
    return shown if len(shown) <= 40 else f"{shown[:39]}…"
