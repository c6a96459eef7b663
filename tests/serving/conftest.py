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
from corral.serving import auth
from corral.serving.admission import Admission
from corral.serving.api_keys import KeyStore
from corral.serving.app import build_app
from corral.serving.database import Database
from corral.serving.generation import ServedModel
from corral.serving.served_models import ServedModels
from corral.serving.server import Server, build_http_server
from corral.template import Template
from tests.serving.postgres import PostgreSQL, postgresql


@contextlib.contextmanager
def serve_in_thread(
    served: ServedModel | ServedModels,
    hosts: Sequence[str] = (),
    admission: Admission | None = None,
    *,
    port: int = 0,
    **app: Any,
) -> Generator[str]:
    """Serve in a thread; yields the address. `app`: what `build_app` takes besides."""
    models = served if isinstance(served, ServedModels) else ServedModels([served])
    with serve_with_handle(models, admission or Admission(), port=port, hosts=hosts, **app) as (url, _):
        yield url


@contextlib.contextmanager
def serve_with_handle(
    models: ServedModels, admission: Admission, port: int = 0, **app: Any
) -> Generator[tuple[str, Server]]:
    """The same; yields the server as well."""
    listener = socket.create_server(("127.0.0.1", port), backlog=1024)
    server = build_http_server(build_app(models, admission, **app), admission)

    async def work() -> None:
        await server.serve(sockets=[listener])
        await admission.close()

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
        self.started = threading.Event()
        self.engine = ScriptedEngine(self._reply, delay_seconds=delay_seconds)

    def has_stopped(self, within: float = 1) -> bool:
        """Whether it comes no further after so many seconds."""
        time.sleep(within)
        then = self.drawn
        time.sleep(0.2)
        return self.drawn == then

    def _reply(self, ids: Sequence[int], sampling: Sampling, choice: int) -> Iterator[int]:
        for id_ in itertools.cycle(range(40, 60)):
            self.drawn += 1
            if self.drawn > 3:
                self.started.set()
            yield id_


def post_and_disconnect(url: str, path: str, body: Any, when: threading.Event) -> None:
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


@pytest.fixture
def sqlite(tmp_path: Path) -> Generator[Database]:
    """A new database in a file."""
    with contextlib.closing(Database(f"sqlite:///{tmp_path / 'server.db'}")) as opened:
        yield opened


@pytest.fixture
def keys(sqlite: Database) -> KeyStore:
    return KeyStore(sqlite)


@pytest.fixture
def set_seconds(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`set_seconds(max_age=5.0)` sets `_MAX_AGE_SECONDS` of `corral.serving.auth`."""

    def set_constants(**seconds: float) -> None:
        for name, value in seconds.items():
            monkeypatch.setattr(auth, f"_{name.upper()}_SECONDS", value)

    return set_constants


@pytest.fixture(scope="session")
def tiny_template(tiny_folder: Path) -> Template:
    return Template.load(load_tokenizer(tiny_folder))


@pytest.fixture
def scripted_model(tiny_template: Template) -> Callable[..., ServedModel]:
    """`scripted_model("text")`: a model that answers this to everything."""

    def make(text: str, **engine: Any) -> ServedModel:
        ids = tiny_template.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ServedModel(Answerer(ScriptedEngine(ids, **engine), tiny_template), "scripted", fingerprint="fp_1")

    return make


@pytest.fixture(scope="session")
def tiny_served(tiny_folder: Path, tiny_template: Template) -> Generator[ServedModel]:
    """The tiny model on the transformers engine."""
    engine = TransformersEngine(load_model(tiny_folder))
    yield ServedModel(Answerer(engine, tiny_template), "tiny")
    asyncio.run(engine.close())


@pytest.fixture(scope="session")
def tiny_url(tiny_served: ServedModel) -> Generator[str]:
    """Its address."""
    with serve_in_thread(tiny_served) as url:
        yield url


def openai_client(url: str, *, api_key: str = "none", **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=api_key, max_retries=0, **options)


@pytest.fixture
def client(tiny_url: str) -> Generator[openai.OpenAI]:
    """OpenAI's client of the tiny model."""
    with openai_client(tiny_url) as made:
        yield made
