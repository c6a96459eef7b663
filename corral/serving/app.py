"""Routes: HTTP ↔ completions. Built from what it serves; holds no settings of its own and nothing global.

A client that goes away stops the work it asked for, whether its answer is streamed or not. Every answer that is no success
has OpenAI's shape. Prompts are neither logged nor kept. It does not know sockets, signals or how the engine came to be; and
there are no keys, queue, quotas or conversations here yet.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import AsyncGenerator, Collection, Coroutine
from typing import Any, Protocol, TypeVar

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from corral.engines.base import Sampling
from corral.serving.completions import Asked, Served, faults
from corral.serving.legacy import AskedText, TextPrompts
from corral.serving.legacy_protocol import CompletionRequest
from corral.serving.protocol import Ask, ChatRequest, Model, Models, Refused, refusal

T = TypeVar("T")

_log = logging.getLogger(__name__)

_WORDS = {404: "there is no such route", 405: "this route has no such method"}


def build_app(served: Served, *, hosts: Collection[str] = ()) -> FastAPI:
    """The server as an ASGI application. The engine stays the caller's to close.

    Args:
        served: the model, as clients see it.
        hosts: names by which the server may be called; others are refused, which keeps a page in a browser from reaching a
            local server through a name of its own (DNS rebinding). None given: any name.
    """

    def known_host(request: Request) -> None:
        name = re.sub(r":\d*$", "", request.headers.get("host", "")).strip("[]").lower()
        if hosts and name not in hosts:
            raise Refused(403, f"this server does not answer to the name {name!r}", code="unknown_host")

    # No pages of documentation: they would load scripts from elsewhere.
    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        dependencies=[Depends(known_host)],
    )
    app.add_middleware(BodyLimit, most=served.limits.body_bytes)
    _handle_errors(app)
    model = Model(id=served.name, created=served.created, max_model_len=served.context)
    texts = TextPrompts(served.answerer.template)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        return await _answered(Asked(served, body), body, request)

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        return await _answered(AskedText(served, texts, body), body, request)

    @app.get("/v1/models")
    async def models() -> Response:  # pyright: ignore[reportUnusedFunction]
        return _json(Models(data=[model]))

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        if name != served.name:
            raise Refused(404, f"the model {name!r} does not exist", param="model", code="model_not_found")
        return _json(model)

    @app.get("/health")
    async def health() -> Response:  # pyright: ignore[reportUnusedFunction]
        engine = served.answerer.engine
        with faults():
            # Only the engine knows whether it takes work, and says so when it is given some.
            engine.submit([0], Sampling(max_tokens=1)).cancel()
        if not engine.ready:
            raise Refused(503, "the engine of this server cannot be started", code="engine_unavailable")
        return _json(Health(model=served.name, engine=engine.name))

    return app


class Work(Protocol):
    """A request under way, on whichever route."""

    def whole(self) -> Coroutine[Any, Any, BaseModel]:
        """The answer."""
        ...

    def events(self) -> AsyncGenerator[str, None]:
        """The data of each event of a stream."""
        ...

    def cancel(self) -> None:
        """Stop the work."""
        ...


async def _answered(work: Work, body: Ask, request: Request) -> Response:
    if body.stream:
        return Events(work)
    try:
        return _json(await while_connected(request.receive, work.whole()))
    except ClientGone:
        return Response(status_code=499)  # nobody reads it
    finally:
        work.cancel()


class Health(BaseModel):
    """`/health`: the process answers, and its engine takes work."""

    status: str = "ok"
    model: str
    engine: str


class Events(Response):
    """A stream of server-sent events; it is cancelled when the client goes."""

    media_type = "text/event-stream"

    def __init__(self, work: Work) -> None:
        super().__init__(headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            with contextlib.suppress(ClientGone):
                await while_connected(receive, self._send(send))
        finally:
            self._work.cancel()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with contextlib.aclosing(self._events()) as events:
            async for data in events:
                await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncGenerator[str, None]:
        try:
            async with contextlib.aclosing(self._work.events()) as events:
                async for data in events:
                    yield data
        except Exception as error:
            _log.error("a stream broke", exc_info=error)
            yield _FAULT.body().model_dump_json()


class BodyLimit:
    """Refuses a body of more than `most` bytes: by its header where that says so, else once as many have come."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, counting what it sends."""
        too_large = Refused(413, f"the body is larger than the {self._most} bytes this server takes")
        length = dict(scope.get("headers", ())).get(b"content-length", b"0")
        if int(length) > self._most:
            await _error(too_large)(scope, receive, send)
            return
        come = 0

        async def counted() -> Message:
            nonlocal come
            message = await receive()
            come += len(message.get("body", b""))
            if come > self._most:
                raise HTTPException(413, too_large.what)
            return message

        await self._app(scope, counted, send)


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


_FAULT = Refused(500, "this is a fault in the server, not in the request", code="internal_error")


def _handle_errors(app: FastAPI) -> None:
    """Give every error OpenAI's shape."""

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return _error(error)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _error(refusal(error.errors()))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = _WORDS.get(error.status_code, str(error.detail))
        return _error(Refused(error.status_code, what), dict(error.headers or {}))

    async def fault(request: Request, error: Exception) -> Response:
        return _error(_FAULT)

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, fault)


def _error(refused: Refused, headers: dict[str, str] | None = None) -> Response:
    return _json(refused.body(), refused.status, headers)


def _json(body: BaseModel, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    # Written as ASCII, since an error may quote half a character of the request.
    return Response(json.dumps(body.model_dump()), status, headers, "application/json")
