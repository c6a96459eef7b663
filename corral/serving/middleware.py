"""In front of all routes, known and unknown: who may ask, by what name, how much at once. And around every answer: its number,
its count, and the end of what went wrong.

Everything but `/health` is closed to those whom the door does not know, before a byte of the body is read. It does not know
the routes, nor what they do.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from corral.serving.admission import Door
from corral.serving.auth import Caller
from corral.serving.http_responses import FAULT, error_reply, request_number, trace
from corral.serving.protocol import Refused
from corral.serving.request_queue import Busy

_log = logging.getLogger(__name__)


class Envelope:
    """Numbers and counts every answer, and turns what nobody caught into one."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app = app
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        number = request_number()
        has_begun = False

        async def numbered(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                MutableHeaders(scope=message)["x-request-id"] = number
                self._door.metrics.answered(_route(scope), message["status"])
            await send(message)

        try:
            await self._app(scope, receive, numbered)
        except Exception as error:
            _log.error("a fault in the server, on request %s: %s", number, trace(error))
            if not has_begun:  # else the connection is closed, with the answer cut off
                await error_reply(FAULT)(scope, receive, numbered)


def _route(scope: Scope) -> str:
    """The path as the routes have it: what clients wrote would make a count of its own each time."""
    return getattr(scope.get("route"), "path", "none")


class Guard:
    """Lets requests through that may come in.

    Args:
        body_bytes: the largest body.
        hosts: names by which the server may be called; others are refused, which keeps a page in a browser from reaching a
            local server through a name of its own (DNS rebinding). None given: any name.
    """

    def __init__(self, app: ASGIApp, door: Door, body_bytes: int, hosts: Collection[str]) -> None:
        self._app = app
        self._door = door
        self._body_bytes = body_bytes
        self._hosts = hosts
        self._under_way: Counter[str] = Counter()
        """Requests of each key."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        caller = None
        try:
            headers = Headers(scope=scope)
            self._check_head(scope, headers)
            if not _is_open(scope["path"]):
                caller = await self._door.callers.identify(headers.get("authorization"))
                scope.setdefault("state", {})["caller"] = caller
                self._check_room(caller, headers)
                if scope["path"].startswith("/v1/"):
                    self._door.callers.came(caller)
        except Refused as refused:
            challenge = {"www-authenticate": "Bearer"} if refused.status == 401 else None
            await error_reply(refused, challenge)(scope, receive, send)
            return
        if caller is None:  # those whom nobody knows take no room from the others
            await self._app(scope, self._bounded(receive), send)
            return
        self._under_way[caller.key] += 1
        try:
            await self._app(scope, self._bounded(receive), send)
        finally:
            self._under_way[caller.key] -= 1
            if not self._under_way[caller.key]:
                del self._under_way[caller.key]

    def _check_head(self, scope: Scope, headers: Headers) -> None:
        most = self._door.bounds.header_bytes
        line = len(scope["raw_path"]) + len(scope["query_string"])
        if line + sum(len(name) + len(value) + 4 for name, value in headers.raw) > most:
            raise Refused(431, f"request line and headers are larger than the {most} bytes this server takes")
        name = re.sub(r":\d*$", "", headers.get("host", "")).strip("[]").lower()
        if self._hosts and name not in self._hosts:
            raise Refused(403, f"this server does not answer to the name {name!r}", code="unknown_host")

    def _check_room(self, caller: Caller, headers: Headers) -> None:
        door, count = self._door, self._under_way.total()
        bounds = door.bounds
        # One key alone leaves some room, by which others come as far as the queue, where turns are fair.
        has_its_share = caller.key and self._under_way[caller.key] >= bounds.at_once + bounds.waiting
        if count >= bounds.under_way or has_its_share:
            what = f"this server is full: {count} requests are under way"
            wait = door.places.wait_seconds(door.places.waiting + 1)
            raise Busy(503, what, retry_seconds=wait, code="server_full")
        if int(headers.get("content-length", "0")) > self._body_bytes:
            raise Refused(413, self._too_large)

    @property
    def _too_large(self) -> str:
        return f"the body is larger than the {self._body_bytes} bytes this server takes"

    def _bounded(self, receive: Receive) -> Receive:
        """The same, for a body that is not too large and comes in time."""
        seconds = self._door.bounds.body_seconds
        deadline = asyncio.get_running_loop().time() + seconds
        come = 0
        is_whole = False

        async def bounded() -> Message:
            nonlocal come, is_whole
            if is_whole:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                what = f"the body did not come within {seconds:g} seconds"
                raise HTTPException(408, what, {"connection": "close"}) from None
            come += len(message.get("body", b""))
            if come > self._body_bytes:
                raise HTTPException(413, self._too_large)
            is_whole = not message.get("more_body", False)
            return message

        return bounded


def _is_open(path: str) -> bool:
    """Whether a route needs no key."""
    return path == "/health" or path.startswith("/health/")
