"""Real servers on loopback sockets, over the scripted engine and over a tiny model."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
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
from corral.engines.base import Engine, Sampling
from corral.engines.scripted import ScriptedEngine
from corral.engines.transformers import TransformersEngine
from corral.model.loading import load_model, load_tokenizer
from corral.serving import accounts
from corral.serving.admission import Admission
from corral.serving.app import build_app
from corral.serving.database import Database
from corral.serving.keys import KeyStore
from corral.serving.models import ServedModel, ServedModels
from corral.serving.protocol import RequestLimits
from corral.serving.responses import build_router
from corral.serving.server import Server, build_http_server
from corral.template import Template
from tests.serving.postgres import PostgreSQL, postgresql


@contextlib.contextmanager
def serve_in_thread(
    served: ServedModel | ServedModels,
    hosts: Sequence[str] = ("*",),
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


ASKED: Any = [{"role": "user", "content": "What is two plus two?"}]
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
JSON = {"content-type": "application/json"}


def call(url: str, method: str, path: str, body: Any = None, headers: Any = JSON) -> tuple[int, Any, Any]:
    """(status, JSON or text body, headers) of one plain request; of a stream, the data of its events in place of the body.

    A dict is sent as JSON, and anything else as it is.
    """
    with contextlib.closing(http.client.HTTPConnection(urlsplit(url).netloc)) as connection:
        connection.request(method, path, json.dumps(body) if isinstance(body, dict) else body, headers)
        response = connection.getresponse()
        text = response.read().decode()
    kind = str(response.headers["content-type"])
    if not kind.startswith("text/event-stream"):
        return response.status, text if kind.startswith("text/") else json.loads(text or "null"), response.headers
    assert text.endswith("\n\n")
    events = [event.partition("data: ")[2] for event in text.removesuffix("\n\n").split("\n\n") if event != ": ping"]
    return response.status, [event if event == "[DONE]" else json.loads(event) for event in events], response.headers


def bearer(secret: str) -> dict[str, str]:
    """The header of a request with this key."""
    return {"authorization": f"Bearer {secret}"}


def wait_for(is_so: Callable[[], bool], seconds: float = 20) -> bool:
    """Whether it comes to be so."""
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


class RunningServer:
    """A server in a thread, and ways to ask it."""

    def __init__(self, url: str, server: Server, client: openai.OpenAI) -> None:
        self.url = url
        self.server = server
        self.client = client
        """OpenAI's client, without a key."""

    def call(self, method: str, path: str, body: Any = None, headers: Any = JSON) -> tuple[int, Any, Any]:
        return call(self.url, method, path, body, headers)

    def chat(self, headers: Any = JSON, **changes: Any) -> tuple[int, Any, Any]:
        """(status, body, headers) of a good request for a chat completion, with these changes."""
        return self.call("POST", CHAT, {"model": "m", "messages": ASKED} | changes, {**JSON, **headers})

    def complete(self, **body: Any) -> tuple[int, Any]:
        """(status, body) of a request for a completion."""
        return self.call("POST", COMPLETIONS, {"model": "m"} | body)[:2]

    def connect(self, sent: str = "", receive_buffer: int | None = None) -> socket.socket:
        """A raw connection over which so much was sent."""
        raw = socket.socket()
        raw.settimeout(30)
        if receive_buffer is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        raw.connect((str(urlsplit(self.url).hostname), urlsplit(self.url).port))
        raw.sendall(sent.encode())
        return raw


def chat_head(*fields: str, end: str = "\r\n") -> str:
    """The head of a request for a chat completion, with these header fields besides."""
    return "\r\n".join((f"POST {CHAT} HTTP/1.1", "host: x", "content-type: application/json", *fields, end))


class Serve:
    """`serve(answers)` serves a model named `m` until the test ends."""

    def __init__(self, template: Template, stack: contextlib.ExitStack) -> None:
        self.template = template
        self._stack = stack

    def model(self, answers: str | Engine, limits: RequestLimits | None = None, **served: Any) -> ServedModel:
        """A model that computes with an engine, or answers a text to everything."""
        if isinstance(answers, str):
            encode = self.template.tokenizer.backend_tokenizer.encode
            answers = ScriptedEngine(encode(answers, add_special_tokens=False).ids)
        return ServedModel(Answerer(answers, self.template), "m", limits or RequestLimits(), **served)

    def __call__(
        self,
        answers: str | Engine | ServedModel | ServedModels,
        admission: Admission | None = None,
        limits: RequestLimits | None = None,
        **app: Any,
    ) -> RunningServer:
        if not isinstance(answers, ServedModel | ServedModels):
            answers = self.model(answers, limits)
        models = answers if isinstance(answers, ServedModels) else ServedModels([answers])
        url, server = self._stack.enter_context(serve_with_handle(models, admission or Admission(), **app))
        return RunningServer(url, server, self._stack.enter_context(openai_client(url)))

    def with_store(
        self,
        answers: str | Engine | ServedModel,
        database: str | Database,
        admission: Admission | None = None,
        lease_seconds: float = 20,
    ) -> RunningServer:
        """Serve with conversations and responses in a database."""
        if isinstance(database, str):
            database = self._stack.enter_context(contextlib.closing(Database(database)))
        served = answers if isinstance(answers, ServedModel) else self.model(answers)
        models, admission = ServedModels([served]), admission or Admission()
        router = build_router(models, database, admission, lease_seconds=lease_seconds)
        return self(models, admission, routers=[router])


@pytest.fixture
def serve(tiny_template: Template) -> Generator[Serve]:
    with contextlib.ExitStack() as stack:
        yield Serve(tiny_template, stack)


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
    """`set_seconds(max_age=5.0)` sets `_MAX_AGE_SECONDS` of `corral.serving.accounts`."""

    def set_constants(**seconds: float) -> None:
        for name, value in seconds.items():
            monkeypatch.setattr(accounts, f"_{name.upper()}_SECONDS", value)

    return set_constants


@pytest.fixture(scope="session")
def tiny_template(tiny_folder: Path) -> Template:
    return Template.load(load_tokenizer(tiny_folder))


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
    with openai_client(tiny_url) as opened:
        yield opened
