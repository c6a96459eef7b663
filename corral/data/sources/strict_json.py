"""Decodes strict JSON. NaN, infinity, a key twice and half a surrogate pair, which Python's reader accepts, are faults."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any

_SPACE = re.compile(r"[ \t\r\n]*")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class StrictDecoder:
    """Decodes one JSON value after another."""

    def __init__(self) -> None:
        self._reason: str | None = None
        self._json = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._float
        )

    def decode(self, text: str, at: int) -> tuple[Any, int, str | None]:
        """(the value that begins at `at`, where it ends, the reason against it if any).

        Raises:
            JSONDecodeError: it is not JSON.
            ValueError, RecursionError: it exceeds a limit of Python.
        """
        self._reason = None
        value, end = self._json.raw_decode(text, at)
        if self._reason is None and _may_hold_surrogate(text, at, end) and not _is_encodable(value):
            self._reason = "half a surrogate pair (\\ud800 to \\udfff), which is no character"
        return value, end, self._reason

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = Counter(keys).most_common(1)[0][0]
            self._reason = f"the key {_shorten(twice)} stands twice in one object"
        return value

    def _constant(self, name: str) -> None:
        self._reason = f"{name} is not a JSON number"

    def _float(self, digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            self._reason = "a number is too large"
        return value


def skip_space(text: str, at: int) -> int:
    """The index of the next token, from `at`."""
    space = _SPACE.match(text, at)
    return space.end() if space else at


def explain_limit(error: ValueError | RecursionError) -> str:
    """The limit of Python that a JSON value exceeds, for a message."""
    return "nested too deeply" if isinstance(error, RecursionError) else "an integer has too many digits"


def explain_error(error: json.JSONDecodeError) -> str:
    """The decoder's message as part of a sentence."""
    return error.msg[:1].lower() + error.msg[1:]


def _may_hold_surrogate(text: str, at: int, end: int) -> bool:
    # Searching one character is far faster than two, and two than the pattern; most rows need only the first.
    return (
        text.find("\\", at, end) >= 0
        and text.find("\\u", at, end) >= 0
        and _SURROGATE_ESCAPE.search(text, at, end) is not None
    )


def _is_encodable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _shorten(value: Any) -> str:
    text = ascii(value) if not _is_encodable(value) else repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
