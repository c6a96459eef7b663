"""What the server writes to its log: request ids, and exceptions without what they quote."""

from __future__ import annotations

import secrets
import traceback


def new_request_id() -> str:
    """A new value for `X-Request-Id`."""
    return f"req_{secrets.token_hex(12)}"


def traceback_without_message(error: BaseException) -> str:
    """An exception's type and stack for the log, without its message, which may quote a request."""
    frames = traceback.extract_tb(error.__traceback__)
    return "\n".join([type(error).__name__, *(f"  {f.filename}:{f.lineno} in {f.name}" for f in frames)])
