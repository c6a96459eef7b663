"""Admits requests for model work: quota, queue, deadline, client disconnect, and usage counts.

Every route that uses an engine goes through `Admission.handle`. What a request asks for, and how it is answered, is the
business of its `RequestHandler`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import Request, Response
from pydantic import BaseModel
from starlette.datastructures import State

from corral.serving.accounts import Accounts, Caller, Reserve
from corral.serving.errors import Refused, shutting_down
from corral.serving.keys import KeySource
from corral.serving.metrics import Metrics
from corral.serving.protocol import Usage
from corral.serving.request_queue import RequestQueue, Slot
from corral.serving.streams import (
    ClientGone,
    Event,
    EventStream,
    Outcome,
    TimeLimit,
    json_response,
    while_connected,
)


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Limits of the whole server and of its connections; `RequestLimits` holds those of one request."""

    at_once: int = 128
    """Choices that are generated at the same time, of all requests."""
    waiting: int = 512
    """Requests that wait in the queue."""
    max_seconds: float = 600
    """From when a request was received completely to the end of its response."""
    header_bytes: int = 16 * 2**10
    """Size of request line and headers."""
    header_seconds: float = 10
    """Time from connecting to the end of the first request line and headers."""
    body_seconds: float = 30
    """Time to send a body."""
    keep_alive_seconds: float = 75
    """From the end of a response to the next request's headers; longer than proxies and clients keep unused connections."""
    stalled_seconds: float = 120
    """Time without taking any byte of what is sent, after which a client is disconnected."""

    @property
    def max_open(self) -> int:
        """Requests of any kind at the same time: those that run or wait, and some that need no engine."""
        return self.at_once + self.waiting + 64


_NOTHING: AbstractContextManager[object] = nullcontext()


class RequestHandler(Protocol):
    """A request that an engine is working on."""

    @property
    def usage(self) -> Usage:
        """Tokens of prompt and answer so far; may be read at any time, also after `cancel`."""
        ...

    def result(self) -> Coroutine[Any, Any, BaseModel | str]:
        """The complete response, as a model or as JSON."""
        ...

    def events(self) -> AsyncGenerator[Event, None]:
        """The events of a streamed response. Raises: Refused."""
        ...

    def error_event(self, refused: Refused) -> Event:
        """The event that ends a stream which failed, or whose time is up."""
        ...

    def cancel(self) -> None:
        """Stop the work. Called once at the end of every request; does nothing if the work is done."""
        ...


class Admission:
    """The way to the engines for all requests of a server.

    Args:
        keys: the API keys; None: no key is needed.
    """

    def __init__(self, limits: ServerLimits | None = None, keys: KeySource | None = None) -> None:
        self.limits = limits or ServerLimits()
        self.accounts = Accounts(keys)
        self.queue = RequestQueue(self.limits.at_once, self.limits.waiting)
        self.metrics = Metrics(self.queue)
        self.is_draining = False
        """Whether new work is refused because the server is shutting down."""
        self.time_limits: set[TimeLimit] = set()
        """Of the requests under way."""

    async def handle(
        self,
        request: Request,
        start: Callable[[Reserve], Awaitable[RequestHandler]],
        *,
        stream: bool,
        model: str,
        choices: int = 1,
        hold: AbstractContextManager[object] = _NOTHING,
    ) -> Response:
        """Answer a request whose body was read, as one response or as a stream.

        Args:
            start: starts the work; awaited once a slot is free. Before it submits anything to an engine, it calls its
                argument with what the request may use. It may raise Refused, and may be cancelled.
            model: the name of a served model, for the metrics: never text from a client.
            choices: that it generates at the same time, for the queue; bounded by the caller.
            hold: entered now, and left when the request has ended, also a stream (`ServedModels.use`).

        Raises:
            Refused: 429: the key's quota is used up; 503: the queue is full, or the server is shutting down; 504: the
                deadline passed; anything that `start` or the handler raises.
        """
        if self.is_draining:
            raise shutting_down()
        admitted = _AdmittedRequest(self, request.state, model, hold)
        outcome: Outcome = "failed"
        response: Response | None = None
        try:
            async with admitted.limit.apply():
                handler = await while_connected(request.receive, admitted.start(start, choices))
                if stream:
                    events = admitted.events(handler)
                    response = EventStream(events, admitted.finish, admitted.limit, handler.error_event)
                    return response
                result = await while_connected(request.receive, handler.result())
                outcome = "ended"
                return json_response(result)
        except ClientGone:
            outcome = "gone"
            return Response(status_code=499)  # nobody reads it
        except TimeoutError:
            if not admitted.limit.is_over:
                raise
            outcome = "late"
            raise admitted.limit.error from None
        finally:
            if response is None:
                admitted.finish(outcome)

    def end_requests(self) -> None:
        """End all requests now: a stream with an error as its last event, any other with 503."""
        for limit in list(self.time_limits):
            limit.end_now(shutting_down())

    async def close(self) -> None:
        """Write usage counts to the database."""
        await self.accounts.close()


def _deadline_error() -> Refused:
    return Refused(504, "the request took longer than this server allows", code="deadline_exceeded")


class _AdmittedRequest:
    """One request within its quota, from the queue to its end. Raises: Refused (429: the quota is used up)."""

    def __init__(self, admission: Admission, state: State, model: str, hold: AbstractContextManager[object]) -> None:
        self.limit = TimeLimit(admission.limits.max_seconds, _deadline_error())
        self._admission = admission
        self._state = state
        self._caller: Caller = state.caller
        self._model = model
        self._arrived = time.perf_counter()
        self._open = admission.accounts.admit(self._caller, self.limit.end_now, admission.queue.seconds_per_request)
        admission.time_limits.add(self.limit)
        self._held = contextlib.ExitStack()
        self._held.enter_context(hold)
        self._slot: Slot | None = None
        self._handler: RequestHandler | None = None

    async def start(self, start: Callable[[Reserve], Awaitable[RequestHandler]], choices: int) -> RequestHandler:
        """Wait for a slot and start the work. Raises: Refused."""
        admission = self._admission
        self._slot = await admission.queue.acquire(self._caller.key_id, choices)
        admission.metrics.observe_queue_time(self._seconds)
        self._handler = handler = await start(self._reserve)
        return handler

    async def events(self, handler: RequestHandler) -> AsyncGenerator[Event, None]:
        """The handler's events."""
        has_first_token = False
        async with contextlib.aclosing(handler.events()) as events:
            async for event in events:
                if not has_first_token and handler.usage.completion_tokens:
                    has_first_token = True
                    self._admission.metrics.observe_first_token(self._model, self._seconds)
                yield event

    def finish(self, outcome: Outcome) -> None:
        """Stop the work, count its usage, release the slot."""
        admission = self._admission
        admission.time_limits.discard(self.limit)
        if self._handler is not None:
            self._handler.cancel()
            admission.metrics.count_request(self._model, self._caller.name, outcome, self._seconds, self._handler.usage)
        usage = self._state.usage = None if self._handler is None else self._handler.usage
        self._open.close(usage)
        if self._slot is not None:
            admission.queue.release(self._slot, usage.total_tokens if usage else 0)
        self._held.close()

    def _reserve(self, prompt_tokens: int, max_tokens: int, choices: int = 1, *, may_shorten: bool = False) -> int:
        """See `Reserve`."""
        wait = self._admission.queue.seconds_per_request
        return self._open.reserve(prompt_tokens, max_tokens, choices, may_shorten=may_shorten, retry_seconds=wait)

    @property
    def _seconds(self) -> float:
        return time.perf_counter() - self._arrived
