"""Routes: HTTP ↔ work. Built from what it serves and the door in front of it; holds no settings of its own and nothing global.

A route for work makes it and hands it to the door, which knows when to begin and when to stop. Every answer that is no success
has OpenAI's shape. Prompts are neither logged nor kept. It does not know sockets, signals, how the engines came to be, or who
may ask.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import corral
from corral.engines.base import Engine, Sampling
from corral.errors import DatabaseError
from corral.serving.admission import Door
from corral.serving.chat_handler import asked
from corral.serving.chat_protocol import ChatRequest
from corral.serving.completions_handler import asked_text
from corral.serving.completions_protocol import CompletionRequest
from corral.serving.generation import faults
from corral.serving.http_responses import error_reply, json_reply
from corral.serving.middleware import Envelope, Guard
from corral.serving.prometheus import CONTENT_TYPE
from corral.serving.protocol import ModelList, Refused, refusal
from corral.serving.request_queue import Busy
from corral.serving.served_models import Models

_WORDS = {404: "there is no such route", 405: "this route has no such method"}
_LOOK_SECONDS = 1.0  # anybody may ask whether the engines take work: they are not asked more often than this


def build_app(
    models: Models,
    door: Door,
    *,
    routers: Sequence[APIRouter] = (),
    hosts: Collection[str] = (),
    cors: Sequence[str] = (),
) -> FastAPI:
    """The server as an ASGI application. The engines and the door stay the caller's to close.

    Args:
        models: what is served.
        door: what all work goes through.
        routers: further routes.
        hosts: names by which the server may be called (see `Guard`). None given: any name.
        cors: origins whose pages may ask, as `https://host`. None given: none.
    """
    # No pages of documentation: they would load scripts from elsewhere. The document itself is for programs.
    app = FastAPI(
        title="corral",
        version=corral.__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        redirect_slashes=False,
        strict_content_type=True,  # a page elsewhere can send a body without its type unasked, but not one of JSON
    )
    body_bytes = max(served.limits.body_bytes for served in models.all())
    # The last one added is the first to meet a request.
    app.add_middleware(Guard, door=door, body_bytes=body_bytes, hosts=hosts)
    if cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(Envelope, door=door)
    _handle_errors(app)
    app.include_router(_work(models, door))
    app.include_router(_state(models, door))
    for router in routers:
        app.include_router(router)
    return app


def _work(models: Models, door: Door) -> APIRouter:
    """Chat and completions, and what there is to ask."""
    router = APIRouter(prefix="/v1")

    @router.post("/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        served = models.find(body.model)
        return await door.answer(request, lambda: asked(served, body), stream=bool(body.stream), model=served.name)

    @router.post("/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        served = models.find(body.model)
        return await door.answer(request, lambda: asked_text(served, body), stream=bool(body.stream), model=served.name)

    @router.get("/models")
    async def listed() -> Response:  # pyright: ignore[reportUnusedFunction]
        return json_reply(ModelList(data=models.listed()))

    @router.get("/models/{name:path}")
    async def one(name: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        for model in models.listed():
            if model.id == name:
                return json_reply(model)
        raise Refused(404, f"the model {name!r} does not exist", param="model", code="model_not_found")

    return router


class Health(BaseModel):
    """`/health`, and `/health/ready`. They are open, so they tell nothing else."""

    status: str


def _state(models: Models, door: Door) -> APIRouter:
    """How the server is."""
    router = APIRouter()
    readiness = _Readiness(models)

    @router.get("/health")
    async def alive() -> Response:  # pyright: ignore[reportUnusedFunction]
        return json_reply(Health(status="ok"))

    @router.get("/health/ready")
    async def ready() -> Response:  # pyright: ignore[reportUnusedFunction]
        if door.is_closing:
            raise Busy(503, "this server is ending", retry_seconds=5, code="shutting_down")
        readiness.check()
        return json_reply(Health(status="ready"))

    @router.get("/metrics")
    async def metrics() -> Response:  # pyright: ignore[reportUnusedFunction]
        return Response(door.metrics.text(), headers={"content-type": CONTENT_TYPE})

    return router


class _Readiness:
    """Whether the engines take work, asked at most once a second."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._looked = float("-inf")
        self._fault: Refused | None = None

    def check(self) -> None:
        """Raises: Refused (503)."""
        now = time.monotonic()
        if now - self._looked > _LOOK_SECONDS:
            self._looked = now
            try:
                self._look()
                self._fault = None
            except Refused as fault:
                self._fault = fault
        if self._fault is not None:
            raise self._fault

    def _look(self) -> None:
        engines: dict[int, Engine] = {id(each.answerer.engine): each.answerer.engine for each in self._models.all()}
        for engine in engines.values():
            with faults():
                # Only the engine knows whether it takes work, and says so when it is given some.
                engine.submit([0], Sampling(max_tokens=1)).cancel()
        if not self._models.ready:
            what = "an engine of this server cannot compute"
            raise Refused(503, what, code="engine_unavailable", retry_seconds=5)


def _handle_errors(app: FastAPI) -> None:
    """Give every error OpenAI's shape; what is none of these is a fault of ours (see `Envelope`)."""

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return error_reply(error)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_reply(refusal(error.errors()))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = _WORDS.get(error.status_code, str(error.detail))
        return error_reply(Refused(error.status_code, what), error.headers)

    async def no_database(request: Request, error: Exception) -> Response:
        what = "the database of this server cannot be reached"
        return error_reply(Refused(503, what, code="database_unavailable", retry_seconds=1))

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(DatabaseError, no_database)
