"""The process of `corral serve`: an address, a loaded model, and an orderly end. Knows nothing about requests."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import shlex
import signal
import socket
import sys
from collections.abc import Collection, Generator

import uvicorn

from corral.engines.load import Name
from corral.errors import InputError
from corral.interrupts import Interrupts, Stopped
from corral.opening import open_model
from corral.serving.app import build_app
from corral.serving.completions import Served

_GRACE_SECONDS = 10  # for answers under way when the server is told to end


def serve(spec: str, *, host: str, port: int, engine: Name | None, name: str | None, insecure: bool) -> None:
    """Serve a model until SIGINT or SIGTERM; a second SIGINT does not wait for answers under way.

    Args:
        spec: a run directory, or any model spec.
        host: the address to listen on.
        port: 0 takes any free port.
        engine: one of `engines.load.ENGINES`; None takes the one meant for the device.
        name: what clients call the model; None takes the run's, folder's, asset's or hub's name.
        insecure: allow addresses that other machines reach, though there are no keys.

    Raises:
        InputError: the address cannot be used.
        RunError, ModelError, AssetError, TemplateError, MissingExtraError: see `open_model`.
        Stopped: a signal ended it, in good order.
    """
    with Interrupts() as interrupts:
        try:
            # The address first: to say that it is taken should not wait for a model to load.
            with contextlib.closing(_bind(host, port, insecure)) as listener:
                print("loading …", file=sys.stderr)
                opened = open_model(spec, engine)
                served = Served(opened.answerer, name or opened.name, fingerprint=f"fp_{opened.fingerprint}")
                number = asyncio.run(_run(served, listener, any_name=insecure))
        except KeyboardInterrupt:
            raise Stopped(interrupts.signal) from None
    raise Stopped(number)


async def _run(served: Served, listener: socket.socket, *, any_name: bool) -> int | None:
    """Serve until told to end. Returns: the signal that told so."""
    address, port = listener.getsockname()[:2]
    hosts = () if any_name else ("localhost", "127.0.0.1", "::1", str(address))
    server = http_server(served, hosts)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.stop, number)
    listener.listen(128)  # from here on clients may connect, so what is printed is true
    _announce(served, f"http://{f'[{address}]' if ':' in address else address}:{port}")
    try:
        await server.serve(sockets=[listener])
    finally:
        await served.answerer.engine.close()
    return server.stopped_by


def http_server(served: Served, hosts: Collection[str] = ()) -> Server:
    """What answers HTTP, on the sockets given to its `serve`; `hosts` as in `build_app`."""
    config = uvicorn.Config(
        build_app(served, hosts=hosts),
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    return Server(config)


class Server(uvicorn.Server):
    """uvicorn's server, which leaves signals to corral: it would raise them again before the engine is closed."""

    stopped_by: int | None = None

    def stop(self, number: int) -> None:
        """Take no more requests and end; told again by SIGINT, end without waiting for those under way."""
        self.stopped_by = self.stopped_by or number
        self.handle_exit(number, None)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Do nothing: `stop` is called instead."""
        yield


def _announce(served: Served, url: str) -> None:
    body = f'{{"model": "{served.name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    print(
        f"serving {served.name} with {served.answerer.engine.name} at {url}/v1 (Ctrl-C ends)\n"
        f"try: curl {url}/v1/chat/completions -H 'content-type: application/json' -d {shlex.quote(body)}",
        file=sys.stderr,
        flush=True,
    )


def _bind(host: str, port: int, insecure: bool) -> socket.socket:
    """A socket at an address that this machine has and may use. Raises: InputError."""
    where = f"--host {host} --port {port}"
    if not 0 <= port <= 65535:
        raise InputError(
            f"{port} is not a port", where=where, hint="use one from 1 to 65535, or 0 for any that is free"
        )
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise InputError(
            f"{host!r} is not an address of this machine", where=where, hint="leave out --host, or try 127.0.0.1"
        ) from None
    if not (insecure or ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback):
        raise InputError(
            f"{host} can be reached from other machines, and this server has no keys yet (they are planned)",
            where=where,
            hint="leave out --host and use a tunnel, or accept that anybody may ask with --insecure",
        )
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
