"""Processes forked from a server that has imported everything once, so that each starts in milliseconds instead of seconds.

The server has done nothing else: no thread runs in it, and no test has changed it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def start(target: Callable[..., None], *arguments: Any) -> Any:
    """Start a process that calls a function of a module."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


class Forked:
    """A forked process with streams, folder and environment of its own, which calls a function of a module."""

    def __init__(
        self,
        target: Callable[..., Any],
        *arguments: Any,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        input: str = "",  # noqa: A002
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        streams = Path(self._folder.name)
        (streams / "stdin").write_text(input, "utf-8")
        self._errors = streams / "stderr"
        self._output = streams / "stdout"
        self._process = start(
            _call, target, arguments, streams, cwd or Path.cwd(), dict(os.environ if env is None else env)
        )

    @property
    def errors(self) -> str:
        """What it wrote to standard error so far."""
        return self._errors.read_text("utf-8") if self._errors.exists() else ""

    @property
    def is_running(self) -> bool:
        return self._process.exitcode is None

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """End it by `kill -9`, unless it has ended."""
        self._process.kill()

    def finish(self) -> subprocess.CompletedProcess[str]:
        """Wait for its end. The exit code of one that a signal ended is minus the signal's number."""
        self._process.join()
        return subprocess.CompletedProcess([], self._process.exitcode, self._output.read_text("utf-8"), self.errors)


def start_corral(*args: object, **settings: Any) -> Forked:
    """Start the command line; for the settings see `Forked`."""
    return Forked(_main, [str(arg) for arg in args], **settings)


def corral(*args: object, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end; for the settings see `Forked`."""
    return start_corral(*args, **settings).finish()


def rank_environments(count: int = 2) -> list[dict[str, str]]:
    """The environments in which torchrun starts the processes of one run, with a free port of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": f"{count}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "GLOO_SOCKET_IFNAME": "lo"}
    return [{**os.environ, **world, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"} for rank in range(count)]


def _call(target: Callable[..., Any], arguments: Any, streams: Path, cwd: Path, env: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.stdin = (streams / "stdin").open(encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        with (streams / ("stdout" if stream is sys.stdout else "stderr")).open("wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    sys.exit(target(*arguments))


def _main(words: list[str]) -> int:
    from corral.cli import main

    sys.argv = ["corral", *words]
    return main()
