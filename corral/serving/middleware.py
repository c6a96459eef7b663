"""ASGI middleware around all routes: access control before a body is read; ids, counts, errors and log lines of responses."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import time
from collections import Counter
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from corral.serving.accounts import Caller
from corral.serving.admission import Admission
from corral.serving.errors import Refused, server_full
from corral.serving.logs import choose_request_id, request_id, traceback_without_message
from corral.serving.streams import INTERNAL_ERROR, error_response

_MAX_BRACKETS = 2**17  # in a body: to parse more empty lists would hold up other requests for too long
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
_log = logging.getLogger(__name__)
_access_log = logging.getLogger("corral.access")

LOCAL_HOSTS = ("localhost", "*.localhost", "host.docker.internal", "host.containers.internal")
"""Names that nobody can have in the public DNS, so that no page reaches a local server through them."""


class ResponseMiddleware:
    """Gives every response a request id, counts and logs it, and turns unexpected exceptions into a 500.

    Args:
        root_path: where a proxy serves the application; a path may begin with it.
    """

    def __init__(self, app: ASGIApp, admission: Admission, root_path: str) -> None:
        self._app = app
        self._admission = admission
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["root_path"] = self._root_path
        began = time.perf_counter()
        id_ = choose_request_id(Headers(scope=scope).get("x-request-id"))
        request_id.set(id_)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = id_
                if (caller := scope.get("state", {}).get("caller")) is not None:
                    headers.update(self._admission.accounts.rate_limit_headers(caller))
                self._admission.metrics.count_response(_route_path(scope), status)
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            _log.error("a fault in the server: %s", traceback_without_message(error))
            if not status:  # else the connection is closed, and the response is cut off
                await error_response(INTERNAL_ERROR)(scope, receive, send_with_id)
        finally:
            _log_request(scope, status, time.perf_counter() - began)


def _log_request(scope: Scope, status: int, seconds: float) -> None:
    """Log one line: method, route, status, milliseconds, tokens and the name of the key; nothing that a client made up."""
    state = scope.get("state", {})
    method = scope["method"] if scope["method"] in _METHODS else "OTHER"
    usage, caller = state.get("usage"), state.get("caller")
    tokens = "- -" if usage is None else f"{usage.prompt_tokens} {usage.completion_tokens}"
    name = "-" if caller is None else caller.name
    line = "%s %s %d %.0fms prompt/completion tokens %s key %s"
    _access_log.info(line, method, _route_path(scope), status, 1000 * seconds, tokens, name)


def _route_path(scope: Scope) -> str:
    """The path as declared by the route: the client's own path would add a new metric label each time."""
    return getattr(scope.get("route"), "path", "none")


class AccessMiddleware:
    """Checks headers, API key, request rate and open requests before a body is read, then limits the body's size and time.

    Everything but `/health` needs a key, if the server has keys; also paths that do not exist.

    Args:
        body_bytes: the largest body.
        hosts: accepted names in the `Host` header, besides any IP address; `*.name` accepts all below a name, and `*` any.
            Others are refused, so that a page in a browser cannot reach a local server through a name of its own (DNS
            rebinding).
    """

    def __init__(self, app: ASGIApp, admission: Admission, body_bytes: int, hosts: Collection[str]) -> None:
        self._app = app
        self._admission = admission
        self._body_bytes = body_bytes
        self._hosts = [host.lower() for host in hosts]
        self._open_by_key: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        caller = None
        try:
            headers = Headers(scope=scope)
            self._check_size(scope, headers)
            if not (path == "/health" or path.startswith("/health/")):
                self._check_host(headers.get("host", ""))
                caller = await self._admission.accounts.authenticate(headers.get("authorization"))
                scope.setdefault("state", {})["caller"] = caller
                self._check_capacity(caller, headers)
                if path.startswith("/v1/") or path in ("/tokenize", "/detokenize"):
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

    def _check_size(self, scope: Scope, headers: Headers) -> None:
        most = self._admission.limits.header_bytes
        line = len(scope["raw_path"]) + len(scope["query_string"])
        if line + sum(len(name) + len(value) + 4 for name, value in headers.raw) > most:
            raise Refused(431, f"request line and headers are larger than the {most} bytes this server takes")

    def _check_host(self, host: str) -> None:
        name = re.sub(r":\d*$", "", host).strip("[]").lower()
        if not (_is_address(name) or any(_matches(name, each) for each in self._hosts)):
            what = f"this server does not answer to the name {name!r}: start it with --allowed-host {name or 'NAME'}"
            raise Refused(403, what, code="unknown_host")

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
        received = opened = 0
        is_complete = False

        async def receive_limited() -> Message:
            nonlocal received, opened, is_complete
            if is_complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                what = f"the body did not arrive within {seconds:g} seconds"
                raise HTTPException(408, what, {"connection": "close"}) from None
            body = message.get("body", b"")
            received += len(body)
            if received > self._body_bytes:
                raise HTTPException(413, self._too_large)
            opened += body.count(b"[") + body.count(b"{")
            if opened > _MAX_BRACKETS:
                raise HTTPException(413, f"the body has more than the {_MAX_BRACKETS} brackets this server takes")
            is_complete = not message.get("more_body", False)
            return message

        return receive_limited


def _is_address(name: str) -> bool:
    """Whether a host name is an IP address, which needs no DNS."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _matches(name: str, pattern: str) -> bool:
    return pattern == "*" or name == pattern or (pattern.startswith("*.") and name.endswith(pattern[1:]))
