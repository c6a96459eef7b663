"""ASGI middleware around all routes: access control before a body is read, and request ids, counts and errors of responses."""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from corral.serving.accounts import Caller
from corral.serving.admission import Admission
from corral.serving.errors import Refused, server_full
from corral.serving.logs import new_request_id, traceback_without_message
from corral.serving.streams import INTERNAL_ERROR, error_response

_log = logging.getLogger(__name__)


class ResponseMiddleware:
    """Gives every response a request id, counts it, and turns unexpected exceptions into a 500."""

    def __init__(self, app: ASGIApp, admission: Admission) -> None:
        self._app = app
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = new_request_id()
        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
                self._admission.metrics.count_response(_route_path(scope), message["status"])
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            _log.error("a fault in the server, on request %s: %s", request_id, traceback_without_message(error))
            if not has_started:  # else the connection is closed, and the response is cut off
                await error_response(INTERNAL_ERROR)(scope, receive, send_with_id)


def _route_path(scope: Scope) -> str:
    """The path as declared by the route: the client's own path would add a new metric label each time."""
    return getattr(scope.get("route"), "path", "none")


class AccessMiddleware:
    """Checks headers, API key, request rate and open requests before a body is read, then limits the body's size and time.

    Everything but `/health` needs a key, if the server has keys; also paths that do not exist.

    Args:
        body_bytes: the largest body.
        hosts: accepted values of the `Host` header; others are refused, so that a page in a browser cannot reach a local
            server through a name of its own (DNS rebinding). Empty: any name.
    """

    def __init__(self, app: ASGIApp, admission: Admission, body_bytes: int, hosts: Collection[str]) -> None:
        self._app = app
        self._admission = admission
        self._body_bytes = body_bytes
        self._hosts = hosts
        self._open_by_key: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        caller = None
        try:
            headers = Headers(scope=scope)
            self._check_headers(scope, headers)
            if not _needs_no_key(scope["path"]):
                caller = await self._admission.accounts.authenticate(headers.get("authorization"))
                scope.setdefault("state", {})["caller"] = caller
                self._check_capacity(caller, headers)
                if scope["path"].startswith("/v1/"):
                    self._admission.accounts.count_request(caller)
        except Refused as refused:
            await error_response(refused)(scope, receive, send)
            return
        if caller is None:  # requests without a key do not count, so they take no capacity from others
            await self._app(scope, self._limit_body(receive), send)
            return
        self._open_by_key[caller.key_id] += 1
        try:
            await self._app(scope, self._limit_body(receive), send)
        finally:
            self._open_by_key[caller.key_id] -= 1
            if not self._open_by_key[caller.key_id]:
                del self._open_by_key[caller.key_id]

    def _check_headers(self, scope: Scope, headers: Headers) -> None:
        most = self._admission.limits.header_bytes
        line = len(scope["raw_path"]) + len(scope["query_string"])
        if line + sum(len(name) + len(value) + 4 for name, value in headers.raw) > most:
            raise Refused(431, f"request line and headers are larger than the {most} bytes this server takes")
        name = re.sub(r":\d*$", "", headers.get("host", "")).strip("[]").lower()
        if self._hosts and name not in self._hosts:
            raise Refused(403, f"this server does not answer to the name {name!r}", code="unknown_host")

    def _check_capacity(self, caller: Caller, headers: Headers) -> None:
        limits, queue = self._admission.limits, self._admission.queue
        count = self._open_by_key.total()
        # One key alone may not use the last `max_open` places, so that others reach the queue, which is fair to them.
        is_over_share = caller.key_id and self._open_by_key[caller.key_id] >= limits.at_once + limits.waiting
        if count >= limits.max_open or is_over_share:
            raise server_full(f"{count} requests are under way", queue.wait_seconds(queue.waiting + 1))
        if int(headers.get("content-length", "0")) > self._body_bytes:
            raise Refused(413, self._too_large)

    @property
    def _too_large(self) -> str:
        return f"the body is larger than the {self._body_bytes} bytes this server takes"

    def _limit_body(self, receive: Receive) -> Receive:
        """Wrap `receive` to refuse a body that is too large or too slow."""
        seconds = self._admission.limits.body_seconds
        deadline = asyncio.get_running_loop().time() + seconds
        received = 0
        is_complete = False

        async def receive_limited() -> Message:
            nonlocal received, is_complete
            if is_complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                what = f"the body did not arrive within {seconds:g} seconds"
                raise HTTPException(408, what, {"connection": "close"}) from None
            received += len(message.get("body", b""))
            if received > self._body_bytes:
                raise HTTPException(413, self._too_large)
            is_complete = not message.get("more_body", False)
            return message

        return receive_limited


def _needs_no_key(path: str) -> bool:
    return path == "/health" or path.startswith("/health/")
