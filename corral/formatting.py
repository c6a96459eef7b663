"""Numbers, times and lists as text for people; a row as a line for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

MINUS = "−"
JOIN = "\N{NO-BREAK SPACE}"


def number(value: float, digits: int = 3) -> str:
    """Fixed digits after the point, commas between thousands, and a true minus; never `−0.000`."""
    text = f"{value:,.{digits}f}"
    if text.startswith("-"):
        text = MINUS + text[1:] if text.strip("-0.,") else text[1:]
    return text


def signed(value: float, digits: int = 3) -> str:
    """As `number`, with a plus for values above 0."""
    text = number(value, digits)
    return text if text.startswith(MINUS) or not text.strip("0.,") else f"+{text}"


def round_up(value: float) -> str:
    """Two digits after the point at most, for a limit that the value must not exceed."""
    return f"{math.ceil(100 * value) / 100:g}"


def compact(value: float) -> str:
    """Three significant digits, for values of unknown size."""
    return f"{value:.3g}".replace("-", MINUS)


def count(value: float) -> str:
    """A whole number, with commas between thousands."""
    return number(value, 0)


def count_of(value: int, noun: str) -> str:
    """`1 row`, `1,234 rows`."""
    return f"{value:,} {noun}{'' if value == 1 else 's'}"


def json_line(row: Mapping[str, Any]) -> str:
    """A row as a line of JSON."""
    # ASCII, as a row may hold half a surrogate pair, which UTF-8 cannot encode.
    return json.dumps(row, separators=(",", ":")) + "\n"


def format_bytes(value: float) -> str:
    """Bytes in decimal units, three digits: `12 bytes`, `8.19 kB`, `141 GB`."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.{max(0, 3 - len(str(int(value / scale))))}f} {unit}"
    return f"{value:.0f} bytes"


def format_duration(seconds: float) -> str:
    """`0.8 s`, `42 s`, `6 min 12 s`, `3 h 05 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def format_p(p: float) -> str:
    """A p-value: `0.012`, or `<0.001`."""
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


def format_p_equation(p: float) -> str:
    """`p = 0.012`, or `p < 0.001`."""
    return f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"


def moment(value: Any) -> str:
    """An ISO 8601 time, or seconds since 1970, in UTC to the minute; anything else unchanged."""
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            time = datetime.fromtimestamp(value, UTC)
        else:
            time = datetime.fromisoformat(str(value))
            time = time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)
    except (ValueError, OverflowError, OSError):
        return str(value)
    return time.strftime("%Y-%m-%d %H:%M UTC")


def listing(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def unbroken(text: str) -> str:
    """A text that stays on one line of a page, such as a number and its unit."""
    return text.replace(" ", JOIN)


def shorten(text: str, limit: int) -> str:
    """One line of at most `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"
