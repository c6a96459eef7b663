"""What an endpoint means by an answer that is no success: that it is busy, lost, wrong, or that the request is.

It knows HTTP and OpenAI's form of errors. It does not know what is done about them.
"""

from __future__ import annotations

import time
from contextlib import suppress
from email.utils import parsedate_to_datetime

import httpx2

from corral.engines.remote.protocol import KEY_VARIABLE, error_message
from corral.errors import EngineError, RequestError

NOT_OPENAI = "is this the address of an OpenAI-compatible server? It usually ends in /v1"
_LONGEST_TOLD = 1e9  # of what a Retry-After says
_BUSY = (429, 503, 504)  # of transient ones, those that are about one request
_TRANSIENT = (*_BUSY, 408, 502)


class Lost(Exception):
    """One try failed for a reason that may pass.

    Args:
        what: the reason.
        retry_after: how many seconds the endpoint asks to be left alone.
        status: what it answered, if it did.
    """

    def __init__(self, what: str, retry_after: float | None = None, status: int | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.retry_after = retry_after
        self.status = status


class Busy(Lost):
    """The endpoint does not take this request now; that says nothing about the next one."""


class Gone(Lost):
    """There is no connection to the endpoint."""


async def refusal(url: str, path: str, response: httpx2.Response, key: str | None) -> Exception:
    """What an answer means that is no success."""
    status = response.status_code
    words = error_message((await _beginning(response)).decode("utf-8", "replace"), key)
    what = f"answered {status}" + (f": {words}" if words else "")
    if status in _TRANSIENT:
        kind = Busy if status in _BUSY else Lost
        return kind(what, _retry_after(response.headers.get("retry-after")), status)
    if status in (401, 403):
        hint = f"put the key of this endpoint into {KEY_VARIABLE}" + (", the one there is wrong" * bool(key))
        return EngineError(f"the endpoint {what}", where=url, hint=hint, status=status)
    if status in (400, 413, 422):
        hint = "shorten the prompt or lower max_tokens" if "context" in words else None
        return RequestError(f"the endpoint {what}", where=url, hint=hint, status=status)
    if path == "/models":
        return EngineError(f"the endpoint {what}", where=url + path, hint=NOT_OPENAI, status=status)
    hint = f"see which models it has: {url}/models" if status == 404 else "its log may say more"
    return EngineError(f"the endpoint {what}", where=url, hint=hint, status=status)


async def _beginning(response: httpx2.Response) -> bytes:
    """The first part of a body that may be of any length."""
    data = b""
    async for chunk in response.aiter_bytes():
        data += chunk
        if len(data) > 2**16:
            break
    return data[: 2**16]


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a number or a date; None where neither is given."""
    if value is None:
        return None
    with suppress(ValueError):
        return min(max(0.0, float(value)), _LONGEST_TOLD)
    with suppress(ValueError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return None
