"""How answers go over HTTP: JSON, errors in OpenAI's shape, streams of events, and work that stops when its client goes.

It does not know what is answered, who asked, or what a request may cost.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import traceback
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

from fastapi import Response
from pydantic import BaseModel
from starlette.types import Message, Receive, Scope, Send

from corral.serving.protocol import Refused

T = TypeVar("T")

FAULT = Refused(500, "this is a fault in the server, not in the request", code="internal_error")
"""What a client is told of a fault of ours: nothing of its inside."""


class Event(NamedTuple):
    """One server-sent event: its data, and its name where it has one (the Responses protocol names them)."""

    data: str
    name: str = ""

    def encode(self) -> bytes:
        """As it is sent. The data must be one line, as JSON is."""
        return (f"event: {self.name}\n" if self.name else "").encode() + f"data: {self.data}\n\n".encode()


Outcome: TypeAlias = Literal["ended", "failed", "gone", "late"]
"""Of a request: it was answered, an error ended it, its client went, or its time was up."""

_FAREWELL_SECONDS = 1


class EventStream(Response):
    """A stream of server-sent events, which ends early when its client goes or its time is up.

    Args:
        events: what is sent.
        ended: called once, however it ends.
        deadline: when its time is up, on the loop's clock; a client that reads too slowly is not waited for either.
        late: what it then ends with.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[Event, None], ended: Callable[[Outcome], None], deadline: float, late: Refused
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._events = events
        self._ended = ended
        self._deadline = deadline
        self._late = late

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        outcome: Outcome = "failed"
        try:
            outcome = await while_connected(receive, self._send(send))
        except ClientGone:
            outcome = "gone"
        finally:
            self._ended(outcome)

    async def _send(self, send: Send) -> Outcome:
        outcome: Outcome = "ended"
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with asyncio.timeout_at(self._deadline), contextlib.aclosing(self._events) as events:
                async for event in events:
                    await send(_part(event.encode()))
        except TimeoutError:
            outcome = "late"
        # Who does not read is not waited for: the connection is closed without an end.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FAREWELL_SECONDS):
                if outcome == "late":
                    await send(_part(Event(self._late.body().model_dump_json()).encode()))
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        return outcome


def _part(body: bytes) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": True}


class ClientGone(Exception):
    """The client closed its connection."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes. The request's body must have been read.

    Raises:
        ClientGone: it went before the work was done.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def request_number() -> str:
    """A new one, for `X-Request-Id`."""
    return f"req_{secrets.token_hex(12)}"


def json_reply(body: BaseModel, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A body as JSON, in ASCII, since an error may quote half a character of the request."""
    return Response(json.dumps(body.model_dump()), status, dict(headers or {}), "application/json")


def error_reply(refused: Refused, headers: Mapping[str, str] | None = None) -> Response:
    """An error in OpenAI's shape; one that says when to come back carries it as `Retry-After`."""
    retry = {} if refused.retry_seconds is None else {"retry-after": str(refused.retry_seconds)}
    return json_reply(refused.body(), refused.status, {**retry, **(headers or {})})


def trace(error: BaseException) -> str:
    """What kind of error arose where, for a log: without its words, which may quote a request."""
    frames = traceback.extract_tb(error.__traceback__)
    return "\n".join([type(error).__name__, *(f"  {f.filename}:{f.lineno} in {f.name}" for f in frames)])
