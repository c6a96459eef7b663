"""How responses go over HTTP: JSON bodies, errors in OpenAI's form, request numbers; `event_stream` sends streams."""

from __future__ import annotations

import json
import secrets
import traceback
from collections.abc import Mapping

from fastapi import Response
from pydantic import BaseModel

from corral.serving.protocol import Refused

INTERNAL_ERROR = Refused(500, "this is a fault in the server, not in the request", code="internal_error")
"""What a client sees of an unexpected exception: no details."""


def new_request_id() -> str:
    """A new value for `X-Request-Id`."""
    return f"req_{secrets.token_hex(12)}"


def json_response(body: BaseModel, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response in ASCII, because an error may quote a lone surrogate from the request."""
    return Response(json.dumps(body.model_dump()), status, dict(headers or {}), "application/json")


def error_response(refused: Refused, headers: Mapping[str, str] | None = None) -> Response:
    """An error in OpenAI's form, with `Retry-After` if the error says when to try again."""
    retry = {} if refused.retry_seconds is None else {"retry-after": str(refused.retry_seconds)}
    return json_response(refused.body(), refused.status, {**retry, **(headers or {})})


def traceback_without_message(error: BaseException) -> str:
    """An exception's type and stack for the log, without its message, which may quote a request."""
    frames = traceback.extract_tb(error.__traceback__)
    return "\n".join([type(error).__name__, *(f"  {f.filename}:{f.lineno} in {f.name}" for f in frames)])
