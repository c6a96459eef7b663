"""The process of `corral serve`: binds the address, opens database and models, serves, and shuts down in order."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import logging
import math
import shlex
import signal
import socket
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import APIRouter, FastAPI

from corral.errors import InputError
from corral.interrupts import Interrupts, Stopped
from corral.serving import adapters, embeddings, responses
from corral.serving.admission import Admission, ServerLimits
from corral.serving.app import build_app
from corral.serving.connections import Connections
from corral.serving.database import Database
from corral.serving.keys import KeySource, SecretKeys, open_keys
from corral.serving.logs import LogLevel, log_to_stderr
from corral.serving.middleware import LOCAL_HOSTS
from corral.serving.model_loading import ModelOptions, follow_runs, open_served_models
from corral.serving.models import ServedModels

_GRACE_SECONDS = 25.0  # for running requests after a signal; less than the 30 that Kubernetes gives
_CLOSE_SECONDS = 2  # after that, for other requests, and then for usage counts
_FORCED_CLOSE_SECONDS = 0.2  # for usage counts after a second signal; a working database needs less


@dataclass(frozen=True, slots=True)
class ListenOptions:
    """The address of a server, and who may use it."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes any free port."""
    insecure: bool = False
    """Allow addresses that other machines can reach without keys, and any `Host` header."""
    cors: Sequence[str] = ()
    """Origins whose pages may send requests."""
    allowed_hosts: Sequence[str] = ()
    """Names in the `Host` header that a local server without keys answers to besides its own; `*`: any."""
    root_path: str = ""
    """The path under which a proxy serves this server, as `/llm`."""
    log_level: LogLevel = "info"
    """From which level on the log shows what the server says; `info` shows a line for each request."""
    keys_file: Path | None = None
    """Further keys; see `SecretKeys`."""


def serve(options: ModelOptions, listen: ListenOptions, limits: ServerLimits, database: str | None) -> None:
    """Serve models until SIGINT or SIGTERM; a second signal does not wait for running requests.

    Args:
        database: the URL of the database with keys and conversations; None: there are neither.

    Raises:
        InputError: the address cannot be used, or a model cannot be found or loaded.
        DatabaseError: the database cannot be used.
        TemplateError, MissingExtraError: see `open_served_models`.
        Stopped: a signal ended the server in order.
    """
    with Interrupts() as interrupts, log_to_stderr(listen.log_level):
        try:
            # The address first, so that an error about it does not wait for a model to load.
            with contextlib.closing(_bind(listen)) as listener, _open_database(database) as opened:
                keys = open_keys(opened, listen.keys_file)
                known = [] if keys is None else keys.all()
                has_valid_key = any(key.is_active for key in known)
                _check_exposure(listen, listener, has_valid_key)
                _check_adapters(options, listener, has_valid_key)
                print("loading …", file=sys.stderr)
                models = open_served_models(options, limits.at_once)
                number = asyncio.run(
                    _run(models, options, listen, listener, limits, opened, keys, has_keys=bool(known))
                )
        except KeyboardInterrupt:
            raise Stopped(interrupts.signal) from None
    raise Stopped(number)


async def _run(
    models: ServedModels,
    options: ModelOptions,
    listen: ListenOptions,
    listener: socket.socket,
    limits: ServerLimits,
    database: Database | None,
    keys: KeySource | None,
    *,
    has_keys: bool,
) -> int | None:
    """Serve until a signal arrives; with `has_keys`, which may all be revoked, requests need one. Returns: the signal."""
    address, port = listener.getsockname()[:2]
    admission = build_admission(str(address), listen, limits, keys, has_keys=has_keys)
    routers = _routers(models, admission, database)
    if options.adapters is not None:
        routers.append(adapters.build_router(models, options.adapters))
    hosts = _hosts(str(address), listen, admission)
    app = build_app(models, admission, routers=routers, hosts=hosts, cors=listen.cors, root_path=listen.root_path)
    server = build_http_server(app, admission)
    gc.collect()
    gc.freeze()  # looking through models for garbage would hold up requests; one that is replaced is in no cycle
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.stop, number)
    listener.listen(1024)  # from here on clients can connect
    url = f"http://{f'[{address}]' if ':' in address else address}:{port}"
    _print_address(models, url, needs_key=admission.accounts.requires_key)
    following = loop.create_task(follow_runs(options, models)) if options.follow else None
    try:
        await server.serve(sockets=[listener])
    finally:
        await (
            server.close()
        )  # first: a model that is being loaded, or closed, may take longer than who ends the process waits
        if following is not None:
            following.cancel()
            await asyncio.wait([following], timeout=_CLOSE_SECONDS)
        await models.close()
    return server.stopped_by


def build_admission(
    address: str, listen: ListenOptions, limits: ServerLimits, keys: KeySource | None, *, has_keys: bool
) -> Admission:
    """Create the admission of a server at this address.

    A server that may use the address only because there are keys lets nobody in when the keys are gone, for example because
    the database was emptied or restored.
    """
    admission = Admission(limits, keys)
    is_open = listen.insecure or _is_local(address)
    admission.accounts.requires_key = has_keys or isinstance(keys, SecretKeys) or not is_open
    return admission


def _hosts(address: str, listen: ListenOptions, admission: Admission) -> Sequence[str]:
    """The names that the server answers to: any, unless a page in a browser could reach it without a key (DNS rebinding)."""
    if admission.accounts.requires_key or listen.insecure or not _is_local(address):
        return ("*",)
    return (*LOCAL_HOSTS, *listen.allowed_hosts)


def _routers(models: ServedModels, admission: Admission, database: Database | None) -> list[APIRouter]:
    """The optional routes."""
    routers: list[APIRouter] = []
    if database is not None:
        routers.append(responses.build_router(models, database, admission))
    if models.embed is not None:
        routers.append(embeddings.build_router(models, admission))
    return routers


def _is_not_cancellation(record: logging.LogRecord) -> bool:
    """Drop uvicorn's tracebacks of requests cancelled at shutdown, which it also counts in a line of its own."""
    return record.exc_info is None or not isinstance(record.exc_info[1], asyncio.CancelledError)


def build_http_server(app: FastAPI, admission: Admission) -> Server:
    """Create the HTTP server; its `serve` takes the sockets."""
    logging.getLogger("uvicorn.error").addFilter(_is_not_cancellation)
    limits = admission.limits
    connections = Connections(app, limits)
    config = uvicorn.Config(
        connections,
        http=connections.protocol,
        # `AccessMiddleware` refuses them in OpenAI's form if they are not much larger.
        h11_max_incomplete_event_size=4 * limits.header_bytes,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=math.ceil(limits.keep_alive_seconds),
        timeout_graceful_shutdown=_CLOSE_SECONDS,
    )
    return Server(config, admission, connections)


class Server(uvicorn.Server):
    """uvicorn's server without its signal handlers, which would raise the signal again before the engines are closed."""

    stopped_by: int | None = None
    grace_seconds = _GRACE_SECONDS

    def __init__(self, config: uvicorn.Config, admission: Admission, connections: Connections) -> None:
        super().__init__(config)
        self.connections = connections
        self.admission = admission
        self._drain_task: asyncio.Task[None] | None = None
        self._close_timeout: asyncio.Timeout | None = None

    def stop(self, signal_number: int) -> None:
        """Shut down once running requests are done or have had their time; when called again, at once.

        Until then the server listens, refuses new work, and `/health/ready` answers 503. Requests whose time is over end with
        an error: a stream, with one as its last event.
        """
        self.stopped_by = self.stopped_by or signal_number
        self.admission.is_draining = True
        if self._drain_task is None:
            self._drain_task = asyncio.get_running_loop().create_task(self._drain())
            return
        self.should_exit = self.force_exit = True
        if self._close_timeout is not None and not self._close_timeout.expired():
            self._close_timeout.reschedule(asyncio.get_running_loop().time() + _FORCED_CLOSE_SECONDS)
        self.connections.abort()

    async def close(self) -> None:
        """Close the admission, which writes usage counts, with a timeout; a second signal shortens it."""
        with contextlib.suppress(TimeoutError):  # requests that were cancelled are counted when they have ended
            async with asyncio.timeout(_FORCED_CLOSE_SECONDS):
                while self.admission.time_limits:
                    await asyncio.sleep(0.01)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(
                _FORCED_CLOSE_SECONDS if self.force_exit else _CLOSE_SECONDS
            ) as self._close_timeout:
                await self.admission.close()
        self._close_timeout = None

    async def _drain(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.grace_seconds):
                while self.admission.queue.running or self.admission.queue.waiting:
                    await asyncio.sleep(0.05)
        self.admission.end_requests()
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Do nothing: `stop` is called instead."""
        yield


def _print_address(models: ServedModels, url: str, *, needs_key: bool) -> None:
    names = [served.name for served in models.all()]
    engines = dict.fromkeys(served.answerer.engine.name for served in models.all())
    body = f'{{"model": "{names[0]}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    key = ' -H "authorization: Bearer $CORRAL_API_KEY"' if needs_key else ""
    print(
        f"serving {', '.join(names)} with {', '.join(engines)} at {url}/v1 (Ctrl-C ends)\n"
        f"try: curl {url}/v1/chat/completions -H 'content-type: application/json'{key} -d {shlex.quote(body)}",
        file=sys.stderr,
        flush=True,
    )


@contextlib.contextmanager
def _open_database(url: str | None) -> Generator[Database | None]:
    """Raises: DatabaseError."""
    if url is None:
        yield None
        return
    with contextlib.closing(Database(url)) as database:
        yield database


def _check_exposure(listen: ListenOptions, listener: socket.socket, has_valid_key: bool) -> None:
    """Raises: InputError (without keys, anybody on the network could send requests)."""
    if not (listen.insecure or has_valid_key or _is_local(str(listener.getsockname()[0]))):
        raise InputError(
            f"{listen.host} can be reached from other machines, and there are no keys",
            where=f"--host {listen.host} --port {listen.port}",
            hint="create a key with `corral keys add NAME`, or allow requests from anybody with --insecure",
        )


def _check_adapters(options: ModelOptions, listener: socket.socket, has_keys: bool) -> None:
    """Raises: InputError (anybody on the network could load adapters)."""
    if options.adapters is not None and not (has_keys or _is_local(str(listener.getsockname()[0]))):
        raise InputError(
            "without keys, anybody who reaches this server could load adapters",
            where=f"--adapters {options.adapters}",
            hint="create a key with `corral keys add NAME --admin`, or leave out --host",
        )


def _is_local(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _bind(listen: ListenOptions) -> socket.socket:
    """Bind a socket to the address, without listening yet. Raises: InputError."""
    where = f"--host {listen.host} --port {listen.port}"
    if not 0 <= listen.port <= 65535:
        raise InputError(
            f"{listen.port} is not a port", where=where, hint="use one from 1 to 65535, or 0 for any that is free"
        )
    try:
        family, kind, _, _, address = socket.getaddrinfo(listen.host, listen.port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise InputError(
            f"{listen.host!r} is not an address of this machine", where=where, hint="leave out --host, or try 127.0.0.1"
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
