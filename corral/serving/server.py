"""The process of `corral serve`: an address, a database, loaded models, and an orderly end. Knows nothing about requests."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import re
import shlex
import signal
import socket
import sys
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass

import uvicorn
from fastapi import APIRouter, FastAPI

from corral.engines.registry import EngineName
from corral.errors import InputError
from corral.interrupts import Interrupts, Stopped
from corral.serving import embeddings, responses_routes
from corral.serving.admission import Bounds, Door
from corral.serving.api_keys import Keys
from corral.serving.app import build_app
from corral.serving.connections import connection_type
from corral.serving.conversation_store import Conversations
from corral.serving.database import Database
from corral.serving.served_models import Models, open_served

_GRACE_SECONDS = 25.0  # for answers under way when the server is told to end; under the 30 that Kubernetes gives
_LAST_SECONDS = 2  # for what is not work, after that, and for the last counts
_HURRIED_SECONDS = 0.2  # for the last counts, told twice: a database that works needs less
_ORIGIN = re.compile(r"https?://[^/\s*?#@]+")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a server listens, and to whom."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes any free one."""
    insecure: bool = False
    """Allow addresses that other machines reach, though there are no keys, and any name for this machine."""
    cors: Sequence[str] = ()
    """Origins whose pages may ask."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a server serves; see `open_served`."""

    specs: Sequence[str]
    engine: EngineName | None = None
    urls: Sequence[str] = ()
    name: str | None = None
    embeddings: bool = False


def serve(wanted: Wanted, place: Place, bounds: Bounds, database: str | None) -> None:
    """Serve models until SIGINT or SIGTERM; a second one does not wait for answers under way.

    Args:
        bounds: what requests may take.
        database: the URL of the database with keys and conversations; None: there are neither.

    Raises:
        InputError: the address cannot be used, or a model cannot be found or loaded.
        DatabaseError: the database cannot be used.
        TemplateError, MissingExtraError: see `open_served`.
        Stopped: a signal ended it, in good order.
    """
    _check_origins(place.cors)
    with Interrupts() as interrupts:
        try:
            # The address first: to say that it is taken should not wait for a model to load.
            with contextlib.closing(_bind(place)) as listener, _opened(database) as opened:
                has_keys = opened is not None and any(key.works for key in Keys(opened).all())
                _check_reach(place, listener, has_keys)
                print("loading …", file=sys.stderr)
                models = open_served(
                    wanted.specs,
                    engine=wanted.engine,
                    urls=wanted.urls,
                    name=wanted.name,
                    embeddings=wanted.embeddings,
                    at_once=bounds.at_once,
                )
                number = asyncio.run(_run(models, place, listener, bounds, opened, has_keys=has_keys))
        except KeyboardInterrupt:
            raise Stopped(interrupts.signal) from None
    raise Stopped(number)


async def _run(
    models: Models,
    place: Place,
    listener: socket.socket,
    bounds: Bounds,
    database: Database | None,
    *,
    has_keys: bool,
) -> int | None:
    """Serve until told to end. Returns: the signal that told so."""
    address, port = listener.getsockname()[:2]
    door = door_at(str(address), place, bounds, database, has_keys=has_keys)
    # A page in a browser cannot know a key; where there may be none, it must not come by a name of its own.
    hosts = ("localhost", "127.0.0.1", "::1", str(address)) if _is_local(str(address)) and not place.insecure else ()
    app = build_app(models, door, routers=_routers(models, door, database), hosts=hosts, cors=place.cors)
    server = http_server(app, door)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.stop, number)
    listener.listen(1024)  # from here on clients may connect, so what is printed is true
    _announce(models, f"http://{f'[{address}]' if ':' in address else address}:{port}", has_keys=has_keys)
    try:
        await server.serve(sockets=[listener])
    finally:
        await models.close()
        await server.close()
    return server.stopped_by


def door_at(address: str, place: Place, bounds: Bounds, database: Database | None, *, has_keys: bool) -> Door:
    """What stands between an address and the engines.

    A server that may listen there only because there are keys lets nobody in when they are gone, as from a database that was
    emptied or put back.
    """
    door = Door(bounds, None if database is None else Keys(database))
    door.callers.is_locked = has_keys or not (place.insecure or _is_local(address))
    return door


def _routers(models: Models, door: Door, database: Database | None) -> list[APIRouter]:
    """The routes that only some servers have."""
    routers: list[APIRouter] = []
    if database is not None:
        routers.append(responses_routes.routes(models, Conversations(database), door))
    if models.embed is not None:
        routers.append(embeddings.routes(models, door))
    return routers


def _is_fault(record: logging.LogRecord) -> bool:
    """Whether a line of uvicorn's log is about one: answers that are cut off at the end are counted in a line of their own."""
    return record.exc_info is None or not isinstance(record.exc_info[1], asyncio.CancelledError)


def http_server(app: FastAPI, door: Door) -> Server:
    """What answers HTTP, on the sockets given to its `serve`."""
    logging.getLogger("uvicorn.error").addFilter(_is_fault)
    config = uvicorn.Config(
        app,
        http=connection_type(door.bounds),
        h11_max_incomplete_event_size=door.bounds.header_bytes,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=_LAST_SECONDS,
    )
    return Server(config, door)


class Server(uvicorn.Server):
    """uvicorn's server, which leaves signals to corral: it would raise them again before the engines are closed.

    Args:
        door: is closed to new work when the server is told to stop.
    """

    stopped_by: int | None = None
    grace_seconds = _GRACE_SECONDS

    def __init__(self, config: uvicorn.Config, door: Door) -> None:
        super().__init__(config)
        self._door = door
        self._draining: asyncio.Task[None] | None = None
        self._closing: asyncio.Timeout | None = None

    def stop(self, number: int) -> None:
        """End once the work under way is done; told again, end at once.

        Until then the server still listens: it refuses work, and its readiness tells those who watch it.
        """
        self.stopped_by = self.stopped_by or number
        self._door.is_closing = True
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain())
            return
        self.should_exit = self.force_exit = True
        if self._closing is not None and not self._closing.expired():
            self._closing.reschedule(asyncio.get_running_loop().time() + _HURRIED_SECONDS)
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    async def close(self) -> None:
        """Close the door, which waits a moment for the database and no longer, and yet less when told to end again."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_HURRIED_SECONDS if self.force_exit else _LAST_SECONDS) as self._closing:
                await self._door.close()
        self._closing = None

    async def _drain(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.grace_seconds):
                while self._door.places.inside or self._door.places.waiting:
                    await asyncio.sleep(0.05)
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Do nothing: `stop` is called instead."""
        yield


def _announce(models: Models, url: str, *, has_keys: bool) -> None:
    names = [served.name for served in models.all()]
    engines = dict.fromkeys(served.answerer.engine.name for served in models.all())
    body = f'{{"model": "{names[0]}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    key = ' -H "authorization: Bearer $CORRAL_API_KEY"' if has_keys else ""
    print(
        f"serving {', '.join(names)} with {', '.join(engines)} at {url}/v1 (Ctrl-C ends)\n"
        f"try: curl {url}/v1/chat/completions -H 'content-type: application/json'{key} -d {shlex.quote(body)}",
        file=sys.stderr,
        flush=True,
    )


@contextlib.contextmanager
def _opened(url: str | None) -> Generator[Database | None]:
    """Raises: DatabaseError."""
    if url is None:
        yield None
        return
    with contextlib.closing(Database(url)) as database:
        yield database


def _check_origins(origins: Collection[str]) -> None:
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise InputError(
                f"{origin!r} is not the origin of a page",
                where="--cors",
                hint="give scheme, host and port if there is one: https://chat.example.org",
            )


def _check_reach(place: Place, listener: socket.socket, has_keys: bool) -> None:
    """Raises: InputError (anybody on the network could ask)."""
    if not (place.insecure or has_keys or _is_local(str(listener.getsockname()[0]))):
        raise InputError(
            f"{place.host} can be reached from other machines, and there are no keys",
            where=f"--host {place.host} --port {place.port}",
            hint="make one with `corral keys add NAME`, or accept that anybody may ask with --insecure",
        )


def _is_local(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _bind(place: Place) -> socket.socket:
    """A socket at an address that this machine has; nobody can connect yet. Raises: InputError."""
    where = f"--host {place.host} --port {place.port}"
    if not 0 <= place.port <= 65535:
        raise InputError(
            f"{place.port} is not a port", where=where, hint="use one from 1 to 65535, or 0 for any that is free"
        )
    try:
        family, kind, _, _, address = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise InputError(
            f"{place.host!r} is not an address of this machine", where=where, hint="leave out --host, or try 127.0.0.1"
        ) from None
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise InputError(
            f"this address cannot be used: {error.strerror}", where=where, hint="give another with --host or --port"
        ) from None
    return listener
