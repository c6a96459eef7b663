"""When a refused client may send its request again: the error that carries `Retry-After`, and the seconds of each cause.

A full queue estimates its own wait (`RequestQueue.wait_seconds`), and a used-up quota says when it is renewed (`accounts`).
"""

from __future__ import annotations

import math

from corral.serving.protocol import Refused

DATABASE_SECONDS = 1
"""The database cannot be used now."""
ENGINE_SECONDS = 5
"""No engine takes the request, and none says when one will."""
SHUTDOWN_SECONDS = 5
"""The server is shutting down."""


class Busy(Refused):
    """A request that may be sent again later.

    Args:
        status: 429 if the caller's quota is used up; 503 if the server is full, or what it needs cannot be used now.
        what: the message for people.
        retry_seconds: the value of `Retry-After`; rounded up to whole seconds, at least 1.
        code: the error code for programs.
    """

    def __init__(self, status: int, what: str, *, retry_seconds: float, code: str) -> None:
        super().__init__(status, what, code=code, retry_seconds=max(1, math.ceil(retry_seconds)))
