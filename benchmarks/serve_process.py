"""The processes that `serve.py` measures: corral's server, and the bare engine behind a line protocol.

    python benchmarks/serve_process.py (served|bare) [--delay SECONDS] [--places N] [--waiting N] [--embed]

Prints its port (and the API key) in its first line. A line on standard input asks for the event loop's longest stall since the
last such line, in milliseconds; the end of standard input ends it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from typing import Any

from serve_load import BareClient, Client

MODEL = "asset:smollm2-135m-instruct"
SLOW = 0.05
"""Seconds per token of the engine `slow`."""
_TICK_SECONDS = 0.002


class Process:
    """A running process of this module."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.pid = process.pid
        self._input, self._output = process.stdin, process.stdout
        self._port, *self._key = self._output.readline().split()

    def connect(self) -> Any:
        """A client of what it serves, for one event loop."""
        return Client(int(self._port), self._key[0]) if self._key else BareClient(int(self._port))

    def longest_stall_ms(self) -> float:
        """For how long the event loop ran nothing else, at most, since the last call."""
        self._input.write("stall\n")
        self._input.flush()
        return float(self._output.readline())


@contextlib.contextmanager
def running(what: str, delay: float, *options: str) -> Generator[Process]:
    """Start `served` or `bare` in a process of its own."""
    command = [sys.executable, __file__, what, "--delay", str(delay), *options]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    try:
        yield Process(process)
    finally:
        process.stdin.close()
        process.wait()


class LoopWatch:
    """Measures how late the event loop runs what is due."""

    def __init__(self) -> None:
        self._longest = 0.0

    async def run(self) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(_TICK_SECONDS)
            self._longest = max(self._longest, time.perf_counter() - before - _TICK_SECONDS)

    def take_ms(self) -> float:
        """The longest delay since the last call."""
        longest, self._longest = self._longest, 0.0
        return 1000 * longest


def template() -> Any:
    from corral.model.loading import load_template, resolve_model

    return load_template(resolve_model(MODEL).folder)


def scripted(ids: list[int], delay: float) -> Any:
    """An engine that generates these ids over and over, one every `delay` seconds; each choice starts at another one."""
    from corral.engines.scripted import ScriptedEngine

    return ScriptedEngine(lambda _, __, choice: itertools.cycle(ids[choice % len(ids) :] + ids), delay_seconds=delay)


def listen() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0), backlog=1024)


def answer_input(watch: LoopWatch, end: Any) -> None:
    """Answer each line of standard input in a thread; call `end` at its end."""

    def work() -> None:
        for _ in sys.stdin:
            print(watch.take_ms(), flush=True)
        end()

    threading.Thread(target=work, daemon=True).start()


def serve(options: argparse.Namespace) -> None:
    """Serve the models `model` and `slow`, or a real `model` without a delay, with a database and a key."""
    from corral.answering.answerer import Answerer
    from corral.answering.open_model import open_model
    from corral.engines.embedding import Embedder
    from corral.serving import embeddings, responses
    from corral.serving.admission import Admission, ServerLimits
    from corral.serving.app import build_app
    from corral.serving.database import Database
    from corral.serving.keys import KeyStore
    from corral.serving.models import ServedModel, ServedModels
    from corral.serving.server import build_http_server

    embedder = Embedder() if options.embed else None
    if options.delay:
        text = " a b c d e f g h"
        ids = template().tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        engines = {"model": scripted(ids, options.delay), "slow": scripted(ids, SLOW)}
        served = [ServedModel(Answerer(engine, template()), name) for name, engine in engines.items()]
    else:
        served = [ServedModel(open_model(MODEL, None).answerer, "model")]
    models = ServedModels(served, embedder)
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(Database(f"sqlite:///{folder}/db")) as database:
        _, secret = KeyStore(database).add("bench")
        admission = Admission(ServerLimits(at_once=options.places, waiting=options.waiting), KeyStore(database))
        routers = [responses.build_router(models, database, admission)]
        if embedder is not None:
            routers.append(embeddings.build_router(models, admission))
        server = build_http_server(build_app(models, admission, routers=routers), admission)
        listener = listen()
        watch = LoopWatch()
        print(listener.getsockname()[1], secret, flush=True)
        answer_input(watch, lambda: setattr(server, "should_exit", True))

        async def work() -> None:
            watching = asyncio.create_task(watch.run())
            await server.serve(sockets=[listener])
            watching.cancel()
            await models.close()
            await admission.close()

        asyncio.run(work())


def serve_bare(options: argparse.Namespace) -> None:
    """Answer each connection's line of JSON with a line for each token."""
    from corral.engines.base import Sampling

    async def work() -> None:
        ids = [*range(40, 50)]
        engines = {"model": scripted(ids, options.delay), "slow": scripted(ids, SLOW)}
        prompt = list(range(5, 40))
        loop, ended, watch = asyncio.get_running_loop(), asyncio.Event(), LoopWatch()

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            body = json.loads(await reader.readline())
            with contextlib.suppress(ConnectionError):
                async for delta in engines[body["model"]].submit(prompt, Sampling(max_tokens=body["max_tokens"])):
                    writer.writelines(b"token\n" for _ in delta.ids)
                    await writer.drain()
            writer.close()

        listener = listen()
        server = await asyncio.start_server(answer, sock=listener)
        print(listener.getsockname()[1], flush=True)
        answer_input(watch, lambda: loop.call_soon_threadsafe(ended.set))
        watching = asyncio.create_task(watch.run())
        await ended.wait()
        watching.cancel()
        server.close()

    asyncio.run(work())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("served", "bare"))
    parser.add_argument(
        "--delay", type=float, default=0, help="seconds per token of a scripted engine; 0: a real model"
    )
    parser.add_argument("--places", type=int, default=512)
    parser.add_argument("--waiting", type=int, default=512)
    parser.add_argument("--embed", action="store_true", help="serve embeddings")
    options = parser.parse_args()
    (serve if options.what == "served" else serve_bare)(options)


if __name__ == "__main__":
    main()
