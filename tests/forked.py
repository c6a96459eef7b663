"""Processes forked from a server that has imported everything once, so that each starts in milliseconds instead of seconds.

The server has done nothing else: no thread runs in it, and no test has changed it.
"""

from __future__ import annotations

import multiprocessing
import os
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


def corral(
    *args: object,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    input: str = "",  # noqa: A002
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a forked process, with streams, folder and environment of its own."""
    words = [str(arg) for arg in args]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "stdin").write_text(input, "utf-8")
        process = start(_main, words, folder, cwd or Path.cwd(), dict(env or os.environ))
        process.join()
        output, errors = ((folder / stream).read_text("utf-8") for stream in ("stdout", "stderr"))
    return subprocess.CompletedProcess(["corral", *words], process.exitcode, output, errors)


def _main(words: list[str], streams: Path, cwd: Path, env: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.stdin = (streams / "stdin").open(encoding="utf-8")
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        with (streams / name).open("wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    from corral.cli import main

    sys.argv = ["corral", *words]
    sys.exit(main())
