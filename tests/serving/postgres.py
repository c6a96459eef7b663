"""A PostgreSQL server of a test's own, from the binaries on this machine: on loopback, as an unprivileged user, then gone."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Self

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

_NOBODY = 65534


def _binaries() -> Path:
    candidates = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    on_path = shutil.which("postgres")
    if on_path:
        candidates.append(Path(on_path).resolve())
    for path in reversed(candidates):
        if (path.parent / "initdb").is_file():
            return path.parent
    pytest.skip("PostgreSQL's server (Debian's package postgresql) is not on this machine")


class PostgreSQL:
    """A server with a password."""

    def __init__(self, folder: Path) -> None:
        self.password = secrets.token_hex(8)
        self._folder = folder
        self._binaries = _binaries()
        self._process: subprocess.Popen[bytes] | None = None
        # PostgreSQL refuses to run as root.
        self._user = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._port = listener.getsockname()[1]
        secret = folder / "password"
        secret.write_text(self.password)
        if self._user:
            for path in (folder, secret):
                os.chown(path, _NOBODY, _NOBODY)
        command = [self._binaries / "initdb", "-D", folder / "data", "-U", "corral", "--auth=scram-sha-256"]
        command += [f"--pwfile={secret}", "--encoding=UTF8", "--no-locale", "--no-sync"]
        subprocess.run(command, check=True, capture_output=True, cwd=folder, **self._user)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off"}
        command = [self._binaries / "postgres", "-D", self._folder / "data", "-p", str(self._port)]
        command += [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        log = (self._folder / "log").open("ab")
        self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._folder, **self._user)
        engine = create_engine(self._url("postgres"))
        while True:
            assert self._process.poll() is None, (self._folder / "log").read_text()
            with contextlib.suppress(OperationalError), engine.connect():
                break
            time.sleep(0.05)
        engine.dispose()

    def stop(self) -> None:
        """Stop it: connections are closed."""
        if self._process is not None:
            self._process.send_signal(2)
            self._process.wait()

    def new_database(self) -> str:
        """The URL of a database that is empty."""
        name = f"corral_{secrets.token_hex(4)}"
        engine = create_engine(self._url("postgres"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        engine.dispose()
        return self._url(name).replace("+psycopg", "")

    def _url(self, name: str) -> str:
        return f"postgresql+psycopg://corral:{self.password}@127.0.0.1:{self._port}/{name}"


class Proxy:
    """Connections to a port of this machine through another one, which can fall silent without being closed."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        self._silent: set[int] = set()

    def silence(self) -> None:
        """From here on nothing comes through the connections there are. New ones work."""
        self._silent.update(range(len(self._sockets)))

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                ends = self._listener.accept()[0], socket.create_connection(("127.0.0.1", self._target))
                number = len(self._sockets)
                self._sockets += ends
                for source, target in (ends, ends[::-1]):
                    threading.Thread(target=self._pump, args=(number, source, target), daemon=True).start()

    def _pump(self, number: int, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if number not in self._silent:
                    target.sendall(data)


@contextlib.contextmanager
def postgresql() -> Generator[PostgreSQL]:
    """A running server."""
    _binaries()
    # Not in a test's own folder, into which nobody but its owner may look.
    with tempfile.TemporaryDirectory() as folder:
        server = PostgreSQL(Path(folder))
        try:
            server.start()
            yield server
        finally:
            server.stop()
