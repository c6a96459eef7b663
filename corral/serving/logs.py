"""The server's log: lines with time, level and request id, on stderr, and exceptions without what they quote."""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import sys
import traceback
from collections.abc import Generator
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal, TypeAlias

LogLevel: TypeAlias = Literal["debug", "info", "warning", "error"]

request_id: ContextVar[str] = ContextVar("request_id", default="-")
"""The id of the request that is being answered; each line of the log has it."""

_SENT_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def choose_request_id(sent: str | None) -> str:
    """The id that the client sent, if it is short and harmless in a log; else a new one."""
    return sent if sent is not None and _SENT_ID.fullmatch(sent) else f"req_{secrets.token_hex(12)}"


@contextlib.contextmanager
def log_to_stderr(level: LogLevel) -> Generator[None]:
    """Log what corral says from this level on, and warnings of libraries."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    root, own = logging.getLogger(), logging.getLogger("corral")
    before = own.level
    root.addHandler(handler)
    own.setLevel(level.upper())
    try:
        yield
    finally:
        root.removeHandler(handler)
        own.setLevel(before)


class _Formatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO req_0123 corral.serving.middleware: message`."""

    def format(self, record: logging.LogRecord) -> str:
        """One record."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return f"{time} {record.levelname} {request_id.get()} {record.name}: {super().format(record)}"


def traceback_without_message(error: BaseException) -> str:
    """An exception's type and stack for the log, without its message, which may quote a request."""
    frames = traceback.extract_tb(error.__traceback__)
    return "\n".join([type(error).__name__, *(f"  {f.filename}:{f.lineno} in {f.name}" for f in frames)])
