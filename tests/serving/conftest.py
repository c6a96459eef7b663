"""Real servers on loopback sockets, over the scripted engine and over a tiny model."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from corral.answering.answerer import Answerer
from corral.engines.base import Sampling
from corral.engines.scripted import ScriptedEngine
from corral.engines.transformers import TransformersEngine
from corral.model.loading import load_model, load_tokenizer
from corral.serving.admission import Door
from corral.serving.app import build_app
from corral.serving.database import Database
from corral.serving.generation import Served
from corral.serving.served_models import Models
from corral.serving.server import Server, http_server
from corral.template import Template
from tests.serving.postgres import PostgreSQL, postgresql


@contextlib.contextmanager
def running(
    served: Served | Models, hosts: Sequence[str] = (), door: Door | None = None, *, port: int = 0, **app: Any
) -> Generator[str]:
    """Serve in a thread; yields the address. `app`: what `build_app` takes besides."""
    models = served if isinstance(served, Models) else Models([served])
    with serving(models, door or Door(), port=port, hosts=hosts, **app) as (url, _):
        yield url


@contextlib.contextmanager
def serving(models: Models, door: Door, port: int = 0, **app: Any) -> Generator[tuple[str, Server]]:
    """The same; yields the server as well."""
    listener = socket.create_server(("127.0.0.1", port), backlog=1024)
    server = http_server(build_app(models, door, **app), door)

    async def work() -> None:
        await server.serve(sockets=[listener])
        await door.close()

    thread = threading.Thread(target=lambda: asyncio.run(work()))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join()


class Endless:
    """An engine that counts on for ever, and how far it came: what is cancelled comes no further."""

    def __init__(self, delay_seconds: float = 0.01) -> None:
        self.drawn = 0
        self.began = threading.Event()
        self.engine = ScriptedEngine(self._reply, delay_seconds=delay_seconds)

    def ends(self, within: float = 1) -> bool:
        """Whether it comes no further after so many seconds."""
        time.sleep(within)
        then = self.drawn
        time.sleep(0.2)
        return self.drawn == then

    def _reply(self, ids: Sequence[int], sampling: Sampling, choice: int) -> Iterator[int]:
        for id_ in itertools.cycle(range(40, 60)):
            self.drawn += 1
            if self.drawn > 3:
                self.began.set()
            yield id_


def ask_and_leave(url: str, path: str, body: Any, when: threading.Event) -> None:
    """Send a request, and close the connection at that moment, before the answer ended."""
    place, data = urlsplit(url), json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    with socket.create_connection((str(place.hostname), place.port or 0)) as raw:
        raw.sendall(head.encode() + data)
        assert when.wait(30)


@pytest.fixture(scope="module")
def postgres() -> Generator[PostgreSQL]:
    with postgresql() as started:
        yield started


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.full)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a database that nobody used yet."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'server.db'}"
    server: PostgreSQL = request.getfixturevalue("postgres")
    return server.new_database()


@pytest.fixture
def database(database_url: str) -> Generator[Database]:
    with contextlib.closing(Database(database_url)) as opened:
        yield opened


@pytest.fixture(scope="session")
def tiny_template(tiny_folder: Path) -> Template:
    return Template.load(load_tokenizer(tiny_folder))


@pytest.fixture
def says(tiny_template: Template) -> Callable[..., Served]:
    """`says("text")`: a model that answers this to everything."""

    def make(text: str, **engine: Any) -> Served:
        ids = tiny_template.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return Served(Answerer(ScriptedEngine(ids, **engine), tiny_template), "scripted", fingerprint="fp_1")

    return make


@pytest.fixture(scope="session")
def tiny_served(tiny_folder: Path, tiny_template: Template) -> Generator[Served]:
    """The tiny model on the transformers engine."""
    engine = TransformersEngine(load_model(tiny_folder))
    yield Served(Answerer(engine, tiny_template), "tiny")
    asyncio.run(engine.close())


@pytest.fixture(scope="session")
def tiny_url(tiny_served: Served) -> Generator[str]:
    """Its address."""
    with running(tiny_served) as url:
        yield url


def client_of(url: str, *, api_key: str = "none", **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=api_key, max_retries=0, **options)


@pytest.fixture
def client(tiny_url: str) -> Generator[openai.OpenAI]:
    """OpenAI's client of the tiny model."""
    with client_of(tiny_url) as made:
        yield made
